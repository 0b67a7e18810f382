"""``merak simulate``: how long schedules take and how much they hold, without a device or a model. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merak_like.cli import pipelines
from merak_like.cli.pipelines import chosen, read_pipeline
from merak_like.partitioner.report.text import percent_text, seconds_text

if TYPE_CHECKING:
    from merak_like.partitioner.trial import Pipeline, Trial


def run(
    plan: pipelines.PlanFile = None,
    schedule: Annotated[
        str | None, typer.Option(help="One schedule, several as 1f1b,zb-v, or all; default: all.")
    ] = None,
    stages: pipelines.Stages = None,
    micro_batches: pipelines.MicroBatches = None,
    costs: pipelines.CostsText = None,
    memory: pipelines.Memory = None,
    recompute: pipelines.Recompute = None,
    chunks: pipelines.Chunks = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers and orders as JSON.")] = False,
    edited: pipelines.Edited = False,
) -> None:
    """Simulate pipeline schedules: makespan, bubble, live micro-batches and the order of every rank."""
    pipeline = read_pipeline(
        plan,
        edited=edited,
        stages=stages,
        micro_batches=micro_batches,
        costs=costs,
        memory=memory,
        recompute=recompute,
        chunks=chunks,
    )
    names = schedule or "all"
    trials = chosen(names, pipeline)
    alone = len(trials) == 1
    if as_json:
        import json

        data = as_data(trials[0]) if alone else {trial.name: as_data(trial) for trial in trials}
        typer.echo(json.dumps(data, indent=1))
    elif alone:
        print_one(trials[0], _number if plan is None else seconds_text)
    else:
        print_table(trials, pipeline, _number if plan is None else seconds_text)


def as_data(trial: Trial) -> dict[str, Any]:
    """The numbers of a trial: seconds, fraction, live micro-batches of each stage, words of each rank."""
    return {
        "makespan": trial.timeline.makespan,
        "bubble": trial.timeline.bubble,
        "peak": list(trial.timeline.peak_live),
        "orders": [[str(action) for action in order] for order in trial.schedule.orders],
    }


def print_one(trial: Trial, number: Callable[[float], str]) -> None:
    """One schedule, its numbers above its orders."""
    typer.echo(f"makespan  {number(trial.timeline.makespan)}")
    typer.echo(f"bubble    {percent_text(trial.timeline.bubble)}")
    typer.echo(f"peak      {' '.join(map(str, trial.timeline.peak_live))}")
    if trial.found is not None:
        typer.echo(f"gap       {_gap(trial, number)}")
    typer.echo("orders")
    typer.echo(str(trial.schedule))


def print_table(trials: list[Trial], pipeline: Pipeline, number: Callable[[float], str]) -> None:
    """All schedules, one a line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("schedule")
    for name in ("makespan", "bubble", "peak", "stages"):
        table.add_column(name, justify="right")
    table.add_column("")
    fastest = min((t.timeline.makespan for t in trials if t.too_full(pipeline.live) is None), default=0.0)
    for trial in trials:
        full, makespan = trial.too_full(pipeline.live), trial.timeline.makespan
        note = f"rank {full} is too full" if full is not None else "fastest" if makespan <= fastest * (1 + 1e-9) else ""
        gap = _gap(trial, number) if trial.found is not None else ""
        table.add_row(
            trial.name,
            number(makespan),
            percent_text(trial.timeline.bubble),
            f"{max(trial.peak_live):g}",
            str(trial.schedule.stages),
            ", ".join(each for each in (note, gap) if each),
            style="dim" if full is not None else None,
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(table)
    console.print("peak: live micro-batches on the fullest rank; a stage of a rank counts as its part of one")
    if {trial.schedule.stages for trial in trials} != {pipeline.ranks}:
        console.print("schedules with more stages than ranks are taken to cut each rank's work into equal parts")


def _gap(trial: Trial, number: Callable[[float], str]) -> str:
    """How far the found order is from what no order can beat."""
    assert trial.found is not None
    if trial.found.gap == 0:
        return "no order of these stages is faster"
    return f"at most {percent_text(trial.found.gap)} above the fastest order ({number(trial.found.bound)} at least)"


def _number(seconds: float) -> str:
    return f"{seconds:.6g}"
