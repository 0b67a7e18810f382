"""In which numbers a model computes, and in which it learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from merak_like._compat import tree_map
from merak_like.partitioner.states import ADAMW, STATES, StateBytes
from merak_like.runtime.finite import Guard, LossScale


@dataclass(frozen=True)
class Precision:
    """Parameters and activations in ``compute``; sums of gradients, and the optimizer, in full precision.

    Full precision is float32, or the parameter's own dtype where that is wider. Without ``compute`` all is as the model
    has it, and autocast is yours to switch on around the step.
    """

    compute: torch.dtype | None = None
    loss_scale: float | None = None
    """What the loss is first multiplied with, so that small gradients are not lost; None: 1, always."""
    interval: int | None = 2000
    """Good steps after which that is doubled; None: it never changes."""
    patience: int = 1
    """Overflows until it is halved."""

    def dtypes(self, parameter: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """In which dtype a parameter computes, and in which it is summed and updated."""
        if self.compute is None or not parameter.is_floating_point():
            return parameter.dtype, parameter.dtype
        return self.compute, torch.promote_types(parameter.dtype, torch.float32)

    def states(self, *, elsewhere: bool = False) -> StateBytes:
        """What training keeps for each parameter, with the most usual optimizer; ``elsewhere``: in another memory."""
        lowered = self.compute in (torch.bfloat16, torch.float16)
        kept = STATES["adamw-megatron"] if lowered else ADAMW  # sums, weights and two moments in float32
        return replace(kept, optimizer=0.0) if elsewhere else kept

    def inputs(self, batch: Any) -> Any:
        """The batch with its floating tensors as the model computes."""
        if self.compute is None:
            return batch
        lowered = lambda t: t.to(self.compute) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
        return tree_map(lowered, batch)

    def guard(self, limit: int) -> Guard:
        """What becomes of a step that is not finite. A loss scale finds its size by overflowing: it may skip more."""
        if self.loss_scale is None:
            return Guard(limit)
        return Guard(max(limit, OVERFLOWS), LossScale(self.loss_scale, self.interval, self.patience))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model as it will compute, for a trace; at the end it is as it was."""
        before = [(t, t.data) for t in _lowered(model)] if self.compute is not None else []
        try:
            for tensor, data in before:
                tensor.data = data.to(self.compute)
            yield
        finally:
            for tensor, data in before:
                tensor.data = data

    def lower(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Let all but what this rank trains compute in this precision: frozen parameters, saved buffers, other stages'.

        What is on other ranks counts too: a trace of new shapes runs through the whole model.
        """
        if self.compute is not None:
            own = {id(parameter) for parameter in trained}
            for tensor in _lowered(model):
                if id(tensor) not in own:
                    tensor.data = tensor.data.to(self.compute)


OVERFLOWS = 30
"""Steps in a row that a loss scale may overflow: halving 2^16 so often leaves less than a normal float16."""

PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16, loss_scale=2.0**16),
}


def precision_of(asked: str | Precision | None) -> Precision:
    """The precision of that name. Raises ValueError for an unknown one."""
    if asked is None:
        return Precision()
    if isinstance(asked, str):
        if asked not in PRECISIONS:
            raise ValueError(
                f"precision={asked!r} is none of {', '.join(PRECISIONS)}: leave it out for the model's own"
            )
        return PRECISIONS[asked]
    return asked


def _lowered(model: nn.Module) -> list[Tensor]:
    """Parameters and saved buffers of floating point. Tables that are computed anew, as rotary ones, stay exact."""
    saved = model.state_dict(keep_vars=True).values()
    return list({id(t): t for t in (*model.parameters(), *saved) if t.is_floating_point()}.values())
