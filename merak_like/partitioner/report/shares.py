"""Where the time of each rank went, planned beside measured: a table for a terminal and one for a picture.

 forward       wait      ..   bubble        after
plan  real   plan  real      plan  real   plan  real
30.0  31.2    9.1  12.0      21.0  25.3      -   4.4
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from merak_like.partitioner.recorded import Step, shares
from merak_like.partitioner.report.lanes import AFTER, KINDS, LEFT, RIGHT, TRANSFER, WAIT, WIDTH
from merak_like.partitioner.schedules.action import Kind

_COLUMNS: Mapping[str, str] = {
    "forward": KINDS[Kind.F][1], "recompute": KINDS[Kind.R][1], "backward": KINDS[Kind.B][1],
    "weights": KINDS[Kind.W][1], "wait": WAIT[1], "transfer": TRANSFER[1], "other": "", "bubble": "",
    "after": AFTER[1],
}  # fmt: skip
"""Column -> the colour of what it sums up, if it has one."""
_ALWAYS = ("recompute", "wait", "transfer", "bubble")
"""Columns that are shown even where there is nothing to show."""
_TOLD = (
    "percent of the time until the last rank's last action, planned and real · bubble: no computation",
    "wait: for another rank · transfer: in calls that start one, free in a plan · other: between actions",
    "after: reduction, norm and optimizer, and waiting for the others there; in no plan",
)
_LINE = 22


class Row(NamedTuple):
    """A rank's fractions of a step's makespan, by column."""

    name: str
    planned: Mapping[str, float]
    measured: Mapping[str, float]


def rows(planned: Step, measured: Step, names: Sequence[str]) -> tuple[Row, ...]:
    """What ranks spent their time with, and after several of them their mean; both steps have the same ranks."""
    made = tuple(map(Row, names, _fractions(planned), _fractions(measured)))
    if len(made) == 1:
        return made
    return (*made, Row("mean", _mean([row.planned for row in made]), _mean([row.measured for row in made])))


def table(body: Sequence[Row]) -> RenderableType:
    """The rows for a terminal, the planned ones above the measured ones."""
    made = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    columns = _columns(body)
    for name in ("", "", *columns):
        made.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in body:
        made.add_row(row.name, "plan", *(_cell(row.planned[name]) for name in columns), style="dim")
        made.add_row("", "real", *(_cell(row.measured[name]) for name in columns))
    return Group(made, *map(Text, _TOLD))


def height(body: Sequence[Row]) -> float:
    """Pixels that ``draw`` needs."""
    return 48 + _LINE * len(body) + 18 * len(_TOLD)


def draw(body: Sequence[Row], top: float) -> Iterator[str]:
    """The rows as parts of an SVG."""
    columns = _columns(body)
    wide, first = (WIDTH - LEFT - RIGHT) / len(columns), top + 52
    for at, row in enumerate(body):
        y = first + _LINE * at
        yield f'<line class="grid" x1="{LEFT - 60}" x2="{WIDTH - RIGHT}" y1="{y - 16:g}" y2="{y - 16:g}"/>'
        yield f'<text class="rank end" x="{LEFT - 12}" y="{y:g}">{row.name}</text>'
    for at, name in enumerate(columns):
        plan, real = LEFT + wide * at + 40, LEFT + wide * at + 86
        if _COLUMNS[name]:
            swatch = f'x="{plan - 40:.1f}" y="{top:g}" width="13" height="13" rx="2"'
            yield f'<rect {swatch} fill="{_COLUMNS[name]}"/>'
        yield f'<text class="rank" x="{plan - 21:.1f}" y="{top + 11:g}">{name}</text>'
        yield f'<text class="dim end" x="{plan:.1f}" y="{top + 30:g}">plan</text>'
        yield f'<text class="dim end" x="{real:.1f}" y="{top + 30:g}">real</text>'
        for row_at, row in enumerate(body):
            y = first + _LINE * row_at
            yield f'<text class="dim end" x="{plan:.1f}" y="{y:g}">{_cell(row.planned[name])}</text>'
            yield f'<text class="end" x="{real:.1f}" y="{y:g}">{_cell(row.measured[name])}</text>'
    for at, told in enumerate(_TOLD):
        yield f'<text class="dim" x="{LEFT}" y="{first + _LINE * len(body) + 8 + 18 * at:g}">{escape(told)}</text>'


def _fractions(step: Step) -> Iterator[dict[str, float]]:
    """Of each rank, by column."""
    makespan = step.makespan or 1.0
    for each in shares(step):
        spent = (each.forward, each.recompute, each.backward, each.weight, each.wait, each.transfer, each.other)
        seconds = (*spent, makespan - each.computing, each.after)
        yield {name: part / makespan for name, part in zip(_COLUMNS, seconds, strict=True)}


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in _COLUMNS}


def _columns(body: Sequence[Row]) -> list[str]:
    parts = [part for row in body for part in (row.planned, row.measured)]
    return [name for name in _COLUMNS if name in _ALWAYS or any(_cell(part[name]) != "-" for part in parts)]


def _cell(fraction: float) -> str:
    """A fraction in percent; next to nothing is a dash."""
    return f"{100 * fraction:.1f}" if abs(fraction) >= 5e-4 else "-"
