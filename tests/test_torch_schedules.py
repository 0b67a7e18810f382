"""Torch's schedules beside ours: its orders are never better, and give the same gradients in both engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from merak_like.partitioner.schedules.action import chain
from merak_like.partitioner.schedules.auto.build import auto
from merak_like.partitioner.schedules.dualpipe_v import dualpipe_v
from merak_like.partitioner.schedules.grid import from_csv, to_csv
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.validate import validate
from merak_like.partitioner.schedules.zb_v import zb_v
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from tests.ranks import Call, results_of, selected_calls
from tests.torch_peer import TORCHS, torchs

COSTS = [(1, 1, 1, 0), (1, 1, 1, 0.2), (3, 2.5, 2, 0.1), (1, 1.2, 0.7, 0.05), (2, 4, 0, 0.1)]


@pytest.mark.parametrize(
    ("name", "build", "ranks", "micro_batches", "chunks"),
    [
        *(("Interleaved1F1B", interleaved, p, m, v) for p, m, v in ((2, 4, 2), (4, 8, 2), (4, 8, 3), (8, 16, 2))),
        ("Interleaved1F1B", interleaved, 4, 6, 2),
        *(("ZBVZeroBubble", zb_v, p, m, 2) for p, m in ((2, 2), (2, 6), (4, 4), (4, 12), (8, 20))),
        *(("DualPipeV", dualpipe_v, p, m, 2) for p, m in ((2, 4), (2, 7), (4, 8), (4, 12), (8, 20))),
    ],
)
def test_never_fuller_and_never_slower_than_torchs_own(
    name: str, build, ranks: int, micro_batches: int, chunks: int
) -> None:
    theirs = torchs(name, ranks, micro_batches, chunks)
    ours = build(ranks, micro_batches, chunks) if build is interleaved else build(ranks, micro_batches)
    assert ours.stage_rank == theirs.stage_rank
    validate(theirs)
    assert from_csv(to_csv(ours)) == ours
    for f, b, w, hop in COSTS:
        cost = StageCosts(f / chunks, b / chunks, weight=w / chunks, activation_bytes=1)
        hops = dict[tuple[int, int], float]()
        hops.update((edge, hop) for edge in chain(ours.stages))
        costs = Costs((cost,) * ours.stages, hops)
        mine, other = simulate(ours, costs), simulate(theirs, costs)
        assert all(a <= b for a, b in zip(mine.rank_peak_bytes, other.rank_peak_bytes, strict=True))
        if mine.rank_peak_bytes == other.rank_peak_bytes:
            assert mine.makespan <= other.makespan * (1 + 1e-9)
        else:  # m is no multiple of p: torch makes larger groups, which hold more; ours makes the last one short
            assert micro_batches % ranks
            found = auto(costs, micro_batches, stage_rank=theirs.stage_rank, live=other.rank_peak_bytes)
            assert found.makespan <= other.makespan * (1 + 1e-9)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank."""
    return results_of(selected_calls(request))


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case",
    [Call(name, "tests.torch_peer:beside_torch", {"dp": 1, "pp": 2, "name": name}) for name in TORCHS],
    ids=lambda case: case.name,
)
def test_torchs_orders_give_the_same_gradients_in_both_engines(
    case: Call, results: Callable[[Call], list[Any]]
) -> None:
    assert max(results(case)) <= 1e-12
