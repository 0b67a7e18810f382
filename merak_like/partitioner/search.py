"""The search for the partition whose simulated step is shortest.

1. Seeds: the exact chain partitions of least bound, of least work per stage, and of least work and transfers; work is
   forward, backward and what is likely to be recomputed. Where ranks have several stages, which share the memory, also
   that of least work in equal shares of it; if none fits, borders are moved while the fullest rank gets emptier.
   What fits is then not always found, unless the best-first search comes to its end.
2. Moves: single borders of the best partition, one place at a time, dearest stages first.
3. Best first: partitions in the order of their bound (see ``problem``), built stage by stage. When the next bound is no
   less than the best simulated step, that step is the optimum, and said to be proven.

Everything is counted and nothing is timed, so that every rank finds the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from merak_like.partitioner.balance import bottleneck, suffixes
from merak_like.partitioner.cuts import Bools
from merak_like.partitioner.feasible import cut_fits, fullest_width, least_memory
from merak_like.partitioner.judge import Judge, Judged
from merak_like.partitioner.problem import Problem

ACTIONS = 150_000
"""Simulated actions the search may spend, within the limits below: some 0.1 s, at 0.6 us for each. Four times as many
found a shorter step in one of four jobs of 24 to 96 blocks on 8 and 16 stages, by 0.03 %."""
FEWEST, MOST = 6, 300
"""Simulations the search may always, and at most, make."""
NODES = 100_000
"""Partial partitions the best-first search may look at."""
SAME = 1e-9
"""Relative difference below which two steps take the same time."""

Starts = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The best partition, in segments, and how it was found."""

    starts: Starts
    judged: Judged
    proven: bool
    """Nothing among the partitions of these segments is faster."""
    simulated: int
    bound: float
    """Seconds that no partition of these segments can go below."""


class _Judge:
    """Simulates within a budget, remembers everything, and keeps the best."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.judge = problem, Judge(problem)
        self.seen: dict[Starts, float] = {}
        self.best: tuple[Starts, Judged] | None = None
        job = problem.job
        actions = sum(map(len, job.order.orders)) + 4 * job.micro_batches * (job.stages - 1)
        self.budget = min(max(ACTIONS // actions, FEWEST), MOST)

    @property
    def spent(self) -> bool:
        return len(self.seen) >= self.budget

    @property
    def step(self) -> float:
        return self.best[1].timeline.makespan if self.best else float("inf")

    def __call__(self, starts: Starts) -> float:
        """Simulate a partition, unless that was done; infinite if it does not fit."""
        if starts not in self.seen:
            judged = self.judge(starts)
            self.seen[starts] = judged.timeline.makespan if judged is not None else float("inf")
            if judged is not None and judged.timeline.makespan < self.step * (1 - SAME):
                self.best = starts, judged
        return self.seen[starts]


def quick(problem: Problem) -> Found | None:
    """The best of the seeds; None if none fits the memory, which with one stage per rank means that nothing does."""
    judge = _sown(problem)
    if judge.best is None:
        return None
    return Found(*judge.best, proven=False, simulated=len(judge.seen), bound=0.0)


def search(problem: Problem) -> Found | None:
    """The best partition within the budget; None if nothing that fits the memory is found (see ``quick``)."""
    judge = _sown(problem)
    if judge.best is None and problem.job.stages == problem.job.mesh.pp:
        return None
    if judge.best is not None:
        _move(problem, judge)
    proven, bound = _best_first(problem, judge)
    return judge.best and Found(*judge.best, proven=proven, simulated=len(judge.seen), bound=bound)


def _sown(problem: Problem) -> _Judge:
    judge, alone = _Judge(problem), problem.job.stages == problem.job.mesh.pp
    for starts in _seeds(problem):
        judge(starts)
    if judge.best is None and not alone:
        starts = _emptier(problem, judge.judge)
        if starts is not None:
            judge(starts)
    return judge


def _seeds(problem: Problem) -> Iterator[Starts]:
    """Partitions whose stages fit, if there are any: bands are widened until one is found or nothing is left out."""
    size, stages, ranks = problem.size, problem.job.stages, problem.job.mesh.pp
    work = np.diff(problem.seconds)
    most, first = max(float(work.max()), float(work.sum()) / stages * 1.05), True
    while True:
        width = problem.width(most)
        costs = [problem.bound_cost(width), problem.work_cost(width, hops=1.0), problem.work_cost(width, hops=0.0)]
        if stages > ranks:
            costs.append(problem.work_cost(width, hops=0.0, room=ranks / stages))
        found = [bottleneck(size, stages, cost) for cost in costs]
        starts = [each[1] for each in found if each is not None]
        if starts or width >= size or (first and not cut_fits(problem)):
            yield from dict.fromkeys(starts)
            return
        most, first = most * 1.5, False


def _emptier(problem: Problem, judge: Judge) -> Starts | None:
    """One border moved at a time, by any power of two, while the fullest rank gets emptier; None if that never fits."""
    starts = least_memory(problem)[1]
    over = judge.over(starts)
    while over > 0:
        moved = [
            (*starts[:border], starts[border] + shift, *starts[border + 1 :])
            for border in range(1, len(starts) - 1)
            for step in range(problem.size.bit_length())
            for shift in (-(2**step), 2**step)
            if starts[border - 1] < starts[border] + shift < starts[border + 1]
        ]
        best = min(((judge.over(each), each) for each in moved), default=(over, starts))
        if best[0] >= over:
            return None
        over, starts = best
    return starts


def _move(problem: Problem, judge: _Judge) -> None:
    """Shift one border at a time while that helps, for half of the budget."""
    starts: Starts = ()
    width = problem.width(judge.step / problem.job.micro_batches)
    room = problem.within(width)
    while judge.best and starts != judge.best[0]:
        starts = judge.best[0]
        work = np.diff(problem.seconds[list(starts)])
        moves: list[tuple[float, int, int]] = []
        for border in range(1, len(starts) - 1):
            moves += [(-float(work[border - 1]), border, -1), (-float(work[border]), border, 1)]
        for _, border, shift in sorted(moves):
            if judge.best[0] != starts or len(judge.seen) > judge.budget // 2:
                break
            moved = (*starts[:border], starts[border] + shift, *starts[border + 1 :])
            if moved not in judge.seen and all(
                _promising(problem, judge, room, moved, stage) for stage in (border - 1, border)
            ):
                judge(moved)


def _promising(problem: Problem, judge: _Judge, room: list[Bools], starts: Starts, stage: int) -> bool:
    """Whether a stage is not empty, fits the memory, and could be part of something better than the best."""
    i, j = starts[stage], starts[stage + 1]
    k = problem.job.stages - 1 - stage
    if not i < j <= i + room[k].shape[1] or not room[k][i, j - i - 1]:
        return False
    return float(problem.bound(k, np.array([i]), np.array([j]))[0]) < judge.step * (1 - SAME)


def _best_first(problem: Problem, judge: _Judge) -> tuple[bool, float]:
    """Go on until nothing better can be left (True) or the budget is spent; and the least bound that is left."""
    size, stages, m = problem.size, problem.job.stages, problem.job.micro_batches
    # A stage of more work than this cannot be in a better partition.
    width = min(problem.width(judge.step / m), fullest_width(problem))
    cost = problem.bound_cost(width)
    least = suffixes(size, stages, cost)
    root = float(least[stages - 1, 0])
    room = problem.within(width)
    heap: list[tuple[float, int, float, Starts]] = [(root, 0, 0.0, (0,))]
    looked = 0
    while heap:
        bound, minus_made, squares, starts = heapq.heappop(heap)
        if bound >= judge.step * (1 - SAME):
            return True, judge.step
        if judge.spent or looked > NODES:
            return False, bound
        if len(starts) == stages + 1:
            judge(starts)
            continue
        looked += 1
        k, i = stages - 1 + minus_made, starts[-1]
        stops = (i + 1 + np.flatnonzero(room[k][i])).astype(np.int64)
        if k == 0:
            stops = stops[stops == size]
        rows = np.full(len(stops), i, np.int64)
        bounds = np.maximum(problem.bound(k, rows, stops), bound)
        if k:
            bounds = np.maximum(bounds, least[k - 1, stops])
        work = problem.seconds[stops] - problem.seconds[i]
        for at in np.flatnonzero(bounds < judge.step * (1 - SAME)).tolist():
            child = (*starts, int(stops[at]))
            heapq.heappush(heap, (float(bounds[at]), minus_made - 1, squares + float(work[at]) ** 2, child))
    return True, judge.step
