"""A simulated step as a picture (SVG, needs nothing else) and as a trace (JSON for Perfetto or chrome://tracing)."""

from __future__ import annotations

import json
from collections.abc import Callable

from merak_like.partitioner.report.lanes import Lanes, document, events, head, process
from merak_like.partitioner.report.text import percent_text
from merak_like.partitioner.schedules.action import Schedule
from merak_like.partitioner.simulator import Timeline


def to_svg(
    schedule: Schedule, timeline: Timeline, *, title: str, number: Callable[[float], str] = "{:g}".format
) -> str:
    """Draw one lane per rank, time to the right; under each lane how many micro-batches are alive on it."""
    facts = (
        f"{number(timeline.makespan)} a step · {percent_text(timeline.bubble)} bubble · "
        f"{schedule.micro_batches} micro-batches · {_counted(schedule.ranks, 'rank')} · "
        f"{_counted(schedule.stages, 'stage')}"
    )
    lanes = Lanes(schedule, timeline, 72, timeline.makespan, number, range(schedule.ranks))
    return document([*head(schedule, title, facts), *lanes.draw()], lanes.bottom + 34, title)


def to_chrome(schedule: Schedule, timeline: Timeline) -> str:
    """Write the trace events: one thread per rank, and its live micro-batches as a counter."""
    made = [*process(0, "planned step"), *events(schedule, timeline, pid=0, ranks=range(schedule.ranks))]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": made}) + "\n"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
