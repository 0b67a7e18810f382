"""A step of a schedule as lanes, one per rank, time to the right: what pictures (SVG) and traces (JSON) are made of.

rank 0   F0 F1 .. B0 B1     computations as boxes with their micro-batch
stage 0  ▁▁▃▃▃▃▃▃▃▁▁▁▁▁     under it, how many micro-batches are alive
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import Any, NamedTuple, Protocol

from merak_like.partitioner.report.text import percent_text
from merak_like.partitioner.schedules.action import Kind, Schedule, live_changes
from merak_like.partitioner.simulator import Entry

KINDS = {
    Kind.F: ("forward", "#4a74d9", "#8fabea"),
    Kind.R: ("recompute", "#e3a32b", "#f0c978"),
    Kind.B: ("backward", "#2f9e72", "#80c8a9"),
    Kind.W: ("weight gradients", "#9163c4", "#bf9fe0"),
}
"""Kind -> its name, the colour of a rank's first stage, third, .., and of its second, fourth, .."""

WAIT, TRANSFER, AFTER = ("wait", "#f9e1dc"), ("transfer call", "#b5482f"), ("optimizer", "#cfd6e2")
"""What a rank does besides computing: its name and colour."""

WIDTH, LEFT, RIGHT = 1440, 92, 118
"""Of a picture, and of its margins beside the lanes."""
_LANE, _STRIP, _GAP, _AXIS = 34, 12, 14, 32
_STYLE = """
svg { background: #fff; font: 12px/1 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums }
text { fill: #1b1f27 } .dim { fill: #667085 } .title { font-size: 18px; font-weight: 650 } .n { font-size: 10.5px;
  fill: #fff; text-anchor: middle; pointer-events: none } .end { text-anchor: end } .mid { text-anchor: middle }
.rank { font-weight: 600 } .idle { fill: #f1f3f6 } .grid { stroke: #dfe3ea } .live { fill: #c9d0dc }
.step { stroke: #fff; stroke-width: .6 } .odd { fill: #1b1f27 }
"""


class Timed(Protocol):
    """A step with times, simulated or measured; see simulator.Timeline."""

    @property
    def entries(self) -> tuple[tuple[Entry, ...], ...]:
        """When each action of each rank was at work."""
        ...

    @property
    def makespan(self) -> float:
        """Seconds until the last has ended."""
        ...

    @property
    def rank_bubble(self) -> tuple[float, ...]:
        """Fraction of the makespan that each rank computes nothing."""
        ...


class Mark(NamedTuple):
    """Something else than a computation in a rank's lane."""

    rank: int
    start: float
    end: float
    what: str
    category: str
    colour: str


class Bar(NamedTuple):
    """A computation in a rank's lane."""

    rank: int
    entry: Entry
    what: str
    odd: bool
    """Whether it belongs to the second, fourth, .. stage of its rank."""


@dataclass(frozen=True)
class Lanes:
    """The lanes of all ranks below an axis, ``top`` pixels down; ``extent`` seconds fill the width."""

    schedule: Schedule
    timed: Timed
    top: float
    extent: float
    number: Callable[[float], str]
    ranks: Sequence[int]
    """What the lanes are called: the ranks of the pipeline, or those of the job."""
    marks: Sequence[Mark] = ()

    @property
    def bottom(self) -> float:
        """Pixels."""
        return self.top + _AXIS + len(self.ranks) * (_LANE + _STRIP + _GAP)

    def x(self, seconds: float) -> float:
        """Pixels."""
        return LEFT + (seconds * (WIDTH - LEFT - RIGHT) / self.extent if self.extent > 0 else 0.0)

    def y(self, rank: int) -> float:
        """Pixels; the upper end of a lane."""
        return self.top + _AXIS + rank * (_LANE + _STRIP + _GAP)

    def draw(self) -> Iterator[str]:
        """Everything, from the back to the front."""
        yield from self._axis()
        alive = [live(entries) for entries in self.timed.entries]
        most = max((count for steps in alive for _, count in steps), default=1)
        for rank, steps in enumerate(alive):
            y, busy = self.y(rank), 1 - self.timed.rank_bubble[rank]
            beside = WIDTH - RIGHT + 12
            yield f'<text class="rank end" x="{LEFT - 12}" y="{y + 15:g}">rank {self.ranks[rank]}</text>'
            yield f'<text class="dim end" x="{LEFT - 12}" y="{y + 30:g}">{stages_of(self.schedule, rank)}</text>'
            yield f'<rect class="idle" x="{LEFT}" y="{y:g}" width="{WIDTH - LEFT - RIGHT}" height="{_LANE}"/>'
            yield f'<text x="{beside}" y="{y + 15:g}">{percent_text(busy)} busy</text>'
            yield f'<text class="dim" x="{beside}" y="{y + 30:g}">{max(count for _, count in steps)} alive</text>'
            yield f'<path class="live" d="{self._strip(steps, y + _LANE + 1, most)}"/>'
        for mark in self.marks:
            yield from self._box("mark", mark.rank, mark.start, mark.end, mark.what, mark.colour)
        for bar in bars(self.schedule, self.timed):
            action, start, end = bar.entry
            yield from self._box("step", bar.rank, start, end, bar.what, KINDS[action.kind][2 if bar.odd else 1])
            if self.x(end) - self.x(start) >= 6 * len(str(action.micro_batch)) + 3:
                middle = f'x="{self.x((start + end) / 2):.2f}" y="{self.y(bar.rank) + _LANE / 2 + 4:g}"'
                yield f'<text class="{"n odd" if bar.odd else "n"}" {middle}>{action.micro_batch}</text>'

    def _box(self, style: str, rank: int, start: float, end: float, what: str, colour: str) -> Iterator[str]:
        place = f'x="{self.x(start):.2f}" y="{self.y(rank):g}" width="{self.x(end) - self.x(start):.2f}"'
        yield f'<rect class="{style}" {place} height="{_LANE}" fill="{colour}">'
        yield f"<title>{escape(what)}: {self.number(start)} to {self.number(end)}</title></rect>"

    def _axis(self) -> Iterator[str]:
        step = _round_step(self.extent / 10)
        for tick in range(floor(self.extent / step + 1e-9) + 1 if step else 1):
            x = self.x(tick * step)
            yield f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{self.top + 22:g}" y2="{self.bottom:g}"/>'
            yield f'<text class="dim mid" x="{x:.2f}" y="{self.top + 14:g}">{self.number(tick * step)}</text>'

    def _strip(self, steps: Sequence[tuple[float, int]], y: float, most: int) -> str:
        """The outline of the live micro-batches, hanging down from the lane."""
        path = [f"H{self.x(at):.2f}V{y + _STRIP * count / max(most, 1):.2f}" for at, count in steps]
        return f"M{LEFT} {y:g}{''.join(path)}V{y:g}Z"


def document(body: Iterable[str], height: float, title: str) -> str:
    """An SVG file that needs nothing else."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" role="img" aria-label="{escape(title)}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def head(schedule: Schedule, title: str, facts: str, more: Iterable[tuple[str, str]] = ()) -> Iterator[str]:
    """Title, facts, and the legend of what the schedule has and of ``more`` (name, colour); 60 pixels high."""
    yield f'<text class="title" x="{LEFT}" y="34">{escape(title)}</text>'
    yield f'<text class="dim" x="{LEFT}" y="56">{escape(facts)}</text>'
    halves, there = schedule.stages > schedule.ranks, {a.kind for order in schedule.orders for a in order}
    legend = [(name, first, second) for kind, (name, first, second) in KINDS.items() if kind in there]
    x = WIDTH - RIGHT
    for name, first, second in reversed([*legend, *((name, colour, colour) for name, colour in more)]):
        x -= 36 + 7 * len(name)
        yield f'<rect x="{x:.0f}" y="24" width="13" height="13" rx="2" fill="{first}"/>'
        yield f'<rect x="{x + 6.5:.1f}" y="24" width="6.5" height="13" fill="{second if halves else first}"/>'
        yield f'<text class="dim" x="{x + 19:.0f}" y="34">{name}</text>'
    note = "grey under a lane: micro-batches alive" + " · light: second stage of a rank" * halves
    yield f'<text class="dim end" x="{WIDTH - RIGHT}" y="56">{note}</text>'


def process(pid: int, name: str) -> Iterator[dict[str, Any]]:
    """Trace events that name a process and keep it in its place."""
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}


def events(schedule: Schedule, timed: Timed, *, pid: int, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Trace events in a process: a thread per rank, and its live micro-batches as a counter."""
    for lane, rank in enumerate(ranks):
        named = {"name": f"rank {rank} ({stages_of(schedule, lane)})"}
        yield {"ph": "M", "pid": pid, "tid": rank, "name": "thread_name", "args": named}
        yield {"ph": "M", "pid": pid, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}}
        for at, count in live(timed.entries[lane]):
            counted = {"name": f"live on rank {rank}", "args": {"micro-batches": count}}
            yield {"ph": "C", "pid": pid, "ts": 1e6 * at, **counted}
    for lane, (action, start, end), what, _ in bars(schedule, timed):
        about = {"what": what, "micro-batch": action.micro_batch, "stage": action.stage}
        yield span(pid, ranks[lane], start, end, str(action), KINDS[action.kind][0], about)


def span(
    pid: int, tid: int, start: float, end: float, name: str, category: str, about: dict[str, Any]
) -> dict[str, Any]:
    """A trace event that lasts."""
    times = {"ts": 1e6 * start, "dur": 1e6 * (end - start)}
    return {"ph": "X", "pid": pid, "tid": tid, **times, "name": name, "cat": category, "args": about}


def bars(schedule: Schedule, timed: Timed) -> Iterator[Bar]:
    """The computations of all ranks."""
    apart = schedule.apart(Kind.R)
    for rank, entries in enumerate(timed.entries):
        own = [stage for stage, on in enumerate(schedule.stage_rank) if on == rank]
        for entry in entries:
            kind, i, stage, peer = entry.action
            if peer < 0:
                inside = kind is Kind.B and stage in schedule.recomputes and (i, stage) not in apart
                what = f"{KINDS[Kind.R][0]} and {KINDS[kind][0]}" if inside else KINDS[kind][0]
                yield Bar(rank, entry, f"{what} of micro-batch {i} on stage {stage}", own.index(stage) % 2 == 1)


def live(entries: Sequence[Entry]) -> list[tuple[float, int]]:
    """(second, micro-batches alive on a rank from then on), each stage of the rank counted by itself."""
    order = tuple(entry.action for entry in entries)
    put_off = {(a.micro_batch, a.stage) for a in order if a.kind is Kind.W}
    count, steps = 0, [(0.0, 0)]
    changing = [
        entry
        for entry in entries
        if entry.action.kind in (Kind.F, Kind.W)
        or (entry.action.kind is Kind.B and (entry.action.micro_batch, entry.action.stage) not in put_off)
    ]
    for entry, (_, change) in zip(changing, live_changes(order), strict=True):
        count += change
        steps.append((entry.start if change > 0 else entry.end, count))
    return steps


def stages_of(schedule: Schedule, rank: int) -> str:
    """``stages 0 7``: what a rank runs."""
    own = [str(stage) for stage, on in enumerate(schedule.stage_rank) if on == rank]
    if len(own) > 3:
        own = [own[0], own[1], "..", own[-1]]
    return f"stage{'s' if len(own) > 1 else ''} {' '.join(own)}"


def _round_step(about: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not less."""
    if about <= 0:
        return 0.0
    power = 10.0 ** floor(log10(about))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= about * (1 - 1e-9))
