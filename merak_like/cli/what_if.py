"""``merak what-if plan.json --memory 40GB``: the plan under other conditions, from what its file holds. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from merak_like.cli.console import console
from merak_like.cli.files import load_plan, named_hardware, writable
from merak_like.partitioner.report.text import bytes_text, parse_bytes, parse_rate


def run(
    plan: Annotated[Path, typer.Argument(help="The plan file.")],
    dp: Annotated[int | None, typer.Option(help="Replicas (data parallelism).")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline ranks.")] = None,
    tp: Annotated[int | None, typer.Option(help="Shards of each layer (tensor parallelism).")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of one step, all replicas.")] = None,
    micro_batches: Annotated[int | None, typer.Option(help="Micro-batches of a step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Samples of a micro-batch.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sample: needs a new trace, the command is told.")] = None,
    schedule: Annotated[str | None, typer.Option(help="The schedule.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages per rank of the interleaved schedule.")] = None,
    recompute: Annotated[str | None, typer.Option(help="auto, none or full.")] = None,
    memory: Annotated[str | None, typer.Option(help="Of one rank, such as 40GB.")] = None,
    hardware: Annotated[str | None, typer.Option(help="A preset, a JSON file of figures, or `this` machine.")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="Of every link, such as 25GB/s or 200Gbit/s.")] = None,
    inter_bandwidth: Annotated[str | None, typer.Option(help="Of the links between nodes.")] = None,
    latency: Annotated[float | None, typer.Option(help="Of every link, in seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the other plan, too.")] = None,
    edited: Annotated[
        bool, typer.Option("--edited", help="Accept a plan edited by hand (its digest is wrong).")
    ] = False,
) -> None:
    """Plan again under other conditions, without the model, and say what changes and why."""
    loaded = load_plan(plan, edited)
    from merak_like.partitioner.explain.conditions import Conditions, trace_again, what_if

    if seq is not None:
        raise ValueError(
            f"--seq {seq}: other lengths run other ops, which only a new trace tells: {trace_again(loaded, seq=seq)}"
        )
    if latency is not None and latency < 0:
        raise ValueError(f"--latency {latency}: a link's latency is in seconds, 0 or more")
    conditions = Conditions(
        dp, pp, tp, batch, micro_batches, micro_batch, schedule, chunks, recompute,
        memory=None if memory is None else parse_bytes(memory),
        hardware=None if hardware is None else named_hardware(hardware),
        bandwidth=None if bandwidth is None else parse_rate(bandwidth),
        inter_bandwidth=None if inter_bandwidth is None else parse_rate(inter_bandwidth),
        latency=latency,
    )  # fmt: skip
    path = None if output is None else writable(output)
    found = what_if(loaded, conditions)
    if path is not None:
        found.planned.save(path)
    if as_json:
        import json

        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        from merak_like.partitioner.report.differences import render
        from merak_like.partitioner.report.text import seconds_text

        told = ", ".join(f"{name.replace('_', '-')} {_said(name, value)}" for name, value in found.conditions.items())
        typer.echo(f"if {told}:")
        kept = seconds_text(found.kept_seconds) if found.kept_seconds is not None else f"not possible, {found.kept_why}"
        typer.echo(f"the plan's own stages  {kept}")
        typer.echo(f"planned again          {seconds_text(found.planned.step_seconds)}\n")
        console().print(render(found.difference, ("the plan", "planned again")))
        if path is not None:
            typer.echo(f"wrote {path}")


def _said(name: str, value: Any) -> str:
    """A condition as people write it."""
    if name == "memory":
        return bytes_text(value)
    return f"{bytes_text(value)}/s" if name.endswith("bandwidth") else str(value)
