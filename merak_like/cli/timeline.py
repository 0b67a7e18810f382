"""``merak timeline``: the planned step as an SVG picture or as a trace for Perfetto, alone or above the real one.

No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli import pipelines
from merak_like.cli.console import console
from merak_like.cli.files import load_plan, writable
from merak_like.cli.pipelines import chosen, read_pipeline


def run(
    context: typer.Context,
    plan: pipelines.PlanFile = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="An .svg picture, or a .json trace for Perfetto and chrome://tracing."),
    ] = Path("timeline.svg"),
    measured: Annotated[
        Path | None,
        typer.Option(help="What `engine.profile()` measured of the plan: drawn below it, with a table of both."),
    ] = None,
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
    if measured is not None:
        _refuse_other_options(context)
        _draw_both(plan, measured, output, edited)
        return
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
    (trial,) = trials
    if output.suffix == ".svg":
        number = seconds_text if plan is not None else "{:g}".format
        text = to_svg(trial.schedule, trial.timeline, title=f"{title}{trial.name}", number=number)
    else:
        text = to_chrome(trial.schedule, trial.timeline)
    _write(output, text)


def _draw_both(plan: Path | None, measured: Path, output: Path, edited: bool) -> None:
    from merak_like.partitioner.recorded import Recorded
    from merak_like.partitioner.report.compare import compare, facts, table, to_chrome, to_svg

    if plan is None:
        raise ValueError(f"--measured {measured} is drawn below its plan: name the plan file, too")
    if not measured.is_file():
        raise ValueError(f"there is no profile {str(measured)!r}: `engine.profile()` measures one, `save` writes it")
    comparison = compare(load_plan(plan, edited), Recorded.load(measured))
    for name, said in zip(("planned", "measured"), facts(comparison), strict=True):
        typer.echo(f"{name:<9} {said}")
    console().print(table(comparison))
    _write(output, (to_svg if output.suffix == ".svg" else to_chrome)(comparison))


def _refuse_other_options(context: typer.Context) -> None:
    for name in ("schedule", "stages", "micro_batches", "costs", "memory", "recompute", "chunks"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no meaning beside --measured: what was measured is the plan as it is")


def _write(output: Path, text: str) -> None:
    path = writable(output)
    path.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {path}")
