"""Custom autograd functions in a trace: one op each, with a backward of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from merak_like.partitioner.tracer import trace
from merak_like.runtime.local import LocalPipeline
from tests.zoo.staged import even_starts

WIDTH = 8


def square(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.square().mean()


class Doubling(torch.autograd.Function):
    """Twice the input, and a backward that is not the derivative."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return 2 * args[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 3 * gradients[0]


def doubled(x: Tensor) -> Tensor:
    if has_torch_function((x,)):
        return handle_torch_function(doubled, (x,), x)
    return Doubling.apply(x)  # type: ignore[return-value]


class Doubled(nn.Module):
    def __init__(self, overridable: bool) -> None:
        super().__init__()
        self.first, self.last, self.overridable = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), overridable

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(doubled(x) if self.overridable else Doubling.apply(x))


@pytest.mark.parametrize("overridable", [False, True])
def test_custom_function_is_one_op_with_its_own_backward_and_one_name_in_every_process(overridable: bool) -> None:
    torch.manual_seed(0)
    model, x = Doubled(overridable), torch.randn(4, WIDTH)
    recorded = trace(model, x, square)
    (found,) = (op for op in recorded.graph.ops if "oubl" in op.target)
    assert str(id(Doubling)) not in found.name, "names are part of the plan, which all ranks must agree on"
    square(model(x), x).backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    LocalPipeline(recorded, model, even_starts(recorded.graph, 2)).step(x)
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())  # type: ignore[arg-type]
