"""Interleaved 1F1B: every rank runs several stages, so that filling takes less (Narayanan et al., arXiv 2104.04473)."""

from merak_like.partitioner.schedules.action import Action, Kind, Order, Schedule
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.passes import first_micro_batches


def interleaved(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """Return the schedule of ranks that take turns, stage s on rank s mod ranks; p = 2 ranks of 2 stages, m = 4:

    rank 0  F0.0 F1.0 F0.2 F1.2 F2.0 B0.2 F3.0 B1.2 F2.2 B0.0 F3.2 B1.0 ..   B2.2 ..   B3.2 B2.0 B3.0
    rank 1  ..   F0.1 F1.1 F0.3 B0.3 F1.3 B1.3 F2.1 B0.1 F3.1 B1.1 F2.3 B2.3 F3.3 B3.3 B2.1 B3.1

    time: (m + (p - 1) / chunks) * (f + b), where f and b are those of a rank, for m a multiple of p
    peak: (p - 1 - rank) * 2 + (chunks - 1) * p + 1 alive on a rank, each in one of its stages

    Micro-batches go round in groups of p. For any other number the last group is short: it leaves holes, no deadlock.
    """
    if chunks < 1:
        raise ValueError(f"a rank needs at least one stage: got {chunks} chunks")
    if chunks == 1:
        return one_f_one_b(ranks, micro_batches)
    groups = -(-micro_batches // ranks) if ranks > 0 else 0
    stage_rank = tuple(range(ranks)) * chunks
    orders = tuple(_order(rank, ranks, groups, chunks) for rank in range(ranks))
    return first_micro_batches(Schedule(ranks * chunks, groups * ranks, orders, stage_rank), micro_batches)


def _order(rank: int, ranks: int, groups: int, chunks: int) -> Order:
    turns = [(group * ranks + i, chunk) for group in range(groups) for chunk in range(chunks) for i in range(ranks)]
    forwards = [Action(Kind.F, i, chunk * ranks + rank) for i, chunk in turns]
    backwards = [Action(Kind.B, i, (chunks - 1 - chunk) * ranks + rank) for i, chunk in turns]
    warm_up = min((ranks - 1 - rank) * 2 + (chunks - 1) * ranks, len(forwards))
    steady = [each for pair in zip(forwards[warm_up:], backwards, strict=False) for each in pair]
    return (*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :])
