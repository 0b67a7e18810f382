"""1F1B: as few micro-batches alive as a full pipeline needs (PipeDream-Flush, Narayanan et al., arXiv 2006.09503)."""

from merak_like.partitioner.schedules.action import Action, Kind, Order, Schedule


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """Return the schedule that runs each backward as soon as it can; p = 3, m = 4:

    stage 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3      peak: min(micro_batches, stages - stage) alive
    stage 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3         time: (m + p - 1) * (f + b) for equal stages
    stage 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3
    """
    orders = tuple(_order(stage, stages, micro_batches) for stage in range(stages))
    return Schedule(stages, micro_batches, orders, stage_rank=tuple(range(stages)))


def _order(stage: int, stages: int, micro_batches: int) -> Order:
    warm_up = min(micro_batches, stages - 1 - stage)
    actions = [Action(Kind.F, i, stage) for i in range(warm_up)]
    for i in range(warm_up, micro_batches):
        actions += [Action(Kind.F, i, stage), Action(Kind.B, i - warm_up, stage)]
    actions += [Action(Kind.B, i, stage) for i in range(micro_batches - warm_up, micro_batches)]
    return tuple(actions)
