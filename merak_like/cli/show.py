"""``merak show plan.json``: a plan in the terminal. Starts without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli.console import console
from merak_like.cli.files import load_plan
from merak_like.partitioner.plan import Plan


def run(
    plan: Annotated[Path, typer.Argument(help="The plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers of the tables as JSON.")] = False,
    tp: Annotated[bool, typer.Option("--tp", help="Show what tensor parallelism does to each block.")] = False,
    edited: Annotated[
        bool, typer.Option("--edited", help="Accept a plan edited by hand (its digest is wrong).")
    ] = False,
) -> None:
    """Show a plan: stages, memory against the limit, what crosses each cut, and why."""
    loaded = load_plan(plan, edited)
    if tp:
        show_sharding(loaded, as_json)
    elif as_json:
        print_json(loaded)
    else:
        print_tables(loaded)


def print_tables(plan: Plan) -> None:
    """The tables, as wide as the terminal; 120 columns into a file or a pipe."""
    from merak_like.partitioner.report.table import render

    console().print(render(plan))


def show_sharding(plan: Plan, as_json: bool) -> None:
    """What is sharded, as tables or JSON; ValueError for a plan that shards nothing."""
    import json

    from merak_like.partitioner.report import sharded

    if as_json:
        typer.echo(json.dumps(sharded.as_json(plan), indent=1))
    else:
        from merak_like.partitioner.report.sharding_table import render

        console().print(render(plan))


def print_json(plan: Plan) -> None:
    """The same numbers as JSON."""
    import json

    from merak_like.partitioner.report.summary import as_json

    typer.echo(json.dumps(as_json(plan), indent=1))
