"""A schedule with transfers, compiled once and timed many times: what ``simulate(add_transfers(..))`` says, in arrays.

Without tags on channels, what waits for what does not depend on seconds: a computation waits for the one before it on
its rank and for the transfers into it; a transfer for its producer, for the post of its receive (the end of the
computation before that) and for the transfer before it on its channel. The earliest time of each is the latest of these
plus its own seconds, so actions are sorted once into levels that wait for lower ones only, and a level is a few
additions of arrays. Sums are taken in the order of ``simulate``: the numbers are the same to the last bit.

Levels are found from the computations alone. What a transfer waits for, and what those before it on its channel do, is
on the sender no later than its producer and on the receiver no later than its post, for both ends keep the channel's
order; its user is deeper than either. So a transfer lies between the deeper of the two and the next depth, behind the
transfers of its channel that lie there too. Where every stage is linked to the next, edges that skip stages add no
depth, and the depths of a schedule are found once for all partitions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from merak_like.partitioner.balance import Floats, Ints
from merak_like.partitioner.cuts import Bools
from merak_like.partitioner.schedules.action import Edges, Kind, Schedule, chain
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
    stages: int
    micro_batches: int

    @classmethod
    def of(cls, schedule: Schedule) -> Columns:
        """Leaves transfers out."""
        codes = {Kind.F: F, Kind.R: R, Kind.B: B, Kind.W: W}
        orders = [[(codes[a[0]], a[1], a[2]) for a in order if a[3] < 0] for order in schedule.orders]
        rows = np.array([row for order in orders for row in order], np.int64).reshape(-1, 3)
        kind, micro_batch, stage = np.ascontiguousarray(rows.T)
        first = np.cumsum([0, *map(len, orders)])
        return cls(kind, micro_batch, stage, tuple(first.tolist()), schedule.stages, schedule.micro_batches)

    @cached_property
    def apart(self) -> Bools:
        """Whether the micro-batch of this stage has an R of its own."""
        return self._have(R)

    @cached_property
    def weighed(self) -> Bools:
        """Whether it has a W."""
        return self._have(W)

    def _have(self, code: int) -> Bools:
        which = self.stage * self.micro_batches + self.micro_batch
        there = np.zeros(self.stages * self.micro_batches, np.bool_)
        there[which[self.kind == code]] = True
        return there[which]

    @cached_property
    def nodes(self) -> Ints:
        """``nodes[kind, stage, micro_batch]``: the place of a computation."""
        found = np.zeros((4, self.stages, self.micro_batches), np.int64)
        found[self.kind, self.stage, self.micro_batch] = np.arange(len(self.kind))
        return found

    @cached_property
    def by_stage(self) -> tuple[Ints, Sequence[int]]:
        """Places in the order of the stages, and where each stage begins there, then the end."""
        order = np.argsort(self.stage, kind="stable")
        return order, np.searchsorted(self.stage[order], np.arange(self.stages + 1)).tolist()

    @cached_property
    def live(self) -> tuple[int, ...]:
        """See ``Schedule.peak_live``."""
        ends = (self.kind == W) | ((self.kind == B) & ~self.weighed)
        order, borders = self.by_stage
        change = ((self.kind == F) * 1 - ends)[order]
        return _peaks(np.maximum(change, 0), change, borders)

    def recomputing(self, stages: Collection[int]) -> Columns:
        """See ``planned.recomputing``."""
        kept = (self.kind != R) | np.isin(self.stage, list(stages))
        if kept.all():
            return self
        first = np.concatenate([[0], np.cumsum(kept)])[list(self.first)]
        return replace(
            self, kind=self.kind[kept], micro_batch=self.micro_batch[kept], stage=self.stage[kept],
            first=tuple(first.tolist()),
        )  # fmt: skip

    def depths(self, edges: Edges) -> Ints | None:
        """The most computations one after the other that each one waits for; None if some wait in a circle."""
        links = chain(self.stages)
        return self._depths_of_chain if links <= edges else self._depths(edges)

    @cached_property
    def _depths_of_chain(self) -> Ints | None:
        return self._depths(chain(self.stages))

    def _depths(self, edges: Edges) -> Ints | None:
        size, node = len(self.kind), self.nodes
        inner = np.ones(size, np.bool_)
        inner[[first for first, stop in pairwise(self.first) if first < stop]] = False
        later = np.flatnonzero(inner)
        source, target = (np.array([edge[n] for edge in sorted(edges)], np.int64) for n in (0, 1))
        before = np.concatenate([later - 1, node[F, source].ravel(), node[B, target].ravel()])
        after = np.concatenate([later, node[F, target].ravel(), node[B, source].ravel()])
        order = np.argsort(before, kind="stable")
        after, begin = after[order], np.searchsorted(before[order], np.arange(size + 1))
        missing = np.bincount(after, minlength=size)
        depth, reached, done = np.zeros(size, np.int64), 0, 0
        ready = np.flatnonzero(missing == 0)
        while len(ready):
            depth[ready] = reached
            reached, done = reached + 1, done + len(ready)
            counts = begin[ready + 1] - begin[ready]
            ends = counts.cumsum()
            found = after[np.arange(ends[-1]) + np.repeat(begin[ready] - ends + counts, counts)]
            np.subtract.at(missing, found, 1)
            ready = found[missing[found] == 0]
            if len(ready) > 1:  # one may have been found by each of those it waits for
                ready = np.unique(ready)
        return depth if done == size else None


@dataclass(frozen=True)
class _Transfers:
    """What edges between ranks carry, by channel and turn, as places of computations."""

    hops: list[tuple[int, int]]
    hop: Ints
    """Which of the hops it is."""
    made: Ints
    post: Ints
    """The computation after whose end the receive is posted, or -1."""
    used: Ints
    follows: Bools
    """Whether another is before it on its channel."""

    @classmethod
    def of(cls, columns: Columns, schedule: Schedule, edges: Edges) -> _Transfers:
        """A receive is posted one computation before its user, and no later than those behind it on its channel."""
        rank, node = schedule.stage_rank, columns.nodes
        rank_of = np.repeat(np.arange(schedule.ranks), np.diff(columns.first))
        at = np.arange(len(columns.kind)) - np.array(columns.first)[rank_of]
        hops = sorted((s, t) for s, t in edges if rank[s] != rank[t])
        made = np.concatenate([x for s, t in hops for x in (node[F, s], node[B, t])] or [np.zeros(0, np.int64)])
        used = np.concatenate([x for s, t in hops for x in (node[F, t], node[B, s])] or [np.zeros(0, np.int64)])
        hop = np.repeat(np.arange(len(hops)), 2 * columns.micro_batches)
        channel = rank_of[made] * schedule.ranks + rank_of[used]
        turn = np.lexsort((columns.stage[used], made, channel))
        made, used, hop, channel = made[turn], used[turn], hop[turn], channel[turn]
        follows = np.diff(channel, prepend=-1) == 0
        latest = at[used] - 1
        for first, stop in pairwise([*np.flatnonzero(~follows).tolist(), len(hop)]):
            latest[first:stop] = np.minimum.accumulate(latest[first:stop][::-1])[::-1]
        return cls(hops, hop, made, np.where(latest > 0, used - at[used] + latest - 1, -1), used, follows)

    def turns(self, window: Ints) -> Ints:
        """1 for the first of a channel in its window, 2 for the next, and so on."""
        place = np.arange(len(window))
        new = ~self.follows | (np.diff(window, prepend=-1) != 0)
        return place - np.maximum.accumulate(np.where(new, place, 0)) + 1


class Compiled:
    """A compute-only schedule with transfers over these edges."""

    def __init__(self, schedule: Schedule, edges: Edges, columns: Columns | None = None) -> None:
        self.schedule, self.edges = schedule, edges
        self.columns = columns = Columns.of(schedule) if columns is None else columns
        depths = columns.depths(edges)
        self._stuck = depths is None
        """Whether the actions wait for each other in a circle."""
        if depths is None:
            return
        sent = _Transfers.of(columns, schedule, edges)
        self._hops, self._hop = sent.hops, sent.hop
        # Actions are numbered by level; one more stands for "nothing" and ends at once.
        size, count = len(columns.kind), len(sent.hop)
        window = np.maximum(depths[sent.made], np.where(sent.post < 0, -1, depths[sent.post]))
        turns = sent.turns(window)
        wide = int(turns.max(initial=0)) + 1
        level = np.concatenate([depths * wide, window * wide + turns])
        order = np.argsort(level, kind="stable")
        place = np.empty(size + count + 1, np.int64)
        place[order], place[-1] = np.arange(size + count), size + count
        self._place, self._transfer = place[:size], place[size:-1]
        # What each waits for, one after the other: of computations the one before, then transfers; of these three.
        enters = np.bincount(sent.used, minlength=size)
        counts = np.concatenate([1 + enters, np.full(count, 3)])[order]
        begin = np.concatenate([[0], np.cumsum(counts)])
        waits = np.empty(begin[-1], np.int64)
        before = np.arange(size) - 1
        before[[first for first in columns.first[:-1] if first < size]] = -1
        waits[begin[self._place]] = place[before]
        by_user = np.argsort(sent.used, kind="stable")
        nth = np.arange(count) - np.repeat(np.cumsum(enters) - enters, enters)
        waits[begin[self._place[sent.used[by_user]]] + 1 + nth] = self._transfer[by_user]
        own = begin[self._transfer]
        waits[own], waits[own + 1] = place[sent.made], place[sent.post]
        waits[own + 2] = np.where(sent.follows, np.roll(self._transfer, 1), size + count)
        borders = np.flatnonzero(np.diff(level[order], prepend=-1, append=-1))
        self._waits, self._borders, self._begins = waits, borders.tolist(), begin[borders].tolist()
        self._inside = begin[:-1] - np.repeat(begin[borders[:-1]], np.diff(borders))
        """Where among what its level waits for that of an action begins."""

    def __call__(self, costs: Costs, recomputes: Collection[int]) -> Totals:
        """Time one step in which these stages recompute.

        Raises ValueError where ``simulate`` does.
        """
        if self._stuck:  # it knows how to tell who waits for whom
            return simulate(add_transfers(self.schedule, self.edges), costs, self.edges)
        columns = self.columns
        spent, (stage_peak, rank_peak) = self._seconds(costs, recomputes), self._bytes(costs, recomputes)
        hop = np.array([costs.transfer.get(edge, 0.0) for edge in self._hops] or [0.0])
        seconds = np.zeros(len(spent) + len(self._hop) + 1)
        seconds[self._place], seconds[self._transfer] = spent, hop[self._hop]
        end = np.zeros_like(seconds)
        waits, inside, latest = self._waits, self._inside, np.maximum.reduceat
        for (first, stop), (begin, until) in zip(pairwise(self._borders), pairwise(self._begins), strict=True):
            end[first:stop] = seconds[first:stop] + latest(end[waits[begin:until]], inside[first:stop])
        makespan = float(end[self._place].max(initial=0.0))
        ranks = [spent[first:stop] for first, stop in pairwise(columns.first)]
        busy = [float(np.cumsum(each)[-1]) if len(each) else 0.0 for each in ranks]
        idle = tuple(1.0 - each / makespan if makespan > 0 else 0.0 for each in busy)
        return Totals(makespan, sum(idle) / len(idle), idle, columns.live, stage_peak, rank_peak)

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
        order, borders = columns.by_stage
        return _peaks(during[order], after[order], borders), _peaks(during, after, columns.first)


def _peaks(during: Ints, after: Ints, borders: Sequence[int]) -> tuple[int, ...]:
    held = np.cumsum(after) - after
    return tuple(
        max(int((held[first:stop] + during[first:stop]).max() - held[first]), 0) if first < stop else 0
        for first, stop in pairwise(borders)
    )
