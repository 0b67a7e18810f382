"""``merak report RUN``: a run's folder as one HTML page. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli.files import writable


def run(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page; default: report.html in it.")] = None,
) -> None:
    """Draw a run: curves, numbers, settings, machine and plan, in one file that needs no network."""
    from merak_like.trainer.report import page, read_metrics, summary

    made = page(folder)
    path = writable(output or folder / "report.html")
    path.write_text(made, encoding="utf-8")
    for title, text in summary(read_metrics(folder)).items():
        typer.echo(f"{title}: {text}")
    typer.echo(f"wrote {path}")
