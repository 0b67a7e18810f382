"""``merak why plan.json``: what binds, and what every other choice would cost. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli.console import console
from merak_like.cli.files import load_plan


def run(
    plan: Annotated[Path, typer.Argument(help="The plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    edited: Annotated[
        bool, typer.Option("--edited", help="Accept a plan edited by hand (its digest is wrong).")
    ] = False,
) -> None:
    """Say why a plan takes as long as it does: the critical path, what binds, the next-best cuts and other choices."""
    loaded = load_plan(plan, edited)
    from merak_like.partitioner.explain.why import why

    found = why(loaded)
    if as_json:
        import json

        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        from merak_like.partitioner.report.reasons import render

        console().print(render(loaded, found))
