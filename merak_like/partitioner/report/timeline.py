"""A simulated step as a picture (SVG, needs nothing else) and as a trace (JSON for Perfetto or chrome://tracing)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from math import floor, log10
from typing import Any, NamedTuple

from merak_like.partitioner.report.text import percent_text
from merak_like.partitioner.schedules.action import Kind, Schedule, live_changes
from merak_like.partitioner.simulator import Entry, Timeline

KINDS = {
    Kind.F: ("forward", "#4a74d9", "#8fabea"),
    Kind.R: ("recompute", "#e3a32b", "#f0c978"),
    Kind.B: ("backward", "#2f9e72", "#80c8a9"),
    Kind.W: ("weight gradients", "#9163c4", "#bf9fe0"),
}
"""Kind -> its name, the colour of a rank's first stage, third, .., and of its second, fourth, .."""

_LEFT, _RIGHT, _TOP, _LANE, _STRIP, _GAP = 92, 118, 104, 34, 12, 14
_STYLE = """
svg { background: #fff; font: 12px/1 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums }
text { fill: #1b1f27 } .dim { fill: #667085 } .title { font-size: 18px; font-weight: 650 } .n { font-size: 10.5px;
  fill: #fff; text-anchor: middle; pointer-events: none } .end { text-anchor: end } .mid { text-anchor: middle }
.rank { font-weight: 600 } .idle { fill: #f1f3f6 } .grid { stroke: #dfe3ea } .live { fill: #c9d0dc }
.step { stroke: #fff; stroke-width: .6 } .odd { fill: #1b1f27 }
"""


class _Bar(NamedTuple):
    entry: Entry
    rank: int
    told: str
    odd: bool
    """Whether it belongs to the second, fourth, .. stage of its rank."""


def to_svg(
    schedule: Schedule,
    timeline: Timeline,
    *,
    title: str,
    number: Callable[[float], str] = "{:g}".format,
    width: int = 1440,
) -> str:
    """Draw one lane per rank, time to the right; under each lane how many micro-batches are alive on it."""
    ranks, plot = schedule.ranks, width - _LEFT - _RIGHT
    scale = plot / timeline.makespan if timeline.makespan > 0 else 0.0
    bottom = _TOP + ranks * (_LANE + _STRIP + _GAP)
    most = max((count for rank in range(ranks) for _, count in _live(schedule, timeline, rank)), default=1)
    body = [*_head(schedule, timeline, title, number, width), *_axis(timeline.makespan, scale, bottom, number)]
    for rank in range(ranks):
        y = _TOP + rank * (_LANE + _STRIP + _GAP)
        busy, peak = 1 - timeline.rank_bubble[rank], max((n for _, n in _live(schedule, timeline, rank)), default=0)
        body += [
            f'<text class="rank end" x="{_LEFT - 12}" y="{y + 15}">rank {rank}</text>',
            f'<text class="dim end" x="{_LEFT - 12}" y="{y + 30}">{_stages(schedule, rank)}</text>',
            f'<rect class="idle" x="{_LEFT}" y="{y}" width="{plot}" height="{_LANE}"/>',
            f'<text x="{width - _RIGHT + 12}" y="{y + 15}">{percent_text(busy)} busy</text>',
            f'<text class="dim" x="{width - _RIGHT + 12}" y="{y + 30}">{peak} alive</text>',
            f'<path class="live" d="{_strip(schedule, timeline, rank, scale, y + _LANE + 1, most)}"/>',
        ]
    body += [part for bar in _bars(schedule, timeline) for part in _box(bar, scale, number)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 34}" width="{width}" '
        f'height="{bottom + 34}" role="img" aria-label="{escape(title)}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def to_chrome(schedule: Schedule, timeline: Timeline) -> str:
    """Write the trace events: one thread per rank, and its live micro-batches as a counter."""
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "planned step"}}]
    for rank in range(schedule.ranks):
        named = {"name": f"rank {rank} ({_stages(schedule, rank)})"}
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": named})
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}})
        for at, count in _live(schedule, timeline, rank):
            events.append(
                {"ph": "C", "pid": 0, "ts": 1e6 * at, "name": f"live on rank {rank}", "args": {"micro-batches": count}}
            )
    for entry, rank, told, _ in _bars(schedule, timeline):
        action, start, end = entry
        about = {"what": told, "micro-batch": action.micro_batch, "stage": action.stage}
        events.append(
            {
                "ph": "X", "pid": 0, "tid": rank, "ts": 1e6 * start, "dur": 1e6 * (end - start),
                "name": str(action), "cat": KINDS[action.kind][0], "args": about,
            }
        )  # fmt: skip
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n"


def _bars(schedule: Schedule, timeline: Timeline) -> Iterator[_Bar]:
    apart = schedule.apart(Kind.R)
    for rank, entries in enumerate(timeline.entries):
        own = [stage for stage, on in enumerate(schedule.stage_rank) if on == rank]
        for entry in entries:
            kind, i, stage, peer = entry.action
            if peer < 0:
                inside = kind is Kind.B and stage in schedule.recomputes and (i, stage) not in apart
                what = f"{KINDS[Kind.R][0]} and {KINDS[kind][0]}" if inside else KINDS[kind][0]
                yield _Bar(entry, rank, f"{what} of micro-batch {i} on stage {stage}", own.index(stage) % 2 == 1)


def _box(bar: _Bar, scale: float, number: Callable[[float], str]) -> Iterator[str]:
    action, start, end = bar.entry
    x, wide, y = _LEFT + start * scale, (end - start) * scale, _TOP + bar.rank * (_LANE + _STRIP + _GAP)
    colour = KINDS[action.kind][2 if bar.odd else 1]
    yield f'<rect class="step" x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{_LANE}" fill="{colour}">'
    yield f"<title>{bar.told}: {number(start)} to {number(end)}</title></rect>"
    if wide >= 6 * len(str(action.micro_batch)) + 3:
        style = "n odd" if bar.odd else "n"
        middle = f'x="{x + wide / 2:.2f}" y="{y + _LANE / 2 + 4:g}"'
        yield f'<text class="{style}" {middle}>{action.micro_batch}</text>'


def _head(
    schedule: Schedule, timeline: Timeline, title: str, number: Callable[[float], str], width: int
) -> Iterator[str]:
    facts = (
        f"{number(timeline.makespan)} a step · {percent_text(timeline.bubble)} bubble · "
        f"{schedule.micro_batches} micro-batches · {_counted(schedule.ranks, 'rank')} · "
        f"{_counted(schedule.stages, 'stage')}"
    )
    yield f'<text class="title" x="{_LEFT}" y="34">{escape(title)}</text>'
    yield f'<text class="dim" x="{_LEFT}" y="56">{escape(facts)}</text>'
    x = width - _RIGHT
    there = {action.kind for order in schedule.orders for action in order}
    for kind, (name, first, second) in reversed(KINDS.items()):
        if kind in there:
            x -= 36 + 7 * len(name)
            halves = schedule.stages > schedule.ranks
            yield f'<rect x="{x:.0f}" y="24" width="13" height="13" rx="2" fill="{first}"/>'
            yield f'<rect x="{x + 6.5:.1f}" y="24" width="6.5" height="13" fill="{second if halves else first}"/>'
            yield f'<text class="dim" x="{x + 19:.0f}" y="34">{name}</text>'
    note = "grey under a lane: micro-batches alive"
    if schedule.stages > schedule.ranks:
        note += " · light: second stage of a rank"
    yield f'<text class="dim end" x="{width - _RIGHT}" y="56">{note}</text>'


def _axis(makespan: float, scale: float, bottom: int, number: Callable[[float], str]) -> Iterator[str]:
    step = _round_step(makespan / 10)
    count = floor(makespan / step + 1e-9) if step else 0
    for tick in range(count + 1):
        x = _LEFT + tick * step * scale
        yield f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{_TOP - 10}" y2="{bottom}"/>'
        yield f'<text class="dim mid" x="{x:.2f}" y="{_TOP - 18}">{number(tick * step)}</text>'


def _round_step(about: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not less."""
    if about <= 0:
        return 0.0
    power = 10.0 ** floor(log10(about))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= about * (1 - 1e-9))


def _live(schedule: Schedule, timeline: Timeline, rank: int) -> list[tuple[float, int]]:
    """(second, micro-batches alive on the rank from then on), each stage of the rank counted by itself."""
    order, entries = schedule.orders[rank], timeline.entries[rank]
    put_off = {(a.micro_batch, a.stage) for a in order if a.kind is Kind.W}
    frees = [
        a.kind is Kind.F or a.kind is Kind.W or (a.kind is Kind.B and (a.micro_batch, a.stage) not in put_off)
        for a in order
    ]
    moments = [entry.start if entry.action.kind is Kind.F else entry.end for entry in entries]
    at = [moment for moment, changes in zip(moments, frees, strict=True) if changes]
    count, steps = 0, [(0.0, 0)]
    for moment, (_, change) in zip(at, live_changes(order), strict=True):
        count += change
        steps.append((moment, count))
    return steps


def _strip(schedule: Schedule, timeline: Timeline, rank: int, scale: float, y: float, most: int) -> str:
    """The outline of the live micro-batches, hanging down from the lane."""
    steps: Sequence[tuple[float, int]] = _live(schedule, timeline, rank)
    path = [f"M{_LEFT} {y}"]
    for at, count in steps:
        path.append(f"H{_LEFT + at * scale:.2f}V{y + _STRIP * count / max(most, 1):.2f}")
    return "".join(path) + f"V{y}Z"


def _stages(schedule: Schedule, rank: int) -> str:
    own = [str(stage) for stage, on in enumerate(schedule.stage_rank) if on == rank]
    if len(own) > 3:
        own = [own[0], own[1], "..", own[-1]]
    return f"stage{'s' if len(own) > 1 else ''} {' '.join(own)}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
