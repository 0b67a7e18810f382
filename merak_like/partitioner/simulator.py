"""How long a schedule takes and how much it holds, from costs in seconds and bytes; nothing runs.

The rules of time are those of schedules/clock.py. Costs are per micro-batch and stage; transfers per edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

from merak_like.partitioner.schedules.action import (
    Action,
    Edges,
    Kind,
    Schedule,
    chain,
    check_edges,
)
from merak_like.partitioner.schedules.clock import deadlock, run_clock


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes of one micro-batch on one stage.

    `backward` is the backward for the inputs and `weight` the one for the weights: a B without a W does both. Who never
    splits the backward may give all of it as `backward`. `recompute` is paid by an R, or by the B of a stage that
    recomputes without one.

    A live micro-batch holds `activation_bytes`; between its F and its recompute only `kept_bytes`, and between its B
    and its W `weight_bytes`, which may be more: gradients wait there. Where these are not given, it holds as much
    throughout.
    """

    forward: float
    backward: float
    recompute: float = 0.0
    weight: float = 0.0
    activation_bytes: int = 0
    kept_bytes: int | None = None
    weight_bytes: int | None = None

    def __post_init__(self) -> None:
        for seconds in (self.forward, self.backward, self.recompute, self.weight, self.activation_bytes):
            if not (isfinite(seconds) and seconds >= 0):
                raise ValueError(f"costs must be finite and not negative: {self}")
        if self.kept_bytes is not None and not 0 <= self.kept_bytes <= self.activation_bytes:
            raise ValueError(
                f"a part of the activations cannot be {self.kept_bytes} of {self.activation_bytes} bytes: {self}"
            )
        if self.weight_bytes is not None and self.weight_bytes < 0:
            raise ValueError(f"no micro-batch can hold {self.weight_bytes} bytes: {self}")

    @property
    def kept(self) -> int:
        """Bytes between F and the recompute."""
        return self.activation_bytes if self.kept_bytes is None else self.kept_bytes

    @property
    def held_for_weight(self) -> int:
        """Bytes between B and W."""
        return self.activation_bytes if self.weight_bytes is None else self.weight_bytes


@dataclass(frozen=True)
class Costs:
    """Costs of every stage; transfer[source, target] is the seconds of one hop, either way, 0 where absent."""

    stages: tuple[StageCosts, ...]
    transfer: Mapping[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])

    def __post_init__(self) -> None:
        for (source, target), seconds in self.transfer.items():
            if not (isfinite(seconds) and seconds >= 0 and 0 <= source < target < len(self.stages)):
                raise ValueError(
                    f"transfer {source} -> {target}: {seconds} s must be finite, from a stage to a later one"
                )


class Entry(NamedTuple):
    """Seconds at which an action starts and ends. A transfer's entry lasts from reaching it until it is through."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Totals:
    """The sums of one step that people ask for."""

    makespan: float
    bubble: float
    """Fraction of the makespan that a rank computes nothing, averaged over ranks."""
    rank_bubble: tuple[float, ...]
    peak_live: tuple[int, ...]
    """Per stage, the most micro-batches alive at once."""
    peak_bytes: tuple[int, ...]
    """Per stage, activation bytes at that moment."""
    rank_peak_bytes: tuple[int, ...]
    """Per rank, the most activation bytes at once; less than the sum of its stages' peaks if these come apart."""


@dataclass(frozen=True)
class Timeline(Totals):
    """What one step of a schedule looks like: entries[rank] in program order, and the sums."""

    entries: tuple[tuple[Entry, ...], ...] = ()

    @property
    def span(self) -> float:
        """The longest time from a rank's first computation to its last.

        It is what a step takes when no rank waits for the others before the next one, as Zero Bubble's optimizer does.
        """
        computed = [[entry for entry in rank if entry.action.peer < 0] for rank in self.entries]
        return max((rank[-1].end - rank[0].start for rank in computed if rank), default=0.0)


def simulate(schedule: Schedule, costs: Costs, edges: Edges | None = None) -> Timeline:
    """Return the timeline of one step. Edges default to the chain, plus whatever edges the schedule's transfers use.

    A schedule without transfers takes every hop as a pure delay. With transfers, a channel carries one at a time, and
    none before its receive is posted.
    """
    if len(costs.stages) != schedule.stages:
        raise ValueError(f"{len(costs.stages)} stage costs for a schedule of {schedule.stages} stages: give one each")
    edges = chain(schedule.stages) if edges is None else edges
    check_edges(edges, schedule.stages)
    seconds = _seconds(schedule, costs)
    clock = run_clock(schedule, edges, seconds, costs.transfer)
    if clock.waits:
        raise ValueError(deadlock(schedule, clock.waits)[1])
    entries = tuple(
        tuple(map(Entry, order, starts, ends))
        for order, starts, ends in zip(schedule.orders, clock.starts, clock.ends, strict=True)
    )
    makespan = max((ends[-1] for ends in clock.ends if ends), default=0.0)
    busy = [sum(seconds[a.kind][a.stage][a.micro_batch] for a in order if a.peer < 0) for order in schedule.orders]
    rank_bubble = tuple(1.0 - each / makespan if makespan > 0 else 0.0 for each in busy)
    peak_bytes, rank_peak_bytes = _peak_bytes(schedule, costs)
    return Timeline(
        entries=entries,
        makespan=makespan,
        bubble=sum(rank_bubble) / len(rank_bubble),
        rank_bubble=rank_bubble,
        peak_live=schedule.peak_live(),
        peak_bytes=peak_bytes,
        rank_peak_bytes=rank_peak_bytes,
    )


def _seconds(schedule: Schedule, costs: Costs) -> dict[Kind, list[list[float]]]:
    """Return seconds[kind][stage][micro_batch]; a B does what has no action of its own."""
    micro_batches, stages = schedule.micro_batches, costs.stages
    recomputed, weighed = schedule.apart(Kind.R), schedule.apart(Kind.W)

    def backward(stage: int, i: int) -> float:
        cost = stages[stage]
        inside = cost.recompute if stage in schedule.recomputes and (i, stage) not in recomputed else 0.0
        return inside + cost.backward + (0.0 if (i, stage) in weighed else cost.weight)

    return {
        Kind.F: [[cost.forward] * micro_batches for cost in stages],
        Kind.R: [[cost.recompute] * micro_batches for cost in stages],
        Kind.B: [[backward(stage, i) for i in range(micro_batches)] for stage in range(len(stages))],
        Kind.W: [[cost.weight] * micro_batches for cost in stages],
    }


def _peak_bytes(schedule: Schedule, costs: Costs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the most activation bytes at once of each stage, and of each rank."""
    recomputed, weighed = schedule.apart(Kind.R), schedule.apart(Kind.W)
    stage_held, stage_peak = [0] * schedule.stages, [0] * schedule.stages
    rank_peaks: list[int] = []
    for order in schedule.orders:
        held = peak = 0
        for kind, i, stage, peer in order:
            if peer >= 0:
                continue
            cost = costs.stages[stage]
            apart = (i, stage) in recomputed
            kept = cost.kept if apart or stage in schedule.recomputes else cost.activation_bytes
            during = after = 0  # more bytes while the action runs, and once it has
            if kind is Kind.F:
                during = after = kept
            elif kind is Kind.R:
                during = after = cost.activation_bytes - kept
            elif kind is Kind.B:
                during = 0 if apart else cost.activation_bytes - kept
                left = cost.held_for_weight if (i, stage) in weighed else 0
                after = during + left - cost.activation_bytes
            elif kind is Kind.W:
                after = -cost.held_for_weight
            stage_peak[stage] = max(stage_peak[stage], stage_held[stage] + during)
            peak = max(peak, held + during)
            stage_held[stage] += after
            held += after
        rank_peaks.append(peak)
    return tuple(stage_peak), tuple(rank_peaks)
