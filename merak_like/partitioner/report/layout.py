"""Where everything stands in the picture of a plan: units in lanes, lanes in panels, panels on shelves.

::

    ┌ stage 0 ─┐  cut 0  ┌ stage 1 ─┐  cut 1
    │ wte      │    ┊    │ h.2      │    ┊        Units run top-down in lanes; a stage with many units has several lanes
    │ h.0      │    ┊    │ h.3      │    ┊        side by side. Many stages stand on several shelves, read like lines of
    │ h.1      │    ┊    │          │    ┊        text. How the lines between units run is in routing.py.
    └──────────┘    ┊    └──────────┘    ┊
    ┌ stage 2 ─┐
    │ h.4      │
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from merak_like.partitioner.plan import Plan, Unit
from merak_like.partitioner.report.routing import TRACK, Box, Edge, Frame, Lane, Routes, edges, find_routes
from merak_like.partitioner.report.summary import cuts

BOX_WIDTH, BOX_HEIGHT, ROW, BLOCK_GAP = 196, 22, 27, 7
HEADER, PAD, GUTTER, LANE_RIGHT = 46, 12, 16, 18
GAP = 156
"""Room between two panels, for the cut and its list of values."""
SHELF_GAP = 30
FIT = (1500, 940)
"""The picture aims at this shape: wider or higher only when it must."""
SHELF = 1900
"""Stages that need more width than this go on several shelves."""
LISTED = 6
"""Values listed at a cut; more are in its tip and in the table."""
CARD_HEAD, CARD_ROW, CARD_MORE = 24, 34, 16


@dataclass(frozen=True, slots=True)
class Scene:
    """The whole picture. The index of a box is a unit's, a stage's, or that of the stage before a cut."""

    width: float
    height: float
    units: tuple[Box, ...]
    panels: tuple[Box, ...]
    blocks: tuple[Box, ...]
    gaps: tuple[Box, ...]
    cards: tuple[Box, ...]
    """Where the values of each cut are listed."""
    edges: tuple[Edge, ...]


def arrange(plan: Plan) -> Scene:
    """Place the units of a plan and route what they read."""
    units, stages = plan.units, len(plan.stages)
    lanes = _lanes(units, stages)
    offset = _offsets(units, lanes)
    routes = find_routes(units, lanes, offset)
    heights = [_card_height(len(cut.crossings)) for cut in cuts(plan)]
    tops, bottoms = _rows(lanes, routes, offset, heights)
    lane_x, panels = _columns(lanes, routes, tops, bottoms)
    lane_of = {u: i for i, lane in enumerate(lanes) for u in lane.units}
    boxes = tuple(
        Box(u, lane_x[lane_of[u]], tops[lanes[lane_of[u]].shelf] + offset[u], BOX_WIDTH, BOX_HEIGHT)
        for u in sorted(lane_of)
    )
    gaps = tuple(Box(p.index, p.x + p.width, p.y, GAP, p.height) for p in panels[:-1])
    card_tops = [tops[shelf] + BOX_HEIGHT + PAD for shelf in _shelf_of(lanes)]
    cards = tuple(
        Box(gap.index, gap.x + 10, card_tops[gap.index], GAP - 20, high)
        for gap, high in zip(gaps, heights, strict=True)
    )
    bus = [top - PAD / 2 - TRACK for top in tops]
    frame = Frame(boxes, lanes, lane_of, lane_x, bus, bottoms, LANE_RIGHT / 2, SHELF_GAP / 2)
    width = max(box.x + box.width for box in (*panels, *gaps))
    drawn = edges(units, routes, frame)
    return Scene(width, bottoms[-1], boxes, panels, _blocks(units, lanes, boxes), gaps, cards, drawn)


def _lanes(units: Sequence[Unit], stages: int) -> tuple[Lane, ...]:
    """Units of each stage in lanes of about equal length, broken between blocks, for a picture that fits the eye."""
    by_stage = [[i for i, u in enumerate(units) if u.stage == s] for s in range(stages)]
    longest = max(map(len, by_stage))

    def width(rows: int) -> float:
        columns = sum(max(1, ceil(len(mine) / rows)) for mine in by_stage)
        return columns * (BOX_WIDTH + GUTTER + LANE_RIGHT) + (stages - 1) * GAP

    def stretch(rows: int) -> float:
        shelves = _shelves(width(rows), stages)
        height = shelves * (HEADER + SHELF_GAP + min(rows, longest) * (ROW + BLOCK_GAP / 2))
        return max(width(rows) / shelves / FIT[0], height / FIT[1])

    rows = min(range(10, 61), key=stretch)
    shelves = _shelves(width(rows), stages)
    lanes: list[Lane] = []
    for stage, mine in enumerate(by_stage):
        shelf = stage * shelves // stages
        length = ceil(len(mine) / max(1, ceil(len(mine) / rows)))
        lane: list[int] = []
        for u in mine:
            enough = len(lane) >= length
            if lane and enough and (units[u].block != units[lane[-1]].block or len(lane) >= length + 3):
                lanes.append(Lane(stage, shelf, tuple(lane)))
                lane = []
            lane.append(u)
        lanes.append(Lane(stage, shelf, tuple(lane)))
    return tuple(lanes)


def _shelves(width: float, stages: int) -> int:
    return min(stages, ceil(width / SHELF))


def _offsets(units: Sequence[Unit], lanes: Sequence[Lane]) -> dict[int, float]:
    """Each unit's y below the top of its lane; a little room between blocks."""
    offset: dict[int, float] = {}
    for lane in lanes:
        y = 0.0
        for before, u in zip((None, *lane.units), lane.units, strict=False):
            if before is not None:
                y += ROW + (BLOCK_GAP if units[before].block != units[u].block else 0)
            offset[u] = y
    return offset


def _shelf_of(lanes: Sequence[Lane]) -> list[int]:
    """The shelf of each stage."""
    return list({lane.stage: lane.shelf for lane in lanes}.values())


def _card_height(values: int) -> float:
    return CARD_HEAD + CARD_ROW * min(values, LISTED) + CARD_MORE * (values > LISTED)


def _rows(
    lanes: Sequence[Lane], routes: Routes, offset: dict[int, float], cards: Sequence[float]
) -> tuple[list[float], list[float]]:
    """For each shelf the y of its uppermost units and of its lower edge."""
    shelf_of = _shelf_of(lanes)
    tops: list[float] = []
    bottoms: list[float] = []
    for shelf in range(lanes[-1].shelf + 1):
        above = bottoms[-1] + SHELF_GAP if bottoms else 0.0
        tops.append(above + HEADER + PAD + TRACK * (1 + max(routes.buses[shelf], default=-1)))
        deepest = max((offset[u] for lane in lanes if lane.shelf == shelf for u in lane.units), default=0.0)
        card = max((high for high, at in zip(cards, shelf_of, strict=False) if at == shelf), default=0.0)
        bottoms.append(tops[-1] + max(deepest, card + PAD) + BOX_HEIGHT + PAD)
    return tops, bottoms


def _columns(
    lanes: Sequence[Lane], routes: Routes, tops: Sequence[float], bottoms: Sequence[float]
) -> tuple[list[float], tuple[Box, ...]]:
    """The x of each lane's boxes, and the panels."""
    lane_x: list[float] = []
    panels: list[Box] = []
    margin = TRACK * (3 + max(routes.margin, default=-1)) if lanes[-1].shelf else 0
    x = left = float(margin)
    for number, (lane, after) in enumerate(pairwise((*lanes, None))):
        assert lane is not None
        x += GUTTER + TRACK * (1 + max(routes.gutters[number], default=-1))
        lane_x.append(x)
        x += BOX_WIDTH + LANE_RIGHT
        if after is None or after.stage != lane.stage:
            y = bottoms[lane.shelf - 1] + SHELF_GAP if lane.shelf else 0.0
            panels.append(Box(lane.stage, left, y, x - left, bottoms[lane.shelf] - y))
            x = left = float(margin) if after and after.shelf != lane.shelf else x + GAP
    return lane_x, tuple(panels)


def _blocks(units: Sequence[Unit], lanes: Sequence[Lane], boxes: Sequence[Box]) -> tuple[Box, ...]:
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
