"""What `merak simulate` and `merak timeline` are asked about: a plan, or a pipeline in a few numbers."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli.files import load_plan
from merak_like.partitioner.schedules.action import chain, unknown
from merak_like.partitioner.simulator import Costs, StageCosts
from merak_like.partitioner.trial import NAMES, Pipeline, Trial, pipeline_of, try_out

PlanFile = Annotated[Path | None, typer.Argument(help="A plan file; without one, give the options below.")]
Edited = Annotated[bool, typer.Option("--edited", help="Accept a plan edited by hand (its digest is wrong).")]
Stages = Annotated[int | None, typer.Option(help="Pipeline ranks.")]
MicroBatches = Annotated[int | None, typer.Option(help="Micro-batches of a step; default: the plan's.")]
CostsText = Annotated[
    str | None,
    typer.Option(
        "--costs",
        help="Seconds per micro-batch and rank, as F=1,R=1,B=2,W=0,C=0.1: forward, recompute, backward (for the inputs"
        " only where W gives the weights' half), hop. Uneven ranks: F=1/2/1/1.",
    ),
]
Memory = Annotated[
    int | None, typer.Option(help="Live micro-batches that fit on each rank; default: any, or the plan's.")
]
Recompute = Annotated[
    str | None,
    typer.Option(help="Stages that recompute, as 0,1,2; default: where R is not 0, and for auto not the last."),
]
Chunks = Annotated[int, typer.Option(help="Stages per rank of the interleaved schedule.")]

_COSTS = {"F": "forward", "R": "recompute", "B": "backward", "W": "weight", "C": "hop"}


def read_pipeline(
    plan: Path | None,
    *,
    edited: bool,
    stages: int | None,
    micro_batches: int | None,
    costs: str | None,
    memory: int | None,
    recompute: str | None,
    chunks: int,
) -> Pipeline:
    """The pipeline of a plan or of the options; ValueError where they contradict each other or something is missing."""
    if plan is None:
        missing = [name for name, given in (("--stages", stages), ("--micro-batches", micro_batches)) if given is None]
        if missing:
            raise ValueError(f"without a plan, {' and '.join(missing)} must be given")
        assert stages is not None
        assert micro_batches is not None
        if stages < 1 or micro_batches < 1:
            raise ValueError(f"there must be stages and micro-batches: got {stages} and {micro_batches}")
        pipeline = Pipeline(parse_costs(costs or "F=1,B=2", stages), micro_batches, chain(stages))
    else:
        for name, given in (("--stages", stages), ("--costs", costs)):
            if given is not None:
                raise ValueError(
                    f"{name} {given} has no meaning for a plan: its stages and their costs are in the file"
                )
        pipeline = pipeline_of(load_plan(plan, edited))
        if micro_batches is not None:
            pipeline = replace(pipeline, micro_batches=micro_batches, plan=None)
    if memory is not None:
        if memory < 1:
            raise ValueError(f"--memory {memory}: a rank must hold at least one micro-batch")
        pipeline = replace(pipeline, live=(memory,) * pipeline.ranks)
    if recompute is not None:
        pipeline = replace(pipeline, recomputes=_stages(recompute, pipeline.ranks), plan=None)
    return replace(pipeline, chunks=chunks)


def parse_costs(text: str, stages: int) -> Costs:
    """Read F=1,R=1,B=2: each of F, R, B, W, C once, one number for all ranks or one for each, joined by '/'."""
    read = {name: [0.0] * stages for name in _COSTS}
    for part in text.split(","):
        name, _, numbers = part.strip().partition("=")
        if name not in _COSTS:
            raise unknown("cost", name, _COSTS)
        try:
            given = [float(number) for number in numbers.split("/")]
        except ValueError:
            raise ValueError(f"--costs {text!r}: {part.strip()!r} is no cost; write it as F=1 or F=1/2/1") from None
        if any(not isfinite(number) or number < 0 for number in given):
            raise ValueError(f"--costs {text!r}: costs are finite and not negative, but there is {part.strip()!r}")
        if len(given) not in (1, stages):
            raise ValueError(
                f"--costs {text!r}: {name} has {len(given)} numbers for {stages} stages: give one, or one each"
            )
        read[name] = given * stages if len(given) == 1 else given
    each = zip(read["F"], read["B"], read["R"], read["W"], strict=True)
    hops = {(s, s + 1): read["C"][s] for s in range(stages - 1)}
    return Costs(tuple(StageCosts(*seconds) for seconds in each), hops)


def chosen(names: str, pipeline: Pipeline) -> list[Trial]:
    """The trials of one schedule, several joined by commas, or all. One that is named must fit the memory."""
    if names == "all":
        return [try_out(name, pipeline) for name in NAMES]
    trials = [try_out(name.strip(), pipeline) for name in names.split(",")]
    for trial in trials:
        rank = trial.too_full(pipeline.live)
        if rank is not None and pipeline.live is not None:
            raise ValueError(
                f"{trial.name} holds {trial.peak_live[rank]:g} micro-batches on rank {rank}, more than the "
                f"{pipeline.live[rank]} that fit: take another schedule (--schedule all shows them), or auto"
            )
    return trials


def _stages(text: str, stages: int) -> frozenset[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = next((word for word in words if not word.isdecimal() or int(word) >= stages), None)
    if wrong is not None:
        raise ValueError(f"--recompute {text!r}: {wrong!r} is none of the stages 0 to {stages - 1}")
    return frozenset(map(int, words))
