"""The layouts that a search compared, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from merak_like.partitioner.degrees import Ranked
from merak_like.partitioner.report.text import percent_text, seconds_text


def render(ranked: Sequence[Ranked]) -> Table:
    """One line for each; those without MFU and bubble are estimates."""
    table = Table(title="Layouts compared", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in (
        "",
        "dp",
        "pp",
        "tp",
        "micro-batch",
        "schedule",
        "again",
        "ZeRO",
        "seq",
        "step",
        "MFU",
        "bubble",
        "GB",
    ):
        table.add_column(name, justify="left" if name in ("schedule", "again") else "right")
    for place, row in enumerate(ranked, start=1):
        layout, plan = row.layout, row.plan
        table.add_row(
            str(place), str(layout.mesh.dp), str(layout.mesh.pp), str(layout.mesh.tp), str(layout.micro_batch),
            layout.schedule + (f" {layout.chunks}" if layout.chunks > 1 else ""), layout.recompute, str(layout.zero),
            "yes" if layout.sequence_parallel else "no", seconds_text(row.step_seconds),
            percent_text(plan.mfu) if plan else "", percent_text(plan.bubble) if plan else "estimated",
            f"{row.rank_bytes / 1e9:.1f}",
        )  # fmt: skip
    return table
