"""One partition, judged: what its stages cost, what is recomputed so that it fits, and the step by simulation."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from merak_like.partitioner.compiled import Compiled
from merak_like.partitioner.memory import Parts
from merak_like.partitioner.plan import StageMemory
from merak_like.partitioner.planned import calling
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.recompute import Front, Live, choose, front, peak
from merak_like.partitioner.schedules.action import Edges, Schedule
from merak_like.partitioner.simulator import Costs, StageCosts, Totals


@dataclass(frozen=True)
class Stage:
    """A range of segments as a stage: one micro-batch."""

    parts: Parts
    live: Live
    borders: tuple[int, ...]
    """Ops at which its units begin, then the end."""
    forward: float
    backward: float
    """The whole of it."""
    weight: float
    by_block: tuple[int, int] = (0, 0)
    """Bytes kept, and most bytes there, of a micro-batch that is computed again a block at a time."""
    block_bytes: int = 0
    """Of the latter, those of an open block; none where what is behind the blocks is more, and through before."""
    in_blocks: tuple[int, int] = (0, 0)
    """The units that are then computed again: what is before the first block and behind the last is not."""
    block_seconds: float = 0.0

    def handed(self, nbytes: int) -> Stage:
        """The stage where so much of what it receives comes from its own rank, whose other stage holds it already."""
        parts = replace(self.parts, boundary=self.parts.boundary - nbytes)
        return replace(self, parts=parts, live=_live(parts)) if nbytes else self

    @property
    def nothing(self) -> Front:
        """Only the way that recomputes nothing."""
        return Front(np.array([self.parts.saved]), np.zeros(1), ((),))

    @property
    def everything(self) -> Front:
        """Only the way that recomputes all units."""
        least = min(self.parts.saved, self.parts.inputs)
        return Front(np.array([least]), np.array([self.forward]), (tuple(range(len(self.borders) - 1)),))

    @property
    def blockwise(self) -> Stage:
        """The stage that computes everything again, a block at a time: of it only one is ever there."""
        return replace(self, live=replace(self.live, full=self.parts.boundary + self.by_block[1]))

    @property
    def each_block(self) -> Front:
        """Only the way that recomputes all blocks, one at a time."""
        return Front(np.array([self.by_block[0]]), np.array([self.block_seconds]), (tuple(range(*self.in_blocks)),))

    def costs(self, recompute: float, kept: int, beside: float) -> StageCosts:
        """What the simulator needs to know. What is sent is there twice once the op that saves it was run again.

        ``beside`` are seconds that the host spends on transfers around each pass.
        """
        shared = 0 if recompute or self.by_block[1] else self.parts.sent_saved
        full = self.live.full - shared
        return StageCosts(
            forward=self.forward + beside,
            backward=max(self.backward - self.weight, 0.0) + beside,
            recompute=recompute,
            weight=self.weight,
            activation_bytes=full,
            kept_bytes=min(self.live.boundary + kept - shared, full),
            weight_bytes=self.live.waits,
        )


def _live(parts: Parts) -> Live:
    return Live(parts.boundary, parts.saved + parts.boundary - parts.received_saved, parts.put_off)


@dataclass(frozen=True)
class Judged:
    """A partition that fits, with its step."""

    stages: tuple[Stage, ...]
    recompute: tuple[tuple[tuple[int, int], ...], ...]
    """For each stage, the units that it recomputes, as ops ``first`` up to ``stop``."""
    schedule: Schedule
    """Compute-only."""
    costs: Costs
    edges: Edges
    timeline: Totals

    def memory(self, index: int) -> StageMemory:
        """Bytes of a stage at its own fullest moment."""
        stage, live = self.stages[index], self.timeline.peak_bytes[index]
        boundary = min(live, self.timeline.peak_live[index] * stage.live.boundary)
        parts = stage.parts
        gone = self.recompute[index] and (stage.block_bytes or not stage.by_block[1])
        logits = 0 if gone else min(parts.logits * self.timeline.peak_live[index], live - boundary)
        return StageMemory(
            parts.weights, parts.gradients, parts.optimizer, live - boundary - logits, boundary, logits, parts.workspace
        )

    @property
    def rank_fixed(self) -> tuple[int, ...]:
        """Bytes of each rank that do not come and go with the micro-batches."""
        total = [0] * self.schedule.ranks
        for stage, rank in zip(self.stages, self.schedule.stage_rank, strict=True):
            total[rank] += stage.parts.fixed
        return tuple(total)

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """Bytes of each rank at its fullest moment."""
        return tuple(a + b for a, b in zip(self.rank_fixed, self.timeline.rank_peak_bytes, strict=True))

    def ordered(self, schedule: Schedule) -> Judged:
        """The same partition under another order of the same stages."""
        timed = Compiled(schedule, self.edges)(self.costs, schedule.recomputes)
        return replace(self, schedule=schedule, timeline=timed)


class Judge:
    """Judges partitions of one problem; ranges that come again are not looked at again."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._stages: dict[tuple[int, int], Stage] = {}
        self._fronts: dict[tuple[int, int], Front] = {}

    def __call__(self, starts: Sequence[int]) -> Judged | None:
        """Simulate a partition; None if it does not fit the memory.

        Each value is sent straight from stage to stage. Neighbours wait for each other even if none is, as they run.
        """
        job = self.problem.job
        ranges, stages = list(pairwise(starts)), self._partition(starts)
        fronts = [self._only(stage, s) for s, stage in enumerate(stages)]
        ways = [0] * len(stages)
        for held in job.held:
            live, own = [stages[s].live for s in held.stages], [fronts[s] for s in held.stages]
            room = job.memory_limit - sum(stages[s].parts.fixed for s in held.stages)
            # Most jobs have room: then nothing is recomputed, and the fronts need not be known.
            if job.recompute == "auto" and peak(held, live, [s.full for s in live]) > room:
                for n, s in enumerate(held.stages):
                    own[n] = fronts[s] = self._ways(ranges[s])
            chosen = choose(held, live, own, room)
            if chosen is None:
                return None
            for s, way in zip(held.stages, chosen, strict=True):
                ways[s] = way
        again = tuple(
            tuple((stage.borders[unit], stage.borders[unit + 1]) for unit in ahead.units[way])
            for stage, ahead, way in zip(stages, fronts, ways, strict=True)
        )
        sent = self.problem.traffic.edges(starts)
        links = {ends: job.link(*ends) for ends in sent}
        transfer = {ends: link.seconds(sent[ends]) for ends, link in links.items() if link is not None}
        calls = calling(transfer, len(stages), job.hardware.message_seconds)
        costs = [
            stage.costs(float(ahead.seconds[way]), int(ahead.kept[way]), beside)
            for stage, ahead, way, beside in zip(stages, fronts, ways, calls, strict=True)
        ]
        edges = frozenset(sent) | job.chain
        whole = Costs(tuple(costs), transfer)
        where = frozenset(s for s, units in enumerate(again) if units)
        compiled = job.orders(where, edges)
        schedule = replace(compiled.schedule, recomputes=where)
        return Judged(stages, again, schedule, whole, edges, compiled(whole, where))

    def over(self, starts: Sequence[int]) -> int:
        """Bytes that the fullest rank has too much, or less than nothing, if as much as may be is recomputed."""
        job = self.problem.job
        stages = self._partition(starts)
        most: list[int] = []
        for held in job.held:
            live = [stages[s].live for s in held.stages]
            fronts = [
                (stages[s].each_block if job.recompute == "blocks" else stages[s].everything)
                if s in job.recomputes
                else stages[s].nothing
                for s in held.stages
            ]
            least = [stage.boundary + int(only.kept[0]) for stage, only in zip(live, fronts, strict=True)]
            most.append(peak(held, live, least) + sum(stages[s].parts.fixed for s in held.stages))
        return max(most) - job.memory_limit

    def _partition(self, starts: Sequence[int]) -> tuple[Stage, ...]:
        stages, near = [self.stage(*ends) for ends in pairwise(starts)], [0] * (len(starts) - 1)
        if self.problem.job.mesh.pp < len(stages):
            for (source, target), nbytes in self.problem.traffic.edges(starts).items():
                near[target] += nbytes if self.problem.job.link(source, target) is None else 0
        made = tuple(stage.handed(nbytes) for stage, nbytes in zip(stages, near, strict=True))
        again = self.problem.job.recomputes if self.problem.job.recompute == "blocks" else ()
        return tuple(stage.blockwise if s in again else stage for s, stage in enumerate(made))

    def stage(self, start: int, stop: int) -> Stage:
        """Segments ``start .. stop - 1`` as a stage."""
        if (start, stop) not in self._stages:
            self._stages[start, stop] = self._made(start, stop)
        return self._stages[start, stop]

    def _made(self, start: int, stop: int) -> Stage:
        problem, ops = self.problem, self.problem.ops
        first, last = int(problem.positions[start]), int(problem.positions[stop])
        borders = problem.borders.tolist()
        inside = borders[bisect_right(borders, first) : bisect_left(borders, last)]
        parts, units = problem.memory.parts(first, last), (first, *inside, last)
        made = Stage(
            parts=parts,
            live=_live(parts),
            borders=units,
            forward=float(ops.forward[last] - ops.forward[first]),
            backward=float(ops.backward[last] - ops.backward[first]),
            weight=float(ops.weight[last] - ops.weight[first]),
        )
        return self._by_blocks(made) if problem.job.recompute == "blocks" else made

    def _by_blocks(self, stage: Stage) -> Stage:
        """See ``Stage``; what is sent is computed again like the rest, so it is not kept. What is behind the blocks
        is through its backward before the first of them is there again."""
        problem, (first, *_, last) = self.problem, stage.borders
        low, high = problem.in_blocks(first, last)
        blocks = problem.blocks
        inside = blocks[(blocks > first) & (blocks < last)].tolist()
        saved, near, far = problem.memory.kept_by((first, *inside, last))
        before, behind, within = 0, 0, 0
        for begin, nbytes in zip((first, *inside), saved, strict=True):
            if begin < low:
                before += nbytes
            elif begin >= high:
                behind += nbytes
            else:
                within = max(within, nbytes)
        kept = sum(near) + far - stage.parts.sent + before
        forward = problem.ops.forward
        return replace(
            stage,
            by_block=(kept + behind, kept + max(behind, within)),
            block_bytes=within if within >= behind else 0,
            in_blocks=(bisect_left(stage.borders, low), bisect_left(stage.borders, high)),
            block_seconds=float(forward[high] - forward[low]),
        )

    def _only(self, stage: Stage, index: int) -> Front:
        job = self.problem.job
        if index not in job.recomputes or job.recompute not in ("full", "blocks"):
            return stage.nothing
        return stage.everything if job.recompute == "full" else stage.each_block

    def _ways(self, ends: tuple[int, int]) -> Front:
        if ends not in self._fronts:
            stage, forward = self.stage(*ends), self.problem.ops.forward
            saved, near, far = self.problem.memory.kept_by(stage.borders)
            seconds = np.diff(forward[list(stage.borders)]).tolist()
            self._fronts[ends] = front(seconds, saved, near, far, stage.parts.inputs)
        return self._fronts[ends]
