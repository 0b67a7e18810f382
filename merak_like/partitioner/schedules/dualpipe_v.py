"""DualPipeV: forwards and backwards in pairs that may overlap, two stages per rank in a V.

DeepSeek's DualPipe (arXiv 2412.19437) folded in half as Qi et al. proposed ("cut-in-half"); here a pair runs one after
the other, the forward first, and the weight gradients are put off only where they fill a hole.
"""

from merak_like.partitioner.schedules.action import Order, Schedule
from merak_like.partitioner.schedules.passes import first_micro_batches
from merak_like.partitioner.schedules.v_shape import v_order, v_stage_rank


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """Return the schedule of DualPipe with each half of a pair of ranks on one; p = 2 ranks, stages 0 to 3, m = 4:

    rank 0  F0.0 F1.0 F2.0 F0.3 B0.3 W0.3 F1.3 F3.0 B1.3 F2.3 B0.0 B2.3 F3.3 B1.0 B3.3 B2.0 W2.0 B3.0 W3.0
    rank 1  ..   F0.1 F0.2 F1.1 F1.2 F2.1 B0.2 F2.2 B0.1 F3.1 B1.2 F3.2 B1.1 B2.2 B2.1 B3.2 B3.1 W3.2 W3.1

    peak: 2 p + 1 alive on a rank, each in one of its two stages

    Fewer micro-batches than 2 p leave holes.
    """
    padded = max(micro_batches, 2 * ranks)
    orders = tuple(_order(rank, ranks, padded) for rank in range(ranks))
    return first_micro_batches(Schedule(2 * ranks, padded, orders, v_stage_rank(ranks)), micro_batches)


def _order(rank: int, ranks: int, micro_batches: int) -> Order:
    after = ranks - 1 - rank
    program = [
        (2 * after, "Fd"),
        (rank + 1, "Fd Fu"),
        (after, "Iu W Fu"),
        (micro_batches - ranks - after, "Fd Bu Fu Bd"),
        (after, "Bu Fu Bd"),
        ((rank + 1) // 2, "Bu Bd"),
        ((rank + 1) % 2, "Bu Id"),
        ((rank + 1) // 2, "Iu Id"),
        (after, "W Id"),
        (rank + 1, "W"),
    ]
    return v_order(rank, ranks, program)
