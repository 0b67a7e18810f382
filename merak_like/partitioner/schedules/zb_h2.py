"""ZB-H2: twice the memory of 1F1B, and no rank ever waits (Qi et al., arXiv 2401.10241, figure 3)."""

from merak_like.partitioner.schedules.action import Schedule
from merak_like.partitioner.schedules.zb_h1 import delayed


def zb_h2(stages: int, micro_batches: int) -> Schedule:
    """Return the schedule that starts more micro-batches, so that filling needs no holes either; p = 3, m = 6:

    stage 0  F0 F1 F2 F3 F4 B0 W0 F5 B1 W1 B2 W2 B3 W3 B4 W4 B5 W5
    stage 1  .. F0 F1 F2 B0 F3 B1 F4 B2 W0 F5 B3 W1 B4 W2 B5 W3 W4 W5
    stage 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 F5 B5 W1 W2 W3 W4 W5

    span: m * (f + b + w) + (p - 1) * max(0, f + b + 2 hops - 2 w) from a rank's first action to its last, for w <= f, b
    peak: min(m, 2 p - 1) alive on every stage

    It pays where a rank may begin the next step before the others have ended this one; else the last rank's start,
    (p - 1) * (f + hop), is a hole like any other, and ZB-V does better.
    """
    orders = tuple(delayed(s, micro_batches, warm_up=2 * (stages - 1 - s), put_off=2 * s) for s in range(stages))
    return Schedule(stages, micro_batches, orders, stage_rank=tuple(range(stages)))
