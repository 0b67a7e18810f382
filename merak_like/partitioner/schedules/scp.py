"""Merak's ladder: 1F1B with recompute, step by step up to the shifted critical path (Lai et al., arXiv 2206.04959).

Four passes, each a function from schedule to schedule, and their sum. With p stages that take f, r = f and b = 2 f:

    1F1B that recomputes inside its backwards          m (f + r + b) + (p - 1) (f + r + b)     p = 4, m = 8:  44
    1  recompute_in_cool_down                          m (f + r + b) + (p - 1) (f + b)                        41
    2  last_stage_keeps                                m (f + r + b) + (p - 2) (f + b) + b                    40
    3  recompute_early                                 m (f + r + b) + (p - 2) (f + b) + b - r                39
    4  shift_critical_path                             m (f + r + b) + (p - 2) (f + b)                        38

A recompute needs no gradient, so an R of its own can run in the wait for one; inside B it comes after the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise

from merak_like.partitioner.schedules.action import Action, Kind, Order, Schedule
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b


def scp(stages: int, micro_batches: int, recomputes: Collection[int] | None = None) -> Schedule:
    """Return 1F1B with the shifted critical path; p = 4, m = 5, every stage but the last recomputes:

    stage 0  F0 F1 F2 F3 .. .. .. .. B0 F4 B1 R2 B2 R3 B3 R4 B4
    stage 1  .. F0 F1 F2 R0 .. .. B0 F3 B1 F4 B2 R3 B3 R4 B4
    stage 2  .. .. F0 F1 F2 R0 B0 R1 B1 F3 B2 F4 B3 R4 B4
    stage 3  .. .. .. F0 B0 F1 B1 F2 B2 .. F3 B3 F4 B4

    peak: as 1F1B, and one more on the second-to-last stage
    """
    schedule = recompute(one_f_one_b(stages, micro_batches), recomputes)
    for step in LADDER.values():
        schedule = step(schedule)
    return schedule


def recompute(schedule: Schedule, stages: Collection[int] | None = None) -> Schedule:
    """Let these stages (all of them by default) recompute, inside their backwards."""
    return replace(schedule, recomputes=frozenset(range(schedule.stages) if stages is None else stages))


def recompute_apart(schedule: Schedule) -> Schedule:
    """Give every recompute of the schedule an R right before its B, so that it hides in the wait for the gradient."""
    orders = tuple(_with_recompute(schedule, order, lambda _: True) for order in schedule.orders)
    return replace(schedule, orders=orders)


def recompute_in_cool_down(schedule: Schedule) -> Schedule:
    """Pass 1: a backward that follows a backward waits for its gradient, so its recompute goes before the wait."""

    def hidden(order: Order) -> Order:
        computed = [action for action in order if action.kind in (Kind.F, Kind.B)]
        after_b = {b for a, b in pairwise(computed) if a.kind is Kind.B}
        return _with_recompute(schedule, order, after_b.__contains__)

    return replace(schedule, orders=tuple(map(hidden, schedule.orders)))


def last_stage_keeps(schedule: Schedule) -> Schedule:
    """Pass 2: the last stage holds one micro-batch, so it need not recompute."""
    last = schedule.stages - 1
    orders = tuple(tuple(a for a in order if a.kind is not Kind.R or a.stage != last) for order in schedule.orders)
    return replace(schedule, orders=orders, recomputes=schedule.recomputes - {last})


def recompute_early(schedule: Schedule) -> Schedule:
    """Pass 3: the second-to-last stage, now the critical one, recomputes its first micro-batch while it fills."""
    return _early(schedule, schedule.stages - 2, 1)


def shift_critical_path(schedule: Schedule) -> Schedule:
    """Pass 4: the second-to-last stage runs its third forward before its first backward, and never waits again.

    F0 F1 R0 B0 F2 B1 becomes F0 F1 F2 R0 B0 R1 B1. While the last stage runs F0 and B0, these are F1, F2 and R0:
    as long where b = f + r. The stage before it recomputes its first micro-batch early, so that it
    takes the gradient at once.
    """
    stage = schedule.stages - 2
    if stage < 0:
        return schedule
    third = Action(Kind.F, 2, stage)
    orders = list(schedule.orders)
    order = orders[schedule.stage_rank[stage]]
    if third in order:
        second = order.index(Action(Kind.F, 1, stage))
        rest = tuple(action for action in order[second + 1 :] if action != third)
        orders[schedule.stage_rank[stage]] = (*order[: second + 1], third, *rest)
    return _early(_early(replace(schedule, orders=tuple(orders)), stage, 2), stage - 1, 1)


#: The four steps, in order; each name is that of the schedule reached with it.
LADDER: dict[str, Callable[[Schedule], Schedule]] = {
    "hidden-recompute": recompute_in_cool_down,
    "last-keeps": last_stage_keeps,
    "early-recompute": recompute_early,
    "scp": shift_critical_path,
}


def rung(name: str) -> Callable[[int, int], Schedule]:
    """Return the builder of 1F1B with the steps of the ladder up to this one."""
    steps = list(LADDER)[: list(LADDER).index(name) + 1]

    def build(stages: int, micro_batches: int) -> Schedule:
        schedule = recompute(one_f_one_b(stages, micro_batches))
        for step in steps:
            schedule = LADDER[step](schedule)
        return schedule

    return build


def _early(schedule: Schedule, stage: int, count: int) -> Schedule:
    """Give the first recomputes of a stage an R of their own."""

    def first(action: Action) -> bool:
        return action.stage == stage and action.micro_batch < count

    return replace(schedule, orders=tuple(_with_recompute(schedule, order, first) for order in schedule.orders))


def _with_recompute(schedule: Schedule, order: Order, chosen: Callable[[Action], bool]) -> Order:
    """Return the order with an R before each chosen B that recomputes inside."""
    apart = {action for action in order if action.kind is Kind.R}
    actions: list[Action] = []
    for action in order:
        again = action._replace(kind=Kind.R)
        if action.kind is Kind.B and action.stage in schedule.recomputes and again not in apart and chosen(action):
            actions.append(again)
        actions.append(action)
    return tuple(actions)
