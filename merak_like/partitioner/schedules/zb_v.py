"""ZB-V: the memory of 1F1B and no holes, with two stages per rank in a V (Qi et al., arXiv 2401.10241, section 6)."""

from merak_like.partitioner.schedules.action import Order, Schedule
from merak_like.partitioner.schedules.passes import first_micro_batches
from merak_like.partitioner.schedules.v_shape import v_order, v_stage_rank


def zb_v(ranks: int, micro_batches: int) -> Schedule:
    """Return the schedule whose way up follows its way down at once; p = 2 ranks, stages 0 to 3, m = 3:

    rank 0  F0.0 F1.0 F2.0 F0.3 B0.3 W0.3 F1.3 B1.3 W1.3 B0.0 W0.0 F2.3 B2.3 W2.3 B1.0 W1.0 B2.0 W2.0
    rank 1  ..   F0.1 F0.2 F1.1 F1.2 B0.2 W0.2 F2.1 B0.1 W0.1 F2.2 B1.2 W1.2 B1.1 B2.2 B2.1 W1.1 W2.2 W2.1

    time: m * (f + b + w) + (p - 1) * f / 2 where f = b = w are those of a rank and m >= 2 p - 1
    peak: 2 p alive on a rank, each in one of its two stages: as much as p micro-batches in 1F1B

    Fewer micro-batches than 2 p - 1 leave holes.
    """
    padded = max(micro_batches, 2 * ranks - 1)
    orders = tuple(_order(rank, ranks, padded) for rank in range(ranks))
    return first_micro_batches(Schedule(2 * ranks, padded, orders, v_stage_rank(ranks)), micro_batches)


def _order(rank: int, ranks: int, micro_batches: int) -> Order:
    after = ranks - 1 - rank
    program = [
        (2 * after + 1, "Fd"),
        (rank, "Fu Fd"),
        (after + 1, "Fu Iu Wu"),
        (micro_batches - ranks - after, "Fd Id Wd Fu Iu Wu"),
        (after, "Id Wd Fu Iu Wu"),
        (rank, "Id Iu"),
        (after + 1, "Id Wd"),
        (rank, "Wu"),
        (rank, "Wd"),
    ]
    return v_order(rank, ranks, program)
