"""DeepSpeed's ZeRO-1 under our engine: the numbers of one process in every layout offered, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.spreading import Spreading, spreading_of
from tests import training
from tests.ranks import Call, results_of, selected_calls

there = pytest.mark.deepspeed
ranks = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(400), there]


def call(name: str, dp: int, pp: int, tp: int = 1, backend: str = "deepspeed", **more: Any) -> Call:
    """A layout and a model."""
    words = [name, backend, *(str(v) for v in more.values()), f"{dp}x{pp}x{tp}"]
    layout = {"dp": dp, "pp": pp, "tp": tp}
    return Call("-".join(words), "tests.spread:deepspeed", {"name": name, "backend": backend, **layout, **more})


EXACT = [
    call("llama", 2, 1),
    call("llama", 1, 2),
    call("gpt2", 2, 2),  # a weight on two stages
    call("gpt2", 2, 2, backend="deepspeed-offload"),
    call("gpt2", 2, 2, backend="deepspeed-offload", adam="cpu_adam"),
    call("llama", 2, 1, backend="deepspeed-offload"),
    call("gpt2", 2, 2, schedule="zb-h1"),
    call("falcon", 2, 1, tp=2),  # elements that both tensor-parallel ranks have
    call("llama", 2, 1, tp=2, sequence_parallel=True),
]
LOWERED = [
    Call(f"bf16-{backend}-2x2", "tests.spread:in_precision",
         {"name": "gpt2", "dp": 2, "pp": 2, "precision": "bf16", "zero": 1, "zero_backend": backend})
    for backend in ("deepspeed", "deepspeed-offload")
]  # fmt: skip


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank."""
    return results_of(selected_calls(request))


@pytest.mark.parametrize("case", [pytest.param(one, id=one.name, marks=ranks) for one in EXACT])
def test_training_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-5


@pytest.mark.parametrize("case", [pytest.param(one, id=one.name, marks=ranks) for one in LOWERED])
def test_low_precision_is_that_of_one_process(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 4e-2


REFUSED = [
    (0, "deepspeed", 2, "does zero=1 only, not zero=0 .*at level 0 it clips by the norm of one stage"),
    (2, "deepspeed", 2, r"not zero=2 .*wrong under a pipeline \(pp=2\)\): use zero=1 with it, or zero=2 without"),
    (2, "deepspeed-offload", 1, "not zero=2 .*its level 2 counts backwards by itself"),
    (3, "deepspeed", 1, "not zero=3 .*level 3 hangs"),
    (3, "own", 2, r"fully_shard.*not with pp=2, tp=1 but with dp=4, pp=1, tp=1; use zero=2 with pp"),
    (1, "fairscale", 1, "zero_backend='fairscale' is none of own, deepspeed, deepspeed-offload"),
]


@pytest.mark.parametrize(("zero", "backend", "pp", "match"), REFUSED)
def test_what_is_not_exact_is_refused(zero: int, backend: str, pp: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        spreading_of(zero, backend, Mesh(2, pp, 1))


def test_what_is_exact_is_understood() -> None:
    assert spreading_of(1, "deepspeed-offload", Mesh(2, 2, 2)) == Spreading(1, "deepspeed-offload")
    assert spreading_of(2, None, Mesh(2, 2, 2)) == Spreading(2, "own")
    assert not spreading_of(0, None, Mesh()).deepspeed


@there
@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("backend", ["deepspeed", "deepspeed-offload"])
def test_alone_it_is_as_ours(backend: str, precision: str | None) -> None:
    """One process: the masters begin with the weights before they are rounded, and end as with our own store."""
    one, ends = training.subject("gpt2", dtype=torch.float32), []
    for name in ("own", backend):
        engine = training.engine(
            one, one.batch(8), 1, 1, 4, zero=1, zero_backend=name, precision=precision,
            # AdamW makes steps of any gradient, of one that is rounding alone too: that of a key's bias is
            optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
        )  # fmt: skip
        losses = [engine.step(one.batch(8)).loss for _ in range(3)]
        targets = {slot.name: slot.target.detach().flatten().clone() for slot in engine._update.slots}
        engine.close()
        ends.append((losses, targets))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    assert training.worst(ends[1][1], ends[0][1])[0] <= 1e-6
