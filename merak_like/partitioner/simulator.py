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
    live_changes,
)
from merak_like.partitioner.schedules.clock import deadlock, run_clock


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes of one micro-batch on one stage.

    B costs `backward`, W costs `weight`: for a split backward give the halves. A stage that recomputes without an R of
    its own in the schedule has the recompute inside `backward`.
    """

    forward: float
    backward: float
    recompute: float = 0.0
    weight: float = 0.0
    activation_bytes: int = 0

    def __post_init__(self) -> None:
        for seconds in (self.forward, self.backward, self.recompute, self.weight, self.activation_bytes):
            if not (isfinite(seconds) and seconds >= 0):
                raise ValueError(f"costs must be finite and not negative: {self}")


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
class Timeline:
    """What one step of a schedule looks like: entries[rank] in program order, and the sums people ask for."""

    entries: tuple[tuple[Entry, ...], ...]
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


def simulate(schedule: Schedule, costs: Costs, edges: Edges | None = None) -> Timeline:
    """Return the timeline of one step. Edges default to the chain, plus whatever edges the schedule's transfers use.

    A schedule without transfers takes every hop as a pure delay. With transfers, a channel carries one at a time, and
    none before its receive is posted.
    """
    if len(costs.stages) != schedule.stages:
        raise ValueError(f"{len(costs.stages)} stage costs for a schedule of {schedule.stages} stages: give one each")
    edges = chain(schedule.stages) if edges is None else edges
    check_edges(edges, schedule.stages)
    seconds = {
        Kind.F: [stage.forward for stage in costs.stages],
        Kind.R: [stage.recompute for stage in costs.stages],
        Kind.B: [stage.backward for stage in costs.stages],
        Kind.W: [stage.weight for stage in costs.stages],
    }
    clock = run_clock(schedule, edges, seconds, costs.transfer)
    if clock.waits:
        raise ValueError(deadlock(schedule, clock.waits)[1])
    entries = tuple(
        tuple(map(Entry, order, starts, ends))
        for order, starts, ends in zip(schedule.orders, clock.starts, clock.ends, strict=True)
    )
    makespan = max((ends[-1] for ends in clock.ends if ends), default=0.0)
    busy = [sum(seconds[a.kind][a.stage] for a in order if a.peer < 0) for order in schedule.orders]
    rank_bubble = tuple(1.0 - each / makespan if makespan > 0 else 0.0 for each in busy)
    peak_live = schedule.peak_live()
    return Timeline(
        entries=entries,
        makespan=makespan,
        bubble=sum(rank_bubble) / len(rank_bubble),
        rank_bubble=rank_bubble,
        peak_live=peak_live,
        peak_bytes=tuple(live * stage.activation_bytes for live, stage in zip(peak_live, costs.stages, strict=True)),
        rank_peak_bytes=_rank_peak_bytes(schedule, costs),
    )


def _rank_peak_bytes(schedule: Schedule, costs: Costs) -> tuple[int, ...]:
    peaks: list[int] = []
    for order in schedule.orders:
        held = peak = 0
        for stage, change in live_changes(order):
            held += change * costs.stages[stage].activation_bytes
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)
