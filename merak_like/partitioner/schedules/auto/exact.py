"""The best order of a small job, proven: all orders at once, as states that are compared.

Actions are added in the order they start. Two states with the same turns done differ only in when ranks are free and
when results arrive: one that is nowhere later makes the other superfluous. So is one that cannot beat what is known.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from merak_like.partitioner.schedules.auto.job import Job, Orders

_SAME = 1e-9


class _State(NamedTuple):
    """Turns done and memory held, the free time of each rank, and the ends that somebody still waits for."""

    done: tuple[int, ...]
    held: tuple[float, ...]
    free: tuple[float, ...]
    ends: tuple[tuple[float, ...], ...]
    """Per class, the ends of the turns that not all of its followers have used, or of none if it has no followers."""
    last: int
    before: _State | None


def exact(job: Job, best: float, states: int) -> tuple[Orders | None, bool]:
    """Return orders faster than `best` if there are any, and whether that is certain, after so many states at most."""
    return _Exact(job, best, states).search()


class _Exact:
    def __init__(self, job: Job, best: float, states: int) -> None:
        self.job, self.best, self.left = job, best, states
        classes = range(len(job.kinds))
        self.users = [tuple(way.of for way in job.feeds[c]) for c in classes]
        self.tail_of_rank = [
            [(c, job.seconds[c], job.tails[c]) for c in sorted(own, key=lambda c: job.tails[c])] for own in job.of_rank
        ]

    def search(self) -> tuple[Orders | None, bool]:
        job, classes = self.job, len(self.job.kinds)
        ranks = len(job.of_rank)
        level = [_State((0,) * classes, (0.0,) * ranks, (0.0,) * ranks, ((),) * classes, -1, None)]
        for _ in range(job.actions):
            fronts: dict[tuple[int, ...], list[tuple[list[float], _State]]] = {}
            for state in level:
                for child in self._children(state):
                    self.left -= 1
                    if self.left < 0:
                        return None, False
                    self._keep(fronts.setdefault(child.done, []), child)
            level = [state for front in fronts.values() for _, state in front]
        if not level:
            return None, True
        return self._orders(min(level, key=lambda state: max(state.free))), True

    def _keep(self, front: list[tuple[list[float], _State]], child: _State) -> None:
        mine = [*child.free, *(end for ends in child.ends for end in ends)]
        for theirs, _ in front:
            if all(a <= b for a, b in zip(theirs, mine, strict=True)):
                return
        front[:] = [kept for kept in front if not all(a <= b for a, b in zip(mine, kept[0], strict=True))]
        front.append((mine, child))

    def _children(self, state: _State) -> list[_State]:
        job = self.job
        children: list[_State] = []
        for rank, own in enumerate(job.of_rank):
            open_ = [(c, self._start(state, rank, c)) for c in own]
            # An action that fits before another starts, and takes no memory, is never put behind it.
            soonest = min((s + job.seconds[c] for c, s in open_ if job.during[c] <= 0), default=inf)
            for c, start in open_:
                if start < inf and (start < soonest or start + job.seconds[c] <= soonest):
                    child = self._child(state, rank, c, start)
                    if self._bound(child) < self.best * (1 - _SAME):
                        children.append(child)
        return children

    def _start(self, state: _State, rank: int, c: int) -> float:
        job, turn, start = self.job, state.done[c], state.free[rank]
        if turn == job.micro_batches or state.held[rank] + job.during[c] > job.limit[rank]:
            return inf
        for of, delay in job.needs[c]:
            if state.done[of] <= turn:
                return inf
            start = max(start, self._end(state, of, turn) + delay)
        return start

    def _end(self, state: _State, c: int, turn: int) -> float:
        """The end of a turn that somebody waits for: the last of `ends` is that of the last turn done."""
        return state.ends[c][turn - state.done[c]]

    def _child(self, state: _State, rank: int, c: int, start: float) -> _State:
        """Add an action. Nothing may start before it any more, so earlier times are as good as its start."""
        job, end = self.job, start + self.job.seconds[c]
        done = (*state.done[:c], state.done[c] + 1, *state.done[c + 1 :])
        held = (*state.held[:rank], state.held[rank] + job.after[c], *state.held[rank + 1 :])
        free = tuple(end if r == rank else max(t, start) for r, t in enumerate(state.free))
        ends: list[tuple[float, ...]] = []
        for each, users in enumerate(self.users):
            count = done[each] - min((done[user] for user in users), default=done[each])
            known = (*state.ends[each], end) if each == c else state.ends[each]
            hop = max((delay for _, delay in job.feeds[each]), default=0.0)
            ends.append(tuple(max(t, start - hop) for t in known[len(known) - count :]))
        return _State(done, held, free, tuple(ends), c, state)

    def _bound(self, state: _State) -> float:
        m, bound = self.job.micro_batches, 0.0
        for rank, own in enumerate(self.tail_of_rank):
            work = state.free[rank]
            left = 0.0
            for c, seconds, tail in reversed(own):  # the longest tails first: those actions are all over before theirs
                rest = m - state.done[c]
                if rest:
                    left += rest * seconds
                    bound = max(bound, work + left + tail)
                    start = self._soonest(state, rank, c)
                    bound = max(bound, start + rest * seconds + tail)
            bound = max(bound, work + left)
        return bound

    def _soonest(self, state: _State, rank: int, c: int) -> float:
        turn, start = state.done[c], state.free[rank]
        for of, delay in self.job.needs[c]:
            if state.done[of] > turn:
                start = max(start, self._end(state, of, turn) + delay)
        return start

    def _orders(self, state: _State | None) -> Orders:
        orders: Orders = [[] for _ in self.job.of_rank]
        while state is not None and state.before is not None:
            orders[self.job.ranks[state.last]].append(state.last)
            state = state.before
        return [order[::-1] for order in orders]
