"""The sequence-parallel form equals plain PyTorch: in lockstep in one process, and trained in real processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.runtime.batches import rows
from tests.lockstep import Ran, in_lockstep, kept_by_plain, plain
from tests.ranks import Call, call, results_of, selected_calls
from tests.training import Subject, in_one_precision, worst


@lru_cache(maxsize=2)
def model(name: str) -> Subject:
    one = in_one_precision(name)
    one.model.train()
    return one


def equal(one: Subject, batch: Any, tp: int = 2, **more: Any) -> Ran:
    """Run it; losses and gradients are those of one process."""
    loss, gradients = plain(one, batch)
    ran = in_lockstep(one, batch, tp, **more)
    assert max(abs(each - loss) for each in ran.losses) <= 1e-10
    assert worst(ran.gradients, gradients)[0] <= 1e-10
    return ran


@pytest.mark.parametrize("name", ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "bert"))])
def test_rows_are_scattered_and_gathered_and_nothing_is_summed_whole(name: str) -> None:
    code = equal(model(name), model(name).batch(2)).code[0].split()
    assert code.count("reduce_scatter") >= 9
    assert code.count("gather_enter") >= 9
    assert "enter" not in code
    assert code.count("reduce") == (1 if name == "t5" else 0), "a table of positions' biases is summed whole"


@pytest.mark.parametrize(
    ("name", "tp", "shares"),
    [("gpt2", 2, 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("gpt2", 4, 1), ("llama", 2, 1)))],
)
def test_a_rank_keeps_its_part_of_all_that_one_process_keeps(name: str, tp: int, shares: int) -> None:
    """The paper's 34/t of 34 (section 4.2.2): what the products read is kept as rows, and gathered again."""
    one = in_one_precision(name, dropout=False)
    batch = one.batch(2, 16)
    kept = in_lockstep(one, batch, tp, shares=shares, fuse=False).kept
    assert max(kept) == min(kept)
    # masks, positions and the like, which all ranks have, are the rest: 2% and 1% of what one process keeps here
    assert 1 / tp <= kept[0] / kept_by_plain(one, batch) <= 1 / tp + 0.025


@pytest.mark.parametrize(
    "name",
    ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "t5", "mixtral"))],
)
def test_shares_of_a_micro_batch_run_on_rows(name: str) -> None:
    """Of two sizes, none of them one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a stage that runs its micro-batches whole says so
        ran = equal(model(name), model(name).batch(5), shares=2)
    assert "reduce_scatter" in ran.code[0]
    whole = in_lockstep(model(name), model(name).batch(5), 2).calls[0]
    assert 1.75 * whole <= ran.calls[0] <= 2 * whole, "each share has collectives of its own; some are of both"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_shares_are_computed_again_and_weights_wait(name: str) -> None:
    assert "reduce_scatter" in equal(model(name), model(name).batch(7), shares=3, thrifty=True).code[0]


def test_rows_that_are_samples_run_whole() -> None:
    one = model("llama")
    with pytest.warns(UserWarning, match="are some of its samples"):
        assert "reduce_scatter" in equal(one, one.batch(4, 13), shares=2).code[0]


def test_rows_are_computed_again_and_weights_wait() -> None:
    """On more ranks than there are key-value heads."""
    one = model("llama")
    assert "reduce_scatter" in equal(one, one.batch(1, 16), tp=4, thrifty=True).code[0]


@pytest.mark.parametrize(("planned", "then"), [((2, 14), (3, 13)), ((3, 13), (2, 14)), ((2, 14), (2, 13))])
def test_a_shape_that_does_not_divide_runs_in_the_plain_form(planned: tuple[int, int], then: tuple[int, int]) -> None:
    """Which gradients are summed over ranks once a step was decided for another shape, and stays so."""
    one = model("llama")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code = equal(one, one.batch(*then), planned=one.batch(*planned)).code[0].split()
    said = [str(each.message) for each in told if "divide no rows" in str(each.message)]
    assert len(said) == (then == (3, 13))
    assert ("reduce_scatter" in code) == (then != (3, 13))


class Residuals(nn.Module):
    """Two layers of what is between the products in some models."""

    def __init__(self, between: Callable[[Residuals, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.table = nn.Embedding(16, 8)
        self.up = nn.ModuleList([nn.Linear(8, 32) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(32, 8) for _ in range(2)])
        self.norm, self.gate, self.place = (
            nn.LayerNorm(8),
            nn.Parameter(torch.ones(8)),
            nn.Parameter(torch.ones(1, 8, 8)),
        )
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.table(x)
        for up, down in zip(self.up, self.down, strict=True):
            h = self.between(self, h, down(F.gelu(up(h))))
        return F.mse_loss(h, labels)


def in_place(_: Residuals, h: Tensor, y: Tensor) -> Tensor:
    y += h
    return y.mul_(2.0)


def through_a_view(_: Residuals, h: Tensor, y: Tensor) -> Tensor:
    flat = y.view(-1, 8)
    y[:, 0] = 0.0  # one place of the sequence: not row by row, and ``flat`` must see it
    return flat.view_as(h) + h


def over_rows(m: Residuals, h: Tensor, y: Tensor) -> Tensor:
    return h + y - y.mean(1, keepdim=True) + F.linear(y.transpose(1, 2), m.mix.weight[:, : h.shape[1]]).mean()


def shifted(_: Residuals, h: Tensor, y: Tensor) -> Tensor:
    return h + torch.cat((y[:, 1:], y[:, :1]), 1)


def with_weights(m: Residuals, h: Tensor, y: Tensor) -> Tensor:
    return m.norm(h + F.dropout(y * m.gate, 0.3)) + m.place[:, : h.shape[1]]


def sample_by_sample(m: Residuals, h: Tensor, y: Tensor) -> Tensor:
    a, b = (h + y).transpose(0, 1).chunk(2, -1)
    return torch.cat((b.sigmoid(), F.dropout(a, 0.5)), -1).transpose(0, 1)


def twice(m: Residuals, h: Tensor, y: Tensor) -> Tensor:
    """A weight is read by rows and whole."""
    return h + y * m.gate + (h.cumsum(1) * m.gate)


def attention(m: Residuals, h: Tensor, y: Tensor) -> Tensor:
    """Two operands with rows that do not meet."""
    return h + (y @ h.transpose(1, 2)).softmax(-1) @ y


BETWEEN = (in_place, through_a_view, over_rows, shifted, with_weights, sample_by_sample, twice, attention)


@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
@pytest.mark.parametrize("size", [(2, 8), (1, 4)], ids=str)
def test_whatever_lies_between_the_products(between: Any, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randint(0, 16, size), "labels": torch.randn(*size, 8, dtype=torch.float64)}
    one = Subject(Residuals(between).double().train(), lambda: batch, lambda out, _: out, rows)
    assert "reduce_scatter" in equal(one, batch, tp=2 * size[0]).code[0]


def test_a_single_rank_has_no_rows_to_divide() -> None:
    with pytest.raises(ValueError, match="but tp is 1"):
        auto_parallel(nn.Linear(2, 2), example={"input": torch.ones(8, 2)}, sequence_parallel=True)


# --- trained in real processes ------------------------------------------------------------------------------------

MODELS = "llama gpt2 bert opt t5 bloom falcon phi3 gemma2 mixtral qwen3 vit whisper".split()
LAYOUTS = ((1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 2))
SIZES = {"t5": (19, 16, 12), "whisper": (19, 16, 32, 12), "vit": (32,)}
"""Lengths that 4 ranks divide; the 17 places of a picture they do not, so there samples are divided."""
USUAL = "gpt2 mixtral qwen3 vit".split()
"""Run by default."""


def cells() -> Iterator[Any]:
    """Some models once; test_tensor_parallel_matrix.py has the others."""
    for row, name in enumerate(MODELS):
        if name in USUAL:
            layout = LAYOUTS[row % len(LAYOUTS)]
            schedule, recompute = ("zb-h1", "full") if layout[1] > 1 else ("1f1b", "none")
            one = call(
                "sharded", *layout, name=name, schedule=schedule, recompute=recompute,
                size=SIZES.get(name, (19, 16)), sequence_parallel=True,
            )._replace(function="tests.sharded:sharded")  # fmt: skip
            yield pytest.param(one, id=one.name)


def in_shares() -> Iterator[Any]:
    """Rows in two shares, one's collectives under the other's compute."""
    for row, name in enumerate(MODELS):
        layout, schedule, recompute = (
            ((1, 1, 2), "1f1b", "none"), ((1, 2, 2), "zb-h1", "full"), ((2, 1, 2), "1f1b", "none"),
        )[row % 3]  # fmt: skip
        one = call(
            "sharded", *layout, name=name, schedule=schedule, recompute=recompute, size=SIZES.get(name, (19, 16)),
            sequence_parallel=True, tp_shares=2,
        )._replace(function="tests.sharded:sharded")  # fmt: skip
        yield pytest.param(one, id=one.name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank. The job it is part of runs when its first result is asked for."""
    return results_of(selected_calls(request), together=24)  # more than there are by default


@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", list(cells()))
def test_training_by_rows_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", list(in_shares()))
def test_training_by_rows_in_shares_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10
