"""GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965)."""

from merak_like.partitioner.schedules.action import Action, Kind, Schedule


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """Return the schedule that keeps every micro-batch alive; p = 3, m = 4:

    stage 0  F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3      peak: micro_batches alive, on every stage
    stage 1  .. F0 F1 F2 F3 .. .. B0 B1 B2 B3         time: (m + p - 1) * (f + b) for equal stages
    stage 2  .. .. F0 F1 F2 F3 B0 B1 B2 B3
    """
    orders = tuple(
        tuple(Action(kind, i, stage) for kind in (Kind.F, Kind.B) for i in range(micro_batches))
        for stage in range(stages)
    )
    return Schedule(stages, micro_batches, orders, stage_rank=tuple(range(stages)))
