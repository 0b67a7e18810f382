"""How lines run between the boxes of a picture: beside boxes and never through them.

::

       margin   ┌──────── bus of shelf 0 ────────┐
         ┌──────┤  ┌───┐                         │ ┌───┐     A value read elsewhere than in the next unit goes up the
         │      └──┤ a │   gutters stand left of ├►│ c │     gutter of its lane, along the bus of its shelf and down the
         │         ├───┤   their lane's boxes    │ ├───┤     gutters of its readers; to another shelf by the margin.
         │         │ b │                         └►│ d │     Each such way has a track of its own wherever two would
         │         └───┘                           └───┘     share a gutter, a bus or the margin.
         └────┬── bus of shelf 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from merak_like.partitioner.plan import Unit

TRACK = 5
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that stands for something by index."""

    index: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Lane:
    """Units under each other."""

    stage: int
    shelf: int
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Edge:
    """A value's way from one unit to its readers: an SVG path, and the tips of its arrows."""

    source: int
    targets: tuple[int, ...]
    path: str
    tips: tuple[tuple[float, float, bool], ...]
    """(x, y, points down): else it points right."""
    skip: bool


@dataclass(frozen=True, slots=True)
class Skip:
    """A value read elsewhere than in the next unit."""

    source: int
    targets: tuple[int, ...]
    lanes: tuple[int, ...]
    """Lanes it touches, its own first."""


@dataclass(frozen=True, slots=True)
class Routes:
    """The track of every skip (by its place in ``skips``) in each gutter, on each bus, in the margin; -1: not there."""

    skips: tuple[Skip, ...]
    gutters: list[list[int]]
    buses: list[list[int]]
    margin: list[int]


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the boxes stand, for drawing."""

    boxes: tuple[Box, ...]
    lanes: tuple[Lane, ...]
    lane_of: dict[int, int]
    lane_x: list[float]
    bus: list[float]
    """The y of each shelf's lowest bus track."""
    bottoms: list[float]
    turn: float
    """How far right of a box a line to the next lane goes up."""
    below: float
    """How far below a shelf a line to the next shelf runs."""


def find_routes(units: Sequence[Unit], lanes: Sequence[Lane], offset: dict[int, float]) -> Routes:
    """Choose tracks; ``offset`` is each unit's y below the top of its lane."""
    lane_of = {u: i for i, lane in enumerate(lanes) for u in lane.units}
    skips = _skips(units, lane_of)
    gutters: list[list[int]] = []
    for lane in range(len(lanes)):
        spans: list[Point | None] = []
        for skip in skips:
            ys = [offset[u] for u in (skip.source, *skip.targets) if lane_of[u] == lane]
            spans.append((-1.0 if len(skip.lanes) > 1 else min(ys), max(ys)) if ys else None)
        gutters.append(pack(spans))
    buses = [pack([_on_shelf(skip, lanes, shelf) for skip in skips]) for shelf in range(lanes[-1].shelf + 1)]
    margin = pack([_down(skip, lanes) for skip in skips])
    return Routes(skips, gutters, buses, margin)


def _skips(units: Sequence[Unit], lane_of: dict[int, int]) -> tuple[Skip, ...]:
    readers: dict[int, list[int]] = {}
    for u, unit in enumerate(units):
        for source in unit.reads:
            if source < u - 1:
                readers.setdefault(source, []).append(u)
    return tuple(
        Skip(s, tuple(targets), tuple(dict.fromkeys((lane_of[s], *(lane_of[t] for t in targets)))))
        for s, targets in sorted(readers.items())
    )


def _on_shelf(skip: Skip, lanes: Sequence[Lane], shelf: int) -> Point | None:
    """The lanes of a shelf between which a skip runs; from the margin on if it touches other shelves."""
    here = [lane for lane in skip.lanes if lanes[lane].shelf == shelf]
    if not here or len(skip.lanes) == 1:
        return None
    return (-1.0 if len(here) < len(skip.lanes) else min(here), max(here))


def _down(skip: Skip, lanes: Sequence[Lane]) -> Point | None:
    shelves = [lanes[lane].shelf for lane in skip.lanes]
    return (min(shelves), max(shelves)) if len(set(shelves)) > 1 else None


def pack(spans: Sequence[Point | None]) -> list[int]:
    """A track for each span so that no two spans of a track touch, few tracks; -1 for None."""
    tracks = [-1] * len(spans)
    ends: list[float] = []
    for start, end, n in sorted((*span, n) for n, span in enumerate(spans) if span is not None):
        free = next((t for t, last in enumerate(ends) if last < start), len(ends))
        ends[free : free + 1] = [end]
        tracks[n] = free
    return tracks


def edges(units: Sequence[Unit], routes: Routes, frame: Frame) -> tuple[Edge, ...]:
    """Everything that units read, as lines."""
    rails = [_rail(number, skip, routes, frame) for number, skip in enumerate(routes.skips)]
    return (*rails, *(_chain(u, frame) for u, unit in enumerate(units) if u and u - 1 in unit.reads))


def _chain(u: int, frame: Frame) -> Edge:
    """From a unit to the next: straight down, or up beside the lane and over, or below to the next shelf."""
    a, b = frame.boxes[u - 1], frame.boxes[u]
    before, lane = frame.lane_of[u - 1], frame.lane_of[u]
    if before == lane:
        x = b.x + b.width / 2
        return Edge(u - 1, (u,), f"M{x:g} {a.y + a.height:g}V{b.y - 4:g}", ((x, b.y, True),), False)
    start, end, turn = a.y + a.height / 2, b.y + b.height / 2, a.x + a.width + frame.turn
    way: list[Point] = [(a.x + a.width, start), (turn, start)]
    if frame.lanes[before].shelf == frame.lanes[lane].shelf:
        way += [(turn, end)]
    else:
        low = frame.bottoms[frame.lanes[before].shelf] + frame.below
        way += [(turn, low), (TRACK, low), (TRACK, end)]
    return Edge(u - 1, (u,), polyline([*way, (b.x - 4, end)]), ((b.x, end, False),), False)


def _rail(number: int, skip: Skip, routes: Routes, frame: Frame) -> Edge:
    """A value's rails: out of its unit to the gutter, by buses to other lanes, a tap into every reader."""
    source, home = frame.boxes[skip.source], skip.lanes[0]
    track_x = {lane: frame.lane_x[lane] - 10 - TRACK * routes.gutters[lane][number] for lane in skip.lanes}
    bus = {shelf: y - TRACK * routes.buses[shelf][number] for shelf, y in enumerate(frame.bus)}
    margin = TRACK * (2 + routes.margin[number])
    exit_y = source.y + source.height / 2 + 4
    shelf = frame.lanes[home].shelf
    way = [(source.x, exit_y), (track_x[home], exit_y)]  # what lanes share is drawn once: twice would look bold
    parts: list[str] = []
    tips: list[tuple[float, float, bool]] = []
    for lane in skip.lanes:
        ends = [
            (frame.boxes[t].x, frame.boxes[t].y + frame.boxes[t].height / 2 - 4)
            for t in skip.targets
            if frame.lane_of[t] == lane
        ]
        if not ends:
            continue
        x, (last_x, last_y), there = track_x[lane], ends[-1], frame.lanes[lane].shelf
        over: list[Point] = [] if lane == home else [(way[-1][0], bus[shelf]), (x, bus[there])]
        if there != shelf:
            over[1:1] = [(margin, bus[shelf]), (margin, bus[there])]
        parts.append(polyline([*way, *over, (x, last_y), (last_x - 4, last_y)]))
        parts += [f"M{x:g} {y:g}H{to - 4:g}" for to, y in ends[:-1]]
        tips += [(to, y, False) for to, y in ends]
        way, shelf = (way[-1:] if lane == home else [(x, bus[there])]), there
    return Edge(skip.source, skip.targets, "".join(parts), tuple(tips), True)


def polyline(points: Sequence[Point], radius: float = 4) -> str:
    """An SVG path along points with rounded corners."""
    (x, y), path = points[0], f"M{points[0][0]:g} {points[0][1]:g}"
    for (cx, cy), (nx, ny) in pairwise(points[1:]):
        before, after = max(abs(cx - x), abs(cy - y)), max(abs(nx - cx), abs(ny - cy))
        r = min(radius, before / 2, after / 2)
        back = (cx - r * _sign(cx - x), cy - r * _sign(cy - y))
        on = (cx + r * _sign(nx - cx), cy + r * _sign(ny - cy))
        path += f"L{back[0]:g} {back[1]:g}Q{cx:g} {cy:g} {on[0]:g} {on[1]:g}"
        x, y = cx, cy
    return f"{path}L{points[-1][0]:g} {points[-1][1]:g}"


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)
