"""The fastest order of a small pipeline, by trying them all, for tests of what claims to find it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from math import inf

from merak_like.partitioner.schedules.action import Action, Kind, Schedule, chain
from merak_like.partitioner.simulator import Costs, simulate

Step = tuple[Kind, int]
State = tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]


def steps_of(costs: Costs) -> list[Step]:
    """What every micro-batch needs: F and B on every stage, R and W where they cost something."""
    steps: list[Step] = []
    for stage, cost in enumerate(costs.stages):
        there = {Kind.F: True, Kind.R: cost.recompute > 0, Kind.B: True, Kind.W: cost.weight > 0}
        steps += [(kind, stage) for kind, wanted in there.items() if wanted]
    return steps


def fastest(
    costs: Costs,
    micro_batches: int,
    stage_rank: Sequence[int],
    live: Sequence[int] | None = None,
    below: float = inf,
) -> float:
    """Seconds of the best order, or `below` if none is faster than that.

    Steps are added in every sequence their needs and the memory allow, in the order they start; of two sequences that
    have done the same steps, one that is nowhere later is enough. Micro-batches are alike, so they go in turn.
    """
    steps, ranks = steps_of(costs), max(stage_rank) + 1
    number = {step: at for at, step in enumerate(steps)}
    seconds = {Kind.F: "forward", Kind.R: "recompute", Kind.B: "backward", Kind.W: "weight"}
    cost = [getattr(costs.stages[stage], seconds[kind]) for kind, stage in steps]
    rank_of = [stage_rank[stage] for _, stage in steps]
    frees = (Kind.B, Kind.W)
    adds = [
        (kind is Kind.F) - (kind in frees and number.get((Kind.W, s), at) == at) for at, (kind, s) in enumerate(steps)
    ]

    def needs(step: Step) -> list[tuple[int, float]]:
        kind, stage = step
        own = {Kind.F: [], Kind.R: [Kind.F], Kind.B: [Kind.F, Kind.R], Kind.W: [Kind.B]}[kind]
        found = [(number[each, stage], 0.0) for each in own if (each, stage) in number]
        other = {Kind.F: stage - 1, Kind.B: stage + 1}.get(kind, -1)
        if 0 <= other < len(stage_rank):
            hop = costs.transfer.get((min(stage, other), max(stage, other)), 0.0)
            found.append((number[kind, other], 0.0 if stage_rank[other] == stage_rank[stage] else hop))
        return found

    before = [needs(step) for step in steps]
    after = [[at for at, found in enumerate(before) if of in dict(found)] for of in range(len(steps))]
    longest = max([0.0, *costs.transfer.values()])
    start_of_all = (
        (0.0,) * ranks,
        ((),) * len(steps),
    )  # each rank's free time; each step's ends
    level: dict[tuple[int, ...], list[State]] = {(0,) * len(steps): [start_of_all]}
    for _ in range(len(steps) * micro_batches):
        following: defaultdict[tuple[int, ...], list[State]] = defaultdict(list)
        for done, states in level.items():
            for at, turn in enumerate(done):
                rank = rank_of[at]
                held = sum(n * add for n, add, r in zip(done, adds, rank_of, strict=True) if r == rank)
                too_full = live is not None and adds[at] > 0 and held + adds[at] > live[rank]
                if turn == micro_batches or too_full or any(done[of] <= turn for of, _ in before[at]):
                    continue
                now_done = (*done[:at], turn + 1, *done[at + 1 :])
                used = [min((now_done[u] for u in after[s]), default=now_done[s]) for s in range(len(steps))]
                work = [0.0] * ranks
                for each, n in enumerate(now_done):
                    work[rank_of[each]] += (micro_batches - n) * cost[each]
                for free, ends in states:
                    start = max([free[rank], *(ends[of][turn] + delay for of, delay in before[at])])
                    now = [max(t, start) for t in free]
                    now[rank] = start + cost[at]
                    if all(t + w < below * (1 - 1e-9) for t, w in zip(now, work, strict=True)):
                        grown = [(*each, now[rank]) if s == at else each for s, each in enumerate(ends)]
                        kept = (
                            tuple(0.0 if n < used[s] else max(t, start - longest) for n, t in enumerate(each))
                            for s, each in enumerate(grown)
                        )
                        _keep(following[now_done], (tuple(now), tuple(kept)))
        level = following
    return min((max(free) for states in level.values() for free, _ in states), default=below)


def _keep(front: list[State], state: State) -> None:
    def flat(each: State) -> list[float]:
        return [*each[0], *(t for ends in each[1] for t in ends)]

    mine = flat(state)
    if any(all(a <= b for a, b in zip(flat(other), mine, strict=True)) for other in front):
        return
    front[:] = [other for other in front if not all(a <= b for a, b in zip(mine, flat(other), strict=True))]
    front.append(state)


def fastest_by_simulation(costs: Costs, micro_batches: int, stage_rank: Sequence[int], live: Sequence[int]) -> float:
    """The same for the tiniest, without any argument: simulate every combination of every rank's orders."""
    steps = steps_of(costs)
    per_rank = []
    for rank in range(max(stage_rank) + 1):
        own = [step for step in steps if stage_rank[step[1]] == rank]
        per_rank.append(list(_sequences(own, micro_batches)))
    best = float("inf")
    recomputes = frozenset(stage for kind, stage in steps if kind is Kind.R)
    for orders in product(*per_rank):
        schedule = Schedule(len(costs.stages), micro_batches, orders, tuple(stage_rank), recomputes)
        try:
            timeline = simulate(schedule, costs, chain(len(costs.stages)))
        except ValueError:  # a deadlock
            continue
        held = [sum(peaks) for peaks in [_rank_peak(schedule, rank) for rank in range(schedule.ranks)]]
        if all(each <= limit for each, limit in zip(held, live, strict=True)):
            best = min(best, timeline.makespan)
    return best


def _rank_peak(schedule: Schedule, rank: int) -> tuple[int]:
    apart, held, peak = schedule.apart(Kind.W), 0, 0
    for action in schedule.orders[rank]:
        held += action.kind is Kind.F
        peak = max(peak, held)
        held -= action.kind is Kind.W or (action.kind is Kind.B and (action.micro_batch, action.stage) not in apart)
    return (peak,)


def _sequences(steps: list[Step], micro_batches: int):
    """Every order of a rank's actions of all micro-batches, by name, not in turn."""
    actions = [Action(kind, i, stage) for kind, stage in steps for i in range(micro_batches)]

    def grow(done: tuple[Action, ...], left: frozenset[Action]):
        if not left:
            yield done
        for action in sorted(left):
            kinds = list(Kind)[: list(Kind).index(action.kind)]
            if not any(action._replace(kind=kind) in left for kind in kinds):
                yield from grow((*done, action), left - {action})

    return grow((), frozenset(actions))
