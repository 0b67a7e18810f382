"""A schedule with transfers, compiled once and timed many times: what ``simulate(add_transfers(..))`` says, in arrays.

Without tags on channels, what waits for what does not depend on seconds: a computation waits for the one before it on
its rank and for the transfers into it; a transfer for its producer, for the post of its receive (the end of the
computation before that) and for the transfer before it on its channel. The earliest time of each is the latest of these
plus its own seconds, so actions are sorted once into levels that wait for lower ones only, and a level is a few
additions of arrays. Sums are taken in the order of ``simulate``: the numbers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from merak_like.partitioner.balance import Floats, Ints
from merak_like.partitioner.cuts import Bools
from merak_like.partitioner.schedules.action import Edges, Kind, Schedule
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.simulator import Costs, Totals, simulate

F, R, B, W = range(4)


@dataclass(frozen=True)
class Columns:
    """The computations of a schedule, rank after rank in program order."""

    kind: Ints
    micro_batch: Ints
    stage: Ints
    first: tuple[int, ...]
    """Where each rank begins, then the end."""
    apart: Bools
    """Whether the micro-batch of this stage has an R of its own."""
    weighed: Bools
    """Whether it has a W."""

    @classmethod
    def of(cls, schedule: Schedule) -> Columns:
        """Leaves transfers out."""
        codes = {Kind.F: F, Kind.R: R, Kind.B: B, Kind.W: W}
        orders = [[(codes[a[0]], a[1], a[2]) for a in order if a[3] < 0] for order in schedule.orders]
        rows = np.array([row for order in orders for row in order], np.int64).reshape(-1, 3)
        kind, micro_batch, stage = np.ascontiguousarray(rows.T)
        which = stage * schedule.micro_batches + micro_batch
        apart, weighed = (_among(which, which[kind == code], schedule) for code in (R, W))
        first = np.cumsum([0, *map(len, orders)])
        return cls(kind, micro_batch, stage, tuple(first.tolist()), apart, weighed)


def _among(which: Ints, found: Ints, schedule: Schedule) -> Bools:
    there = np.zeros(schedule.stages * schedule.micro_batches, np.bool_)
    there[found] = True
    return there[which]


class Compiled:
    """A compute-only schedule with transfers over these edges."""

    def __init__(self, schedule: Schedule, edges: Edges) -> None:
        self.schedule, self.edges = schedule, edges
        self.columns = Columns.of(schedule)
        size = len(self.columns.kind)
        self._hops, self._hop, waits = self._waits()
        # Nodes are numbered by level; the last one stands for "nothing" and ends at once.
        self._borders, place = _levels(waits, size + len(self._hop))
        self._stuck = not len(place)
        """Whether the actions wait for each other in a circle."""
        if self._stuck:
            return
        self._place, self._transfer = place[:size], place[size:-1]
        self._before = np.empty_like(waits)
        self._before[:, place[:-1]] = place[waits[:, :-1]]
        self._live = schedule.peak_live()
        self._by_stage = np.argsort(self.columns.stage, kind="stable")
        self._stage_first = np.searchsorted(self.columns.stage[self._by_stage], np.arange(schedule.stages + 1))

    def _waits(self) -> tuple[list[tuple[int, int]], Ints, Ints]:
        """The edges between ranks; the edge of each transfer; and what each action waits for, a column an action.

        Computations come first, transfers after them by channel and turn, nothing last.
        """
        columns, schedule = self.columns, self.schedule
        size, m = len(columns.kind), schedule.micro_batches
        rank_of = np.repeat(np.arange(schedule.ranks), np.diff(columns.first))
        at = np.arange(size) - np.array(columns.first)[rank_of]
        node = np.zeros((4, schedule.stages, m), np.int64)
        node[columns.kind, columns.stage, columns.micro_batch] = np.arange(size)
        hops = sorted((s, t) for s, t in self.edges if schedule.stage_rank[s] != schedule.stage_rank[t])
        made = np.concatenate([x for s, t in hops for x in (node[F, s], node[B, t])] or [np.zeros(0, np.int64)])
        used = np.concatenate([x for s, t in hops for x in (node[F, t], node[B, s])] or [np.zeros(0, np.int64)])
        hop = np.repeat(np.arange(len(hops)), 2 * m)
        channel = rank_of[made] * schedule.ranks + rank_of[used]
        turn = np.lexsort((columns.stage[used], made, channel))
        made, used, hop, channel = made[turn], used[turn], hop[turn], channel[turn]
        count, nothing = len(hop), size + len(hop)
        # A receive is posted one computation before its user, and no later than those behind it on its channel.
        latest = at[used] - 1
        borders = np.flatnonzero(np.diff(channel, prepend=-1, append=-1)).tolist() if count else []
        for first, stop in pairwise(borders):
            latest[first:stop] = np.minimum.accumulate(latest[first:stop][::-1])[::-1]
        post = np.where(latest > 0, used - at[used] + latest - 1, nothing)
        follows = np.append(False, channel[1:] == channel[:-1]) if count else np.zeros(0, np.bool_)
        # Which of the transfers into its user each one is.
        by_user = np.argsort(used, kind="stable")
        begins = np.append(True, used[by_user][1:] != used[by_user][:-1]) if count else np.zeros(0, np.bool_)
        nth = np.empty(count, np.int64)
        nth[by_user] = np.arange(count) - np.maximum.accumulate(np.where(begins, np.arange(count), 0))
        waits = np.full((max(3, int(nth.max(initial=-1)) + 2), nothing + 1), nothing, np.int64)
        waits[0, :size] = np.where(at > 0, np.arange(size) - 1, nothing)
        waits[1 + nth, used] = size + np.arange(count)
        waits[:3, size:nothing] = made, post, np.where(follows, size + np.arange(count) - 1, nothing)
        return hops, hop, waits

    def __call__(self, costs: Costs, recomputes: Collection[int]) -> Totals:
        """Time one step in which these stages recompute.

        Raises ValueError where ``simulate`` does.
        """
        if self._stuck:  # it knows how to tell who waits for whom
            return simulate(add_transfers(self.schedule, self.edges), costs, self.edges)
        columns = self.columns
        spent, (stage_peak, rank_peak) = self._seconds(costs, recomputes), self._bytes(costs, recomputes)
        hop = np.array([costs.transfer.get(edge, 0.0) for edge in self._hops] or [0.0])
        own = np.zeros(len(spent) + len(self._hop) + 1)
        own[self._place], own[self._transfer] = spent, hop[self._hop]
        end = np.zeros_like(own)
        before = self._before
        for first, stop in self._borders:
            end[first:stop] = own[first:stop] + end[before[:, first:stop]].max(axis=0)
        makespan = float(end[self._place].max(initial=0.0))
        ranks = [spent[first:stop] for first, stop in pairwise(columns.first)]
        busy = [float(np.cumsum(each)[-1]) if len(each) else 0.0 for each in ranks]
        idle = tuple(1.0 - each / makespan if makespan > 0 else 0.0 for each in busy)
        return Totals(makespan, sum(idle) / len(idle), idle, self._live, stage_peak, rank_peak)

    def _seconds(self, costs: Costs, recomputes: Collection[int]) -> Floats:
        columns, stages = self.columns, costs.stages
        table = np.array([(s.forward, s.recompute, s.backward, s.weight) for s in stages])
        spent = table[columns.stage, columns.kind]
        back, at = columns.kind == B, columns.stage
        inside = np.isin(at, list(recomputes)) & ~columns.apart
        whole = np.where(inside, table[at, R], 0.0) + table[at, B] + np.where(columns.weighed, 0.0, table[at, W])
        return np.where(back, whole, spent)

    def _bytes(self, costs: Costs, recomputes: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See ``simulator``: the most at once of each stage, and of each rank."""
        columns, stages = self.columns, costs.stages
        table = np.array([(s.activation_bytes, s.kept, s.held_for_weight) for s in stages], np.int64)
        rows: Ints = table[columns.stage]
        whole, before, waits = rows[:, 0], rows[:, 1], rows[:, 2]
        kept: Ints = np.where(columns.apart | np.isin(columns.stage, list(recomputes)), before, whole)
        nothing = np.zeros_like(whole)
        opened = np.where(columns.apart, 0, whole - kept)
        during: Ints = np.choose(columns.kind, (kept, whole - kept, opened, nothing))
        left = opened + np.where(columns.weighed, waits, 0) - whole
        after: Ints = np.choose(columns.kind, (kept, whole - kept, left, -waits))
        by_stage = _peaks(during[self._by_stage], after[self._by_stage], self._stage_first.tolist())
        return by_stage, _peaks(during, after, columns.first)


def _peaks(during: Ints, after: Ints, borders: Collection[int]) -> tuple[int, ...]:
    held = np.cumsum(after) - after
    return tuple(
        max(int((held[first:stop] + during[first:stop]).max() - held[first]), 0) if first < stop else 0
        for first, stop in pairwise(borders)
    )


def _levels(waits: Ints, size: int) -> tuple[list[tuple[int, int]], Ints]:
    """First and last place of each level, and the place of each node; no places if some wait in a circle."""
    source, node = waits[:, :size].ravel(), np.tile(np.arange(size), len(waits))
    real = source < size
    order = np.argsort(source[real], kind="stable")
    after, begin = node[real][order], np.searchsorted(source[real][order], np.arange(size + 1))
    missing = np.bincount(node[real], minlength=size)
    place, borders, done = np.full(size + 1, size), list[tuple[int, int]](), 0
    ready = np.flatnonzero(missing == 0)
    while len(ready):
        place[ready] = np.arange(done, done + len(ready))
        borders.append((done, done + len(ready)))
        done += len(ready)
        counts = begin[ready + 1] - begin[ready]
        ends = np.cumsum(counts)
        found = after[np.repeat(begin[ready] - ends + counts, counts) + np.arange(ends[-1])]
        np.subtract.at(missing, found, 1)
        ready = found[missing[found] == 0]
        if len(ready) > 1:  # a node may have been found by each of those it waits for
            ready = np.sort(ready)
            ready = ready[np.append(True, ready[1:] != ready[:-1])]
    return (borders, place) if done == size else ([], np.zeros(0, np.int64))
