"""Predicted beside measured in the terminal, before and after a calibration."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from merak_like.partitioner.explain.calibration import Calibration
from merak_like.partitioner.report.reasons import plain_table
from merak_like.partitioner.report.text import change_text, percent_text, seconds_text


def render(found: Calibration) -> RenderableType:
    """The constants, then every time."""
    before, after = found.error
    return Group(
        Text(f"{found.hardware.name}: off by {percent_text(before)} in the mean before, {percent_text(after)} after\n"),
        _constants(found),
        _times(found),
    )


def _constants(found: Calibration) -> Table:
    table = plain_table("Constants", "constant", ">before", ">after", ">change")
    for name, (before, after) in found.changed.items():
        table.add_row(name, f"{before:.4g}", f"{after:.4g}", change_text(after, before))
    return table


def _times(found: Calibration) -> Table:
    table = plain_table("Seconds of one micro-batch", "plan", "what", ">measured", ">predicted", ">off", ">now", ">off")
    for row in found.rows:
        table.add_row(
            row.plan, row.what, seconds_text(row.measured), seconds_text(row.before),
            change_text(row.before, row.measured), seconds_text(row.after), change_text(row.after, row.measured),
        )  # fmt: skip
    return table
