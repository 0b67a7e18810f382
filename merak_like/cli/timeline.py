"""``merak timeline``: the planned step as an SVG picture or as a trace for Perfetto. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli import pipelines
from merak_like.cli.files import load_plan, writable
from merak_like.cli.pipelines import chosen, read_pipeline


def run(
    plan: pipelines.PlanFile = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="An .svg picture, or a .json trace for Perfetto and chrome://tracing."),
    ] = Path("timeline.svg"),
    schedule: Annotated[str | None, typer.Option(help="The schedule; default: the plan's, or auto.")] = None,
    stages: pipelines.Stages = None,
    micro_batches: pipelines.MicroBatches = None,
    costs: pipelines.CostsText = None,
    memory: pipelines.Memory = None,
    recompute: pipelines.Recompute = None,
    chunks: pipelines.Chunks = 2,
    edited: pipelines.Edited = False,
) -> None:
    """Draw the step of a plan, or of a pipeline in a few numbers, under any schedule."""
    from merak_like.partitioner.report.text import seconds_text
    from merak_like.partitioner.report.timeline import to_chrome, to_svg

    if output.suffix not in (".svg", ".json"):
        raise ValueError(f"cannot draw into {str(output)!r}: name a file that ends in .svg or .json")
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
    title, name = "", schedule or "auto"
    if plan is not None:
        loaded = load_plan(plan, edited)
        title, name = f"{loaded.model}, ", schedule or loaded.schedule
    trials = chosen(name, pipeline)
    if len(trials) > 1:
        raise ValueError(f"a timeline shows one schedule, not {name!r}: draw each into a file of its own")
    path, (trial,) = writable(output), trials
    if output.suffix == ".svg":
        number = seconds_text if plan is not None else "{:g}".format
        text = to_svg(trial.schedule, trial.timeline, title=f"{title}{trial.name}", number=number)
    else:
        text = to_chrome(trial.schedule, trial.timeline)
    path.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {path}")
