"""One partitioning problem: how long a partition takes by simulation, whether it fits, and how fast it can be at best.

The bound. Let stage s hold segments ``i .. j-1``, W be forward and backward seconds of one micro-batch, m the number of
micro-batches, and every stage wait for the one before it. Then no step of any schedule is shorter than::

    sum of W and hops before stage s   +   m * W(i, j)            (start up; all its work; drain)

In 1F1B the forward of micro-batch x + live waits for the backward of x, which takes a round trip to the last stage::

    sum of W and hops before stage s   +   rounds * (W from i to the end + hops after)   +   the forwards left over

and in GPipe, whose backwards start when all forwards have ended: ``sum of all W and hops + (m - 1) * W(i, j)``. Each
is a bottleneck over ranges, so the chain partition finds the least of them exactly. Where a stage might not wait for
the one before it (two towers), what lies before is left out: the bound stays true and is weaker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from merak_like.partitioner.balance import Floats, StageCost, band_width, beyond, span
from merak_like.partitioner.cost import CostTable
from merak_like.partitioner.cuts import Bools, Ints
from merak_like.partitioner.hardware import Hardware, Link
from merak_like.partitioner.memory import Bands, MemoryModel
from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.partitioner.plan import StageMemory
from merak_like.partitioner.schedules import builder
from merak_like.partitioner.schedules.action import Edges, Schedule
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.simulator import Costs, StageCosts, Timeline, simulate
from merak_like.partitioner.traffic import Traffic


@lru_cache(maxsize=8)
def _with_transfers(schedule: str, stages: int, micro_batches: int, edges: Edges) -> Schedule:
    return add_transfers(builder(schedule)(stages, micro_batches), edges)


@dataclass(frozen=True)
class Job:
    """How a step is run, whatever the partition."""

    mesh: Mesh
    hardware: Hardware
    schedule: str
    micro_batches: int
    memory_limit: int

    @cached_property
    def live(self) -> tuple[int, ...]:
        """Micro-batches alive at once, of each stage."""
        return builder(self.schedule)(self.mesh.pp, self.micro_batches).peak_live()

    def link(self, source: int, target: int) -> Link:
        """The slowest link between two stages over all replicas."""
        ranks = [[self.mesh.rank(Coord(dp, stage, 0)) for stage in (source, target)] for dp in range(self.mesh.dp)]
        return min((self.hardware.link(*pair) for pair in ranks), key=lambda link: link.bandwidth)

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """``links[s]``: between stage s and the next."""
        return tuple(self.link(stage, stage + 1) for stage in range(self.mesh.pp - 1))


@dataclass(frozen=True)
class Problem:
    """A job and the segments to make stages of. Partitions are tuples of segment starts, with the end."""

    job: Job
    positions: Ints
    """Ops at which segments begin, then the end."""
    costs: CostTable
    """Running sums at the positions."""
    memory: MemoryModel
    traffic: Traffic
    _bands: dict[int, Bands] = field(default_factory=dict[int, Bands], repr=False)

    @property
    def size(self) -> int:
        """Number of segments."""
        return len(self.positions) - 1

    @cached_property
    def seconds(self) -> Floats:
        """Running sums of forward and backward."""
        return self.costs.seconds

    def width(self, most: float) -> int:
        """Segments in the longest range of no more than so many seconds."""
        return band_width(np.diff(self.seconds), most)

    def bands(self, width: int) -> Bands:
        """Bytes of all ranges up to a width."""
        if width not in self._bands:
            self._bands.clear()  # one at a time: wide ones are large
            self._bands[width] = self.memory.bands(self.positions, width)
        return self._bands[width]

    def stage_memory(self, starts: Sequence[int]) -> tuple[StageMemory, ...]:
        """Bytes of every stage."""
        return tuple(
            self.memory.stage(int(self.positions[start]), int(self.positions[stop]), live)
            for (start, stop), live in zip(pairwise(starts), self.job.live, strict=True)
        )

    def judge(self, starts: Sequence[int]) -> Timeline:
        """Simulate one step, with each value sent straight from stage to stage."""
        job, index = self.job, list(starts)
        transfer = {
            (source, target): job.link(source, target).seconds(nbytes) if target > source + 1
            else job.links[source].seconds(nbytes)
            for (source, target), nbytes in self.traffic.edges(starts).items()
        }  # fmt: skip
        forward, backward = np.diff(self.costs.forward[index]).tolist(), np.diff(self.costs.backward[index]).tolist()
        edges = frozenset(transfer)
        schedule = _with_transfers(job.schedule, job.mesh.pp, job.micro_batches, edges)
        stages = tuple(StageCosts(f, b) for f, b in zip(forward, backward, strict=True))
        return simulate(schedule, Costs(stages, transfer), edges)

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
        near = self.traffic.near_bytes
        rows = [np.where(near > 0, link.latency + near / link.bandwidth, 0.0) for link in self.job.links]
        return (np.zeros(self.size + 1), *rows)

    @cached_property
    def _least_hops(self) -> Floats:
        """Running sums over stages of the least transfer into them; zeros if some stage may not wait for another."""
        inner = slice(1, max(self.size, 2))
        least = [0.0 if self._after_break[2] else float(row[inner].min()) for row in self._hops]
        return np.concatenate([[0.0], np.cumsum(least)])

    def bound(self, k: int, i: Ints, j: Ints) -> Floats:
        """Least seconds of a step in which segments ``i .. j-1`` are the stage with ``k`` stages after it."""
        job, seconds, linked = self.job, self.seconds, self.traffic.linked
        stages, m = job.mesh.pp, job.micro_batches
        s = stages - 1 - k
        last_break, next_break, broken = self._after_break
        least, work = self._least_hops, seconds[j] - seconds[i]
        before = seconds[i] - seconds[last_break[i]]
        if s:
            before = before + 2 * (self._hops[s][i] * linked[i] + least[s])
        bound = before + m * work
        trip = np.maximum(seconds[next_break[i]], seconds[j]) - seconds[i]
        if k:
            trip = trip + 2 * (self._hops[s + 1][j] * linked[j] + least[stages] - least[s + 2])
        rounds, rest = divmod(m - 1, job.live[s])
        forwards = rest * (self.costs.forward[j] - self.costs.forward[i])
        bound = np.maximum(bound, before + (rounds + 1) * trip + forwards)
        if job.schedule == "gpipe" and not broken:
            bound = np.maximum(bound, seconds[-1] + 2 * least[stages] + (m - 1) * work)
        return bound

    def within(self, width: int) -> list[Bools]:
        """For each ``k``: which ranges of the band fit the memory."""
        bands, out, live = self.bands(width), beyond(self.size, width), self.job.live
        return [(bands.total(each) <= self.job.memory_limit) & ~out for each in reversed(live)]

    def bound_cost(self, width: int) -> StageCost:
        """``bound`` as the cost of a chain partition; infinite where memory does not fit."""
        first, stop = span(self.size, width)
        fits = self.within(width)
        return lambda k: np.where(fits[k], self.bound(k, first, stop), np.inf)

    def work_cost(self, width: int, *, hops: float) -> StageCost:
        """Seconds of one micro-batch plus ``hops`` times its transfers; infinite where memory does not fit."""
        first, stop = span(self.size, width)
        fits, work = self.within(width), self.seconds[stop] - self.seconds[first]

        def cost(k: int) -> Floats:
            s = self.job.mesh.pp - 1 - k
            sent = self._hops[s + 1][stop] if k else 0.0
            return np.where(fits[k], work + hops * (self._hops[s][first] + sent), np.inf)

        return cost
