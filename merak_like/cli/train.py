"""``merak train run.yaml``: one file is one run; inside torchrun a rank of it, outside the one who starts torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def run(
    file: Annotated[Path, typer.Argument(help="The run: YAML with sections such as model, data and training.")],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, such as optimizer.lr=1e-4 parallelism.pp=2.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; train nothing.")
    ] = False,
    fast_dev_run: Annotated[
        bool, typer.Option("--fast-dev-run", help="Three steps, one look, one checkpoint: does it work at all?")
    ] = False,
    max_steps: Annotated[int | None, typer.Option(help="Steps, whatever the file says.")] = None,
) -> None:
    """Train as a file says. Alone it starts torchrun with as many ranks as the file's degrees need."""
    from merak_like.trainer.config import load

    changes = list(changes or ())
    if max_steps is not None:
        changes += [f"training.steps={max_steps}", "training.epochs="]
    if fast_dev_run:
        changes += [
            "training.steps=3", "training.epochs=", "evaluation.batches=2", "evaluation.every=", "checkpoints.every=",
            "logging.every=1", "logging.trackers=[]",
        ]  # fmt: skip
    asked = load(file, changes)

    from merak_like.runtime.initialize import devices, world_size
    from merak_like.trainer.run import planned, prepare, record, start

    ranks = asked.parallelism.ranks or max(world_size(), devices())
    if dry_run:
        from merak_like.cli.show import print_tables

        plan = planned(asked, prepare(asked))
        record(asked, plan)
        print_tables(plan)
        typer.echo(f"{file} is in order: {ranks} ranks, {asked.training.batch} samples a step; wrote {asked.folder}")
    elif ranks > 1 and world_size() == 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        code = subprocess.call([*command, "-m", "merak_like.cli", "train", str(file), *changes])
        raise typer.Exit(code)
    else:
        quiet()
        summary, ended = start(asked)
        from merak_like.runtime.initialize import rank

        if rank() == 0:
            done = f"{summary['train_steps']:.0f} steps in {summary['train_seconds']:.1f} s; "
            typer.echo(
                f"{done}the model is in {asked.folder / 'model'}, its curves are in {asked.folder / 'report.html'}"
                if ended
                else f"{done}told to end: the same command with checkpoints.resume=true goes on"
            )


def quiet() -> None:
    """transformers keeps its advice and its progress bars to itself."""
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        from merak_like import hf
    except ModuleNotFoundError:
        return
    hf.transformers.logging.disable_progress_bar()
