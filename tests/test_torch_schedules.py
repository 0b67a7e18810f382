"""Our interleaved, ZB-V and DualPipeV orders beside torch's own: never fuller, and never slower in the same memory."""

from __future__ import annotations

import pytest

from merak_like.partitioner.schedules.action import Schedule, chain
from merak_like.partitioner.schedules.auto.build import auto
from merak_like.partitioner.schedules.dualpipe_v import dualpipe_v
from merak_like.partitioner.schedules.grid import from_csv, to_csv
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.validate import validate
from merak_like.partitioner.schedules.zb_v import zb_v
from merak_like.partitioner.simulator import Costs, StageCosts, simulate

COSTS = [(1, 1, 1, 0), (1, 1, 1, 0.2), (3, 2.5, 2, 0.1), (1, 1.2, 0.7, 0.05), (2, 4, 0, 0.1)]


def torchs(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Torch's order, computed without processes; pairs that it overlaps are taken one after the other."""
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    rows = visualizer.get_schedule_ops(name, ranks, micro_batches, chunks)

    def cells(actions) -> list[str]:
        flat = [each for action in actions if action is not None for each in (action.sub_actions or (action,))]
        return [str(each) for each in flat]

    return from_csv("".join(",".join(cells(actions)) + "\n" for actions in rows))


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
