"""Where everything stands in the picture of a plan: boxes, lanes, cuts, and lines that do not run through boxes.

::

    panel of stage 0          cut 0      panel of stage 1
    ┌──────────────┐            ┊       ┌──────────────┐
    │  ┌───────────┼────────────┊───────┼───┐   bus    │    a value read far away goes up its lane's gutter,
    │  │ ┌──────┐  │            ┊       │   │ ┌──────┐ │    along the bus and down the gutters of its readers
    │  │ │ wte  │  │  ┌─────────┊───────┼───┼►│ h.2  │ │
    │  │ └──┬───┘  │  │         ┊       │   │ └──┬───┘ │
    │  │ ┌──▼───┐  │  │         ┊       │   │ ┌──▼───┐ │
    │  └─┤ h.0  ├──┼──┘         ┊       │   └►│ h.3  │ │
    │    └──────┘  │            ┊       │     └──────┘ │
    └──────────────┘            ┊       └──────────────┘

Units run top-down in lanes; a stage with many units has several lanes side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from merak_like.partitioner.plan import Plan, Unit

BOX_WIDTH, BOX_HEIGHT, ROW, BLOCK_GAP = 196, 22, 27, 7
HEADER, PAD, TRACK, GUTTER = 46, 12, 5, 16
GAP = 156
"""Room between two panels, for the cut and its list of values."""
LANE_RIGHT = 18
FIT = (1500, 940)
"""The picture aims at this shape: wider or higher only when it must."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; ``index`` is a unit's, a stage's or a cut's, by where it stands in the scene."""

    index: int
    x: float
    y: float
    width: float
    height: float


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
class Scene:
    """The whole picture."""

    width: float
    height: float
    units: tuple[Box, ...]
    panels: tuple[Box, ...]
    blocks: tuple[Box, ...]
    gaps: tuple[Box, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class _Lane:
    stage: int
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Skip:
    """A value read elsewhere than in the next unit."""

    source: int
    targets: tuple[int, ...]
    lanes: tuple[int, ...]
    """Lanes it touches, its own first."""


def arrange(plan: Plan) -> Scene:
    """Place the units of a plan and route what they read."""
    units = plan.units
    lanes = _lanes(units, len(plan.stages))
    lane_of = {u: i for i, lane in enumerate(lanes) for u in lane.units}
    offset = _offsets(units, lanes)
    skips = _skips(units, lane_of)
    gutter_tracks = _pack_gutters(skips, lanes, lane_of, offset)
    bus_tracks = pack([(s.lanes[0], max(s.lanes)) if len(s.lanes) > 1 else None for s in skips])

    top = HEADER + PAD + TRACK * (1 + max(bus_tracks, default=-1))
    bottom = top + max(offset.values(), default=0) + BOX_HEIGHT + PAD
    lane_x, panels, width = _columns(lanes, gutter_tracks, bottom)
    boxes = tuple(Box(u, lane_x[lane_of[u]], top + offset[u], BOX_WIDTH, BOX_HEIGHT) for u in sorted(lane_of) if units)
    chains = [_chain(boxes, u, lane_of, top) for u, unit in enumerate(units) if u and u - 1 in unit.reads]
    rails = [
        _rail(
            skip, boxes, lane_of, lane_x, {i: gutter_tracks[i][n] for i in skip.lanes}, HEADER + PAD / 2 + TRACK * bus
        )
        for n, (skip, bus) in enumerate(zip(skips, bus_tracks, strict=True))
    ]
    gaps = tuple(
        Box(left.index, left.x + left.width, 0, right.x - left.x - left.width, bottom)
        for left, right in pairwise(panels)
    )
    return Scene(width, bottom, boxes, panels, _blocks(units, lanes, boxes), gaps, (*rails, *chains))


def _lanes(units: Sequence[Unit], stages: int) -> tuple[_Lane, ...]:
    """Units of each stage in lanes of about equal length, broken between blocks, for a picture that fits the eye."""
    by_stage = [[i for i, u in enumerate(units) if u.stage == s] for s in range(stages)]

    def stretch(rows: int) -> float:
        columns = sum(max(1, ceil(len(mine) / rows)) for mine in by_stage)
        width = columns * (BOX_WIDTH + 50) + (stages - 1) * GAP
        return max(width / FIT[0], min(rows, max(map(len, by_stage))) * (ROW + BLOCK_GAP / 2) / FIT[1])

    rows = min(range(10, 61), key=stretch)
    lanes: list[_Lane] = []
    for stage, mine in enumerate(by_stage):
        length = ceil(len(mine) / max(1, ceil(len(mine) / rows)))
        lane: list[int] = []
        for u in mine:
            enough = len(lane) >= length
            if lane and enough and (units[u].block != units[lane[-1]].block or len(lane) >= length + 3):
                lanes.append(_Lane(stage, tuple(lane)))
                lane = []
            lane.append(u)
        lanes.append(_Lane(stage, tuple(lane)))
    return tuple(lanes)


def _offsets(units: Sequence[Unit], lanes: Sequence[_Lane]) -> dict[int, float]:
    """Each unit's y below the top of its lane; a little room between blocks."""
    offset: dict[int, float] = {}
    for lane in lanes:
        y = 0.0
        for before, u in zip((None, *lane.units), lane.units, strict=False):
            if before is not None:
                y += ROW + (BLOCK_GAP if units[before].block != units[u].block else 0)
            offset[u] = y
    return offset


def _skips(units: Sequence[Unit], lane_of: dict[int, int]) -> list[_Skip]:
    readers: dict[int, list[int]] = {}
    for u, unit in enumerate(units):
        for source in unit.reads:
            if source < u - 1:
                readers.setdefault(source, []).append(u)
    return [
        _Skip(s, tuple(targets), tuple(dict.fromkeys((lane_of[s], *(lane_of[t] for t in targets)))))
        for s, targets in sorted(readers.items())
    ]


def pack(spans: Sequence[tuple[float, float] | None]) -> list[int]:
    """A track for each span so that no two spans of a track touch, few tracks; -1 for None."""
    tracks = [-1] * len(spans)
    ends: list[float] = []
    for start, end, n in sorted((*span, n) for n, span in enumerate(spans) if span is not None):
        free = next((t for t, last in enumerate(ends) if last < start), len(ends))
        ends[free : free + 1] = [end]
        tracks[n] = free
    return tracks


def _pack_gutters(
    skips: Sequence[_Skip], lanes: Sequence[_Lane], lane_of: dict[int, int], offset: dict[int, float]
) -> list[list[int]]:
    """For each lane the track of each skip in its gutter, -1 where it does not come."""
    packed: list[list[int]] = []
    for lane in range(len(lanes)):
        spans: list[tuple[float, float] | None] = []
        for skip in skips:
            ys = [offset[u] for u in (skip.source, *skip.targets) if lane_of[u] == lane]
            rises = len(skip.lanes) > 1 and lane in skip.lanes
            spans.append((-1.0 if rises else min(ys), max(ys)) if ys else None)
        packed.append(pack(spans))
    return packed


def _columns(
    lanes: Sequence[_Lane], gutter_tracks: Sequence[Sequence[int]], bottom: float
) -> tuple[list[float], tuple[Box, ...], float]:
    """The x of each lane's boxes, the panels, the width of the picture."""
    lane_x: list[float] = []
    panels: list[Box] = []
    x, left, stage = 0.0, 0.0, lanes[0].stage
    for lane, tracks in zip(lanes, gutter_tracks, strict=True):
        if lane.stage != stage:
            panels.append(Box(stage, left, 0, x - left, bottom))
            x += GAP
            left, stage = x, lane.stage
        x += GUTTER + TRACK * (1 + max(tracks, default=-1))
        lane_x.append(x)
        x += BOX_WIDTH + LANE_RIGHT
    panels.append(Box(stage, left, 0, x - left, bottom))
    return lane_x, tuple(panels), x


def _chain(boxes: Sequence[Box], u: int, lane_of: dict[int, int], top: float) -> Edge:
    """From a unit to the next: straight down, or up beside the lane and over to the next one."""
    a, b = boxes[u - 1], boxes[u]
    if lane_of[u - 1] == lane_of[u]:
        x = b.x + BOX_WIDTH / 2
        return Edge(u - 1, (u,), f"M{x:g} {a.y + a.height:g}V{b.y - 4:g}", ((x, b.y, True),), False)
    start, end = a.y + a.height / 2, b.y + b.height / 2
    turn = a.x + a.width + LANE_RIGHT / 2
    path = polyline([(a.x + a.width, start), (turn, start), (turn, end), (b.x - 4, end)])
    return Edge(u - 1, (u,), path, ((b.x, end, False),), False)


def _rail(
    skip: _Skip,
    boxes: Sequence[Box],
    lane_of: dict[int, int],
    lane_x: Sequence[float],
    tracks: dict[int, int],
    bus: float,
) -> Edge:
    """A value's rails: out of its unit to the gutter, by the bus to other lanes, a tap into every reader."""
    source, home = boxes[skip.source], lane_of[skip.source]
    track_x = {lane: lane_x[lane] - 10 - TRACK * track for lane, track in tracks.items()}
    exit_y = source.y + source.height / 2 + 4
    way = [(source.x, exit_y), (track_x[home], exit_y)]  # what lanes share is drawn once: twice would look bold
    parts: list[str] = []
    tips: list[tuple[float, float, bool]] = []
    for lane in skip.lanes:
        ends = [(boxes[t].x, boxes[t].y + boxes[t].height / 2 - 4) for t in skip.targets if lane_of[t] == lane]
        if not ends:
            continue
        x, (last_x, last_y) = track_x[lane], ends[-1]
        over = [] if lane == home else [(way[-1][0], bus), (x, bus)]
        parts.append(polyline([*way, *over, (x, last_y), (last_x - 4, last_y)]))
        parts += [f"M{x:g} {y:g}H{to - 4:g}" for to, y in ends[:-1]]
        tips += [(to, y, False) for to, y in ends]
        way = way[-1:] if lane == home else [(x, bus)]
    return Edge(skip.source, skip.targets, "".join(parts), tuple(tips), True)


def polyline(points: Sequence[tuple[float, float]], radius: float = 4) -> str:
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


def _blocks(units: Sequence[Unit], lanes: Sequence[_Lane], boxes: Sequence[Box]) -> tuple[Box, ...]:
    """A frame round the units of one block that stand together."""
    frames: list[Box] = []
    for lane in lanes:
        runs: list[list[int]] = []
        for u in lane.units:
            if runs and units[runs[-1][0]].block == units[u].block:
                runs[-1].append(u)
            else:
                runs.append([u])
        for run in runs:
            first, last = boxes[run[0]], boxes[run[-1]]
            frame = Box(run[0], first.x - 3, first.y - 3, BOX_WIDTH + 6, last.y + last.height - first.y + 6)
            frames.extend([frame] if len(run) > 1 else [])
    return tuple(frames)
