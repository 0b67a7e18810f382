"""``merak html plan.json -o plan.html``: a plan as one offline page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli.files import load_plan, writable


def run(
    plan: Annotated[Path, typer.Argument(help="The plan file.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page; default: beside the plan.")] = None,
    with_why: Annotated[
        bool, typer.Option("--why/--no-why", help="Try other choices for the page, as `merak why`; takes seconds.")
    ] = True,
    edited: Annotated[
        bool, typer.Option("--edited", help="Accept a plan edited by hand (its digest is wrong).")
    ] = False,
) -> None:
    """Write a plan as one HTML file that needs no network: the model's units, its stages and its cuts."""
    from merak_like.partitioner.explain.why import why
    from merak_like.partitioner.report.page import page

    loaded = load_plan(plan, edited)
    path = writable(output or (plan / "plan.json" if plan.is_dir() else plan).with_suffix(".html"))
    found = why(loaded) if with_why and loaded.basis is not None else None
    path.write_text(page(loaded, found), encoding="utf-8")
    typer.echo(f"wrote {path}")
