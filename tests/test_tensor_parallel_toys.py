"""Sharding derived for small modules, each with one thing that is hard to follow; the numbers agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel import Axis, Derived, Segments, derive
from merak_like.partitioner.tensor_parallel.layout import is_sharded
from merak_like.partitioner.tensor_parallel.probe import probe
from merak_like.partitioner.tensor_parallel.rules import RULES
from merak_like.partitioner.tensor_parallel.rules.elementwise import elementwise
from merak_like.partitioner.tracer.fine import steps
from tests.tensor_parallel_models import Subject, sharded, subject
from tests.zoo.case import mean_square

EXACT = 1e-8


class Toy(nn.Module):
    """Two alike blocks of a function over a width of 8."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def toy(block: Callable[[], nn.Module], x: Tensor | None = None, tp: int = 2) -> Subject:
    torch.manual_seed(0)
    batch = {"x": torch.randn(2, 3, 8) if x is None else x}
    return subject(Toy(block), batch, tp, lambda output, _: mean_square(output))


class Mlp(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(8, width), nn.Linear(width, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


def test_an_operation_without_a_rule_is_counted_and_pins() -> None:
    made = toy(lambda: Mlp(torch.sinc))
    assert made.derived.blocks[0].unknown == {"sinc": 1}
    assert made.derived.share == 0.0
    assert "sinc has no rule" in made.derived.blocks[0].whole["blocks.0.up.weight"]
    assert made.probe().worst < EXACT


def put(x: Tensor) -> Tensor:
    x = x.clone()
    x[True] = x * 2
    return x


@pytest.mark.parametrize("function", [lambda x: x[True].squeeze(0), put])
def test_an_index_that_cannot_be_followed_keeps_what_it_meets_whole(function: Callable[[Tensor], Tensor]) -> None:
    made = toy(lambda: Mlp(function))
    assert made.derived.share == 0.0
    assert "it is indexed by True" in made.derived.blocks[0].whole["blocks.0.up.weight"]
    assert made.probe().worst < EXACT


def test_a_row_more_in_the_table_is_all_it_takes() -> None:
    made = toy(lambda: Mlp(torch.sinc))
    rules = {**RULES, "sinc": elementwise}
    derived = derive(made.trace.graph, steps(made.trace), 2, rules=rules)
    assert derived.share == 1.0
    assert probe(made.model, made.trace, derived, made.batch).worst < EXACT


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Centered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(-1, keepdim=True)


def test_a_custom_function_is_asked_whether_it_works_element_by_element() -> None:
    one, other = toy(lambda: Mlp(lambda x: Cube.apply(x))), toy(lambda: Mlp(lambda x: Centered.apply(x)))
    assert (one.derived.share, one.derived.blocks[0].unknown) == (1.0, {})
    assert (other.derived.share, other.derived.blocks[0].unknown) == (0.0, {"Centered": 1})
    assert max(one.probe().worst, other.probe().worst) < EXACT


def test_a_width_that_does_not_divide_stays_whole_and_says_so() -> None:
    made = toy(lambda: Mlp(torch.relu, width=9))
    assert made.derived.share == 0.0
    assert "9 does not divide by 2" in made.derived.blocks[0].whole["blocks.0.up.weight"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)
        self.deep, self.down = nn.Conv1d(16, 16, 3, padding=1, groups=16), nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.deep(self.norm(self.up(x)).relu()))


def test_channels_of_convolutions_are_separable() -> None:
    made = toy(Convolutions, torch.randn(2, 8, 5))
    assert sharded(made.derived.blocks[0])["deep.weight"] == 0
    assert made.derived.blocks[0].weights["blocks.0.norm.running_mean"] == ((Axis(16, 2),),)
    assert made.derived.share == 1.0
    assert made.probe().worst < EXACT


class Joined(nn.Module):
    """Half of what is summed over could be sharded, the other half could not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side, self.down = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([self.up(x).relu(), self.side(x).softmax(-1)], -1))


def test_a_sum_over_a_half_sharded_row_is_refused() -> None:
    made = toy(Joined)
    assert made.derived.share == 0.0
    assert made.probe().worst < EXACT


class FewKeys(nn.Module):
    """Multi-query attention: one head of keys and values for four of queries, all in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 12), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([8, 2, 2], -1)
        q = q.view(*x.shape[:2], 4, 2).transpose(1, 2)
        scores = (q @ k.unsqueeze(1).mT).softmax(-1)
        return self.out((scores @ v.unsqueeze(1)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tp", [2, 4])
def test_the_one_head_of_keys_is_on_every_rank(tp: int) -> None:
    made = toy(FewKeys, tp=tp)
    ((rows, *_), _) = made.derived.blocks[0].weights["blocks.0.qkv.weight"]
    assert isinstance(rows, Segments)
    assert [is_sharded(part) for part in rows.parts] == [True, False, False]
    assert made.probe().worst < EXACT


class Written(nn.Module):
    """Results are written into a buffer made in the forward, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        out = torch.zeros_like(y)
        out[:, 1:] = y[:, :-1]
        return self.down(out)


def test_a_buffer_that_is_written_into_has_the_axes_of_what_is_written() -> None:
    made = toy(Written)
    assert made.derived.share == 1.0
    assert made.probe().worst < EXACT


class Masked(nn.Module):
    """Some elements of a sharded width are set to a number in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) * 2
        y[y.detach() > 0.5] = 0.25
        return self.down(y)


def test_a_mask_in_an_assignment_has_the_axes_of_what_it_masks() -> None:
    made = toy(Masked)
    assert made.derived.share == 1.0
    assert made.probe().worst < EXACT


class Shared(nn.Module):
    """One weight used forwards in one block and backwards in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.blocks = nn.Parameter(torch.randn(8, 8)), nn.ModuleList([Mlp(torch.relu), Mlp(torch.relu)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.blocks[0](x), self.weight)
        return self.blocks[1](x @ self.weight)


def test_a_weight_shared_by_units_lies_one_way_or_whole() -> None:
    torch.manual_seed(0)
    made = subject(Shared(), {"x": torch.randn(2, 3, 8)}, 2, lambda output, _: mean_square(output))
    assert made.derived.share == 1.0
    assert made.probe().worst < EXACT


def test_a_group_of_no_ranks_is_refused() -> None:
    made = toy(lambda: Mlp(torch.relu))
    with pytest.raises(ValueError, match="tp = 0 is no number of ranks"):
        derive(made.trace.graph, steps(made.trace), 0)


def test_one_rank_needs_nothing() -> None:
    made = toy(lambda: Mlp(torch.relu), tp=1)
    assert isinstance(made.derived, Derived)
    assert not made.derived.weights
    assert sum(block.forward_bytes + block.backward_bytes for block in made.derived.blocks) == 0
