"""``merak diff a.json b.json``: what differs between two plans, and how much each difference matters. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli.console import console
from merak_like.cli.files import load_plan


def run(
    first: Annotated[Path, typer.Argument(help="A plan file.")],
    second: Annotated[Path, typer.Argument(help="The plan file it is compared with.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    edited: Annotated[
        bool, typer.Option("--edited", help="Accept plans edited by hand (their digests are wrong).")
    ] = False,
) -> None:
    """Compare two plans: degrees, cuts, schedule, recompute, and what each does to the step and the memory."""
    plans = load_plan(first, edited), load_plan(second, edited)
    from merak_like.partitioner.explain.difference import difference

    found = difference(*plans)
    if as_json:
        import json

        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        from merak_like.partitioner.report.differences import render

        console().print(render(found, _names(first, second)))


def _names(first: Path, second: Path) -> tuple[str, str]:
    """As short as they still differ."""
    for short in (lambda path: path.name, lambda path: f"{path.parent.name}/{path.name}", str):
        if short(first) != short(second):
            return short(first), short(second)
    return "first", "second"
