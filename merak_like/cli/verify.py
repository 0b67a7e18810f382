"""``merak verify plan.json``: a dry run of the plan's step at its full world size, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merak_like.cli.files import load_plan

if TYPE_CHECKING:
    from merak_like.partitioner.plan import Plan
    from merak_like.runtime.dry_run.proof import Proof


def run(
    plan: Annotated[Path, typer.Argument(help="The plan file.")],
    model: Annotated[
        str | None, typer.Argument(help="The model, as for `merak plan`; default: what the plan was made from.")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sample; default: the plan's.")] = None,
    task: Annotated[str | None, typer.Option(help="As for `merak plan`; default: the plan's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As for `merak plan`; default: the plan's.")] = None,
    all_ranks: Annotated[
        bool | None,
        typer.Option(
            "--all-ranks/--one-replica", help="Run every rank, or those of one replica; default: every one of up to 64."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    edited: Annotated[
        bool, typer.Option("--edited", help="Accept a plan edited by hand (its digest is wrong).")
    ] = False,
) -> None:
    """Run a step of the plan without data and prove that transfers and collectives match; exit 1 if they do not."""
    loaded = load_plan(plan, edited)
    report(verify(loaded, model, seq=seq, task=task, dtype=dtype, all_ranks=all_ranks), as_json)


def report(found: Proof, as_json: bool, err: bool = False) -> None:
    """Print what was proved; exit with 1 where something does not fit together."""
    if as_json:
        import json

        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        from merak_like.partitioner.report.text import bytes_text

        for line in told(found, bytes_text(found.nbytes)):
            typer.echo(line, err=err)
    if not found.holds:
        raise typer.Exit(1)


def verify(
    plan: Plan, model: str | None = None, *, seq: int | None = None, task: str | None = None,
    dtype: str | None = None, all_ranks: bool | None = None,
) -> Proof:  # fmt: skip
    """The dry run of a plan for a model on the command line, by default the one it was made from."""
    from merak_like.cli.models import source
    from merak_like.runtime.dry_run.whole import dry_run

    said = dict(plan.basis.source) if plan.basis is not None else {}
    name = model or said.get("model")
    if name is None:
        raise ValueError(
            "the plan does not say which model it was made from: name it, as in `merak verify plan.json MODEL`"
        )
    kept = {} if model is not None else said
    loaded = source(
        str(name), seq=seq or kept.get("seq"), task=task or kept.get("task"), dtype=dtype or kept.get("dtype")
    ).load(plan.micro_batch)
    return dry_run(plan, loaded.model, loaded.example, loaded.loss_fn, all_ranks=all_ranks)


def told(found: Proof, nbytes: str) -> list[str]:
    """What was run and what it proves, in lines."""
    run = len(found.acted)
    lines = [
        f"ran a step of {run} of {found.world} ranks: the engine's own code, on tensors with shapes and no data",
    ]
    if found.alike:
        lines.append(
            f"the other {found.alike} differ only in their replica and their part of the weights; "
            f"{found.grouped} of them made their groups, too"
        )
    if not found.holds:
        return [*lines, f"{len(found.problems)} things do not fit together:", *(f"- {p}" for p in found.problems[:20])]
    return [
        *lines,
        f"groups       {found.groups}, made by every member in one order",
        f"transfers    {found.transfers} over {found.channels} channels, {nbytes}: each send has its receive, with the "
        "same shape, dtype and place in the order",
        f"collectives  {found.collectives} calls: all members of a group call the same, in the same order",
        f"progress     all {found.waits} waits end, even where a send is through only once its receive is posted",
        "not proved: values, memory, time",
    ]
