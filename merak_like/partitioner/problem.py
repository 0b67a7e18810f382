"""One partitioning problem: what its stages cost, which may fit the memory, and how fast a partition can be at best.

The bound. Let stage s hold segments ``i .. j-1``, f, b and w be seconds of one micro-batch (forward, the backward that
cannot wait, the weights' half that can; w is part of b where the schedule has no W), m the number of micro-batches, and
every stage wait for the one before it. Then no step of any schedule is shorter than::

    sum of f and hops before s          +   m * (f + b + w)(i, j)                      (start up; all its work)
    sum of f + b and hops before s      +   m * (f + b)(i, j)                          (start up; less; drain)

With no more than ``live`` micro-batches alive, the forward that comes ``live`` later than another waits for a backward
that has gone to the last stage and back::

    sum of f + b and hops before s      +   rounds * (f + b from i to the end + hops after)   +   the forwards left over

and in GPipe, whose backwards start when all forwards have ended: ``sum of all and hops + (m - 1) * (f + b)(i, j)``.
Each is a bottleneck over ranges, so the chain partition finds the least of them exactly. Where a stage might not wait
for the one before it (two towers), what lies before is left out: the bound stays true and is weaker. Recompute only
adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import numpy as np

from merak_like.partitioner.balance import Floats, StageCost, band_width, beyond, span
from merak_like.partitioner.cost import CostTable
from merak_like.partitioner.cuts import Bools, Ints
from merak_like.partitioner.job import Job
from merak_like.partitioner.memory import Bands, MemoryModel
from merak_like.partitioner.schedules.action import Kind
from merak_like.partitioner.traffic import Traffic


@dataclass(frozen=True, slots=True)
class _Ranges:
    """What of the bound is the same for every stage, of the ranges between these positions."""

    first: Ints
    stop: Ints
    forward: Floats
    """Of one micro-batch, as is ``trip``."""
    whole: Floats
    """Of all micro-batches, as are the next three."""
    work: Floats
    whole_again: Floats
    work_again: Floats
    before: Floats
    filled: Floats
    """Forwards that lie before."""
    trip: Floats


@dataclass(frozen=True, slots=True)
class _Bands:
    """The bytes of all ranges up to a width, and what is made of them."""

    bands: Bands
    least: list[Ints] = field(default_factory=list[Ints])
    """For each number of stages after it."""
    kept: dict[bool, tuple[Ints, Ints]] = field(default_factory=dict[bool, tuple[Ints, Ints]])
    """Whether the stage may recompute: bytes of a live micro-batch if nothing and if all that may be is recomputed."""

    def narrow(self, width: int) -> _Bands:
        """Those of shorter ranges, which are the same."""
        kept = {again: (full[:, :width], least[:, :width]) for again, (full, least) in self.kept.items()}
        return _Bands(self.bands.narrow(width), [least[:, :width] for least in self.least], kept)


@dataclass(frozen=True)
class Problem:
    """A job and the segments to make stages of. Partitions are tuples of segment starts, with the end."""

    job: Job
    positions: Ints
    """Ops at which segments begin, then the end."""
    ops: CostTable
    """Running sums over ops."""
    memory: MemoryModel
    traffic: Traffic
    borders: Ints
    """Ops at which units begin, then the end."""
    blocks: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    """Ops at which blocks begin."""
    _bands: dict[int, _Bands] = field(init=False, default_factory=dict[int, "_Bands"], repr=False)
    """Of one width, and of this very problem, since some depend on its job."""

    @property
    def size(self) -> int:
        """Number of segments."""
        return len(self.positions) - 1

    @cached_property
    def costs(self) -> CostTable:
        """Running sums at the positions."""
        return self.ops.at(self.positions)

    @cached_property
    def seconds(self) -> Floats:
        """Running sums of forward and backward."""
        return self.costs.seconds

    def in_blocks(self, first: int, stop: int) -> tuple[int, int]:
        """The ops of a range that are in blocks or between them; all where there are none."""
        if not len(self.blocks):
            return first, stop
        low, high = (min(max(int(at), first), stop) for at in (self.blocks[0], self.blocks[-1]))
        return low, high

    @cached_property
    def again(self) -> Floats:
        """Running sums of what is computed again where all is: of the blocks alone where it is done by them."""
        if self.job.recompute != "blocks" or not len(self.blocks):
            return self.costs.forward
        return self.ops.forward[self.positions.clip(self.blocks[0], self.blocks[-1])]

    @cached_property
    def urgent(self) -> Floats:
        """Running sums of what cannot be put off."""
        waits = any(action.kind is Kind.W for order in self.job.order.orders for action in order)
        return self.seconds - self.costs.weight if waits else self.seconds

    def width(self, most: float) -> int:
        """Segments in the longest range of no more than so many seconds."""
        return band_width(np.diff(self.seconds), most)

    def bands(self, width: int) -> Bands:
        """Bytes of all ranges up to a width."""
        return self._of(width).bands

    def _of(self, width: int) -> _Bands:
        if width not in self._bands:
            wider = next((found for known, found in self._bands.items() if known > width), None)
            made = wider.narrow(width) if wider else _Bands(self.memory.bands(self.positions, width))
            if not wider:
                self._bands.clear()  # one at a time: wide ones are large, narrow ones parts of them
            self._bands[width] = made
        return self._bands[width]

    @cached_property
    def _after_break(self) -> tuple[Ints, Ints, bool]:
        """For each position: the last one not after it, and the first one behind it, whose stages may not wait."""
        places = np.arange(self.size + 1)
        breaks = ~self.traffic.linked
        breaks[0] = breaks[self.size] = True
        last = np.maximum.accumulate(np.where(breaks, places, 0))
        following = np.minimum.accumulate(np.where(breaks, places, self.size)[::-1])[::-1]
        return last, np.append(following[1:], self.size), bool(breaks[1 : self.size].any())

    @cached_property
    def _hops(self) -> tuple[Floats, ...]:
        """``_hops[s]``: least seconds of the transfer into stage s (none for the first), by position of the cut."""
        near, none = self.traffic.near_bytes, np.zeros(self.size + 1)
        rows = [
            none if link is None else np.where(near > 0, link.latency + near / link.bandwidth, 0.0)
            for link in self.job.links
        ]
        return (none, *rows)

    @cached_property
    def _least_hops(self) -> Floats:
        """Running sums over stages of the least transfer into them; zeros if some stage may not wait for another."""
        inner = slice(1, max(self.size, 2))
        least = [0.0 if self._after_break[2] else float(row[inner].min()) for row in self._hops]
        return np.concatenate([[0.0], np.cumsum(least)])

    def bound(self, k: int, i: Ints, j: Ints) -> Floats:
        """Least seconds of a step in which segments ``i .. j-1`` are the stage with ``k`` stages after it."""
        return self._bound(k, self._ranges(i, j))

    def _ranges(self, i: Ints, j: Ints) -> _Ranges:
        forward, urgent, (last_break, next_break, _) = self.costs.forward, self.urgent, self._after_break
        forwards, m = forward[j] - forward[i], self.job.micro_batches
        whole, work, again = self.seconds[j] - self.seconds[i], urgent[j] - urgent[i], self.again[j] - self.again[i]
        return _Ranges(
            i, j, forwards, m * whole, m * work, m * (whole + again), m * (work + again),
            urgent[i] - urgent[last_break[i]], forward[i] - forward[last_break[i]],
            np.maximum(urgent[next_break[i]], urgent[j]) - urgent[i],
        )  # fmt: skip

    def _bound(self, k: int, of: _Ranges) -> Floats:
        job, linked, least = self.job, self.traffic.linked, self._least_hops
        stages, m = job.stages, job.micro_batches
        s = stages - 1 - k
        again = job.recompute in ("full", "blocks") and s in job.recomputes  # before the last backward
        whole, work = (of.whole_again, of.work_again) if again else (of.whole, of.work)
        hops = self._hops[s][of.first] * linked[of.first] + least[s] if s else 0.0
        before = of.before + 2 * hops
        bound = np.maximum(before + work, of.filled + hops + whole)
        trip = of.trip
        if k:
            trip = trip + 2 * ((self._hops[s + 1] * linked)[of.stop] + least[stages] - least[s + 2])
        rounds, rest = divmod(m - 1, job.live[s])
        bound = np.maximum(bound, before + (rounds + 1) * trip + rest * of.forward)
        if job.schedule == "gpipe" and not self._after_break[2]:
            bound = np.maximum(bound, self.urgent[-1] + 2 * least[stages] + work * ((m - 1) / m))
        if stages > job.mesh.pp:  # some rank has at least its share
            bound = np.maximum(bound, m * self.seconds[-1] / job.mesh.pp)
        return bound

    def within(self, width: int) -> list[Bools]:
        """For each ``k``: which ranges of the band fit the memory if they have a rank for themselves."""
        out = beyond(self.size, width)
        return [(need <= self.job.memory_limit) & ~out for need in self.least_bytes(width)]

    def least_bytes(self, width: int) -> Sequence[Ints]:
        """For each ``k``: bytes of a rank that has only this stage, which keeps as little as it may."""
        found = self._of(width)
        if not found.least:
            moments = (
                [taken + kept * least for taken, kept, _, least in self._banded(width, stage)]
                for stage in reversed(range(self.job.stages))
            )
            found.least.extend(reduce(np.maximum, each) for each in moments)
        return found.least

    def _banded(self, width: int, stage: int) -> Iterator[tuple[Ints, int, Ints, Ints]]:
        """The fullest moments of a rank that has only this stage.

        Each is the bytes of all but the kept micro-batches, how many are kept, and the bytes of one of them if nothing
        is recomputed and if as much as may be is.
        """
        job, bands = self.job, self.bands(width)
        full, least = self._kept(width, stage in job.recomputes)
        own = job.held[job.order.stage_rank[stage]].of(stage)
        for kept, whole, wait in zip(own.kept[:, 0].tolist(), own.full[:, 0], own.waits[:, 0], strict=True):
            taken = bands.fixed + whole * full if whole else bands.fixed
            yield taken + wait * bands.put_off if wait else taken, kept, full, least

    def _kept(self, width: int, recomputes: bool) -> tuple[Ints, Ints]:
        """Bytes of a live micro-batch if nothing is recomputed, and if as much as may be is."""
        found = self._of(width)
        if recomputes not in found.kept:
            job, bands = self.job, found.bands
            # What comes from a stage of the same rank is there already, and which cuts these are is not known here. A
            # value that some op saves may be among what is saved here.
            alone = job.stages == job.mesh.pp
            full = bands.saved + alone * bands.bare
            least = alone * bands.boundary + np.minimum(bands.saved, bands.inputs)
            least = np.minimum(least, full) if recomputes else full
            if job.recompute == "blocks" and recomputes:
                full = least = np.minimum(bands.saved, bands.inputs)  # at least: the blocks are not known here
            found.kept[recomputes] = full, least
        return found.kept[recomputes]

    def _recomputed(self, width: int, stage: int, limit: float) -> Floats | float:
        """The share of each range that is recomputed to stay within the limit, at least so that it just fits."""
        if self.job.recompute != "auto":
            return float(stage in self.job.recomputes)
        most: Floats | float = 0.0
        for taken, kept, full, least in self._banded(width, stage):
            over = taken + kept * full - limit
            if (over > 0).any():
                most = np.maximum(most, over / np.maximum(kept * (full - least), 1))
        return np.clip(most, 0.0, 1.0)

    def bound_cost(self, width: int) -> StageCost:
        """``bound`` as the cost of a chain partition; infinite where memory does not fit."""
        first, stop = span(self.size, width)
        ranges, fits = self._ranges(first[:, :1], stop), self.within(width)
        return lambda k: np.where(fits[k], self._bound(k, ranges), np.inf)

    def work_cost(self, width: int, *, hops: float, room: float = 1.0) -> StageCost:
        """Seconds of one micro-batch, with what is likely to be recomputed, plus ``hops`` times its transfers.

        Infinite where that share of the memory is not enough.
        """
        first, stop = span(self.size, width)
        first = first[:, :1]
        out, work = beyond(self.size, width), self.seconds[stop] - self.seconds[first]
        forward = self.again[stop] - self.again[first]
        limit, needs = self.job.memory_limit * room, self.least_bytes(width)

        def cost(k: int) -> Floats:
            s = self.job.stages - 1 - k
            sent = self._hops[s + 1][stop] if k else 0.0
            spent = work + self._recomputed(width, s, limit) * forward + hops * (self._hops[s][first] + sent)
            return np.where((needs[k] <= limit) & ~out, spent, np.inf)

        return cost
