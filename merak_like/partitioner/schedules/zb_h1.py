"""ZB-H1: 1F1B whose weight gradients fill the holes, in the same memory (Qi et al., arXiv 2401.10241, figure 2)."""

from merak_like.partitioner.schedules.action import Action, Kind, Order, Schedule


def zb_h1(stages: int, micro_batches: int) -> Schedule:
    """Return the schedule that puts off as many weight gradients as 1F1B leaves memory for; p = 3, m = 4:

    stage 0  F0 F1 F2 .. .. B0 W0 F3 B1 W1 B2 W2 B3 W3
    stage 1  .. F0 F1 .. B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    stage 2  .. .. F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

    time: m * (f + b + w) + (p - 1) * (f + b - w), plus 4 * (p - 1) hops of up to w / 2
    peak: min(m, p) alive on every stage, stage s puts off s
    """
    orders = tuple(delayed(s, micro_batches, warm_up=stages - 1 - s, put_off=s) for s in range(stages))
    return Schedule(stages, micro_batches, orders, stage_rank=tuple(range(stages)))


def delayed(stage: int, micro_batches: int, *, warm_up: int, put_off: int) -> Order:
    """Return the order that warms up, then runs F, B and the W of `put_off` micro-batches ago, then what is left."""
    actions = [Action(Kind.F, i, stage) for i in range(min(warm_up, micro_batches))]
    for i in range(micro_batches):
        if i + warm_up < micro_batches:
            actions.append(Action(Kind.F, i + warm_up, stage))
        actions.append(Action(Kind.B, i, stage))
        if i >= put_off:
            actions.append(Action(Kind.W, i - put_off, stage))
    actions += [Action(Kind.W, i, stage) for i in range(max(0, micro_batches - put_off), micro_batches)]
    return tuple(actions)
