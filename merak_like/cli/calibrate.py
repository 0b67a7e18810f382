"""``merak calibrate plan.json profile.json -o hardware.json``: the hardware's constants from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merak_like.cli.console import console
from merak_like.cli.files import load_plan, writable


def run(
    files: Annotated[list[Path], typer.Argument(help="A plan and its profile, and perhaps further pairs.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file for `merak plan --hardware`; default hardware.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON; a file only with -o.")] = False,
    edited: Annotated[
        bool, typer.Option("--edited", help="Accept plans edited by hand (their digests are wrong).")
    ] = False,
) -> None:
    """Correct the hardware's constants by what `engine.profile()` measured, and show predicted beside measured."""
    if len(files) % 2:
        raise ValueError(
            f"give a plan and its profile, and perhaps further pairs: plan.json profile.json, but {len(files)} files "
            "are named"
        )
    from merak_like.partitioner.explain.calibration import calibrate, outside
    from merak_like.partitioner.recorded import Recorded
    from merak_like.partitioner.report.text import seconds_text

    for profile in files[1::2]:
        if not profile.is_file():
            raise ValueError(f"there is no profile {str(profile)!r}: `engine.profile()` measures one, `save` writes it")
    path = None if as_json and output is None else writable(output or Path("hardware.json"))
    pairs = [
        (load_plan(plan, edited), Recorded.load(profile))
        for plan, profile in zip(files[::2], files[1::2], strict=True)
    ]  # fmt: skip
    found = calibrate(pairs)
    if path is not None:
        path.write_text(found.hardware.to_json() + "\n", encoding="utf-8")
    if as_json:
        import json

        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    from merak_like.partitioner.report.calibrated import render

    console().print(render(found))
    for plan, recorded in pairs:
        typer.echo(f"plan {plan.digest[:12]}: after the pipeline {seconds_text(outside(recorded).after)} measured")
    if path is not None:
        typer.echo(f"wrote {path}: plan with it by `merak plan MODEL --hardware {path}`")
