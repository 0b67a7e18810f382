"""``merak doctor``: is this machine able to train, and what would make it better?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

EXTRAS = {
    "transformers": "hf", "accelerate": "hf", "peft": "peft", "datasets": "data", "pyarrow": "data",
    "matplotlib": "plots", "deepspeed": "deepspeed", "tensorboard": "tensorboard",
    "bitsandbytes": "four-bit", "liger-kernel": "liger",
}  # fmt: skip
"""Packages that some part needs, and the extra that installs them."""
MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


class Finding(NamedTuple):
    """One thing looked at."""

    kind: str
    """A key of MARKS."""
    text: str


def run(
    ranks: Annotated[int, typer.Option(help="Processes that try to talk to one another; 0: none.")] = 2,
) -> None:
    """Look at Python, torch, devices, memory and packages, and let a few processes sum a number."""
    findings = [*versions(), *devices(), *room(), *packages()]
    if ranks > 1:
        findings.append(talking(ranks))
    for finding in findings:
        typer.echo(f"{MARKS[finding.kind]}  {finding.text}")
    bad = sum(finding.kind == "bad" for finding in findings)
    typer.echo(f"{bad} things must be mended" if bad else "this machine can train")
    raise typer.Exit(1 if bad else 0)


def versions() -> Iterator[Finding]:
    """Python, torch and ours."""
    import torch

    from merak_like import __version__

    yield Finding("ok" if sys.version_info >= (3, 11) else "bad", f"Python {sys.version.split()[0]} (3.11 or newer)")
    yield Finding("ok", f"merak_like {__version__}, torch {torch.__version__}")
    talk = [name for name, there in (("gloo", torch.distributed.is_gloo_available()),
                                     ("nccl", torch.distributed.is_nccl_available())) if there]  # fmt: skip
    yield Finding("ok" if talk else "bad", f"torch.distributed has {', '.join(talk) or 'no back end'}")


def devices() -> Iterator[Finding]:
    """GPUs, or cores and how they are shared."""
    import torch

    from merak_like.runtime.initialize import variables

    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}: {facts.name}, {facts.total_memory / 1e9:.0f} GB")
    if torch.cuda.device_count():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("note", f"no GPU that torch can see: ranks share {cores} cores of this CPU")
    if "OMP_NUM_THREADS" not in variables("OMP_"):
        yield Finding("note", "OMP_NUM_THREADS is not set: with several ranks on one CPU set it to cores / ranks")


def room() -> Iterator[Finding]:
    """Memory, and space in this folder."""
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Finding("ok", f"{total / 1e9:.0f} GB of memory")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("ok" if free > 5e9 else "note", f"{free / 1e9:.0f} GB free in {Path.cwd()} for checkpoints")


def packages() -> Iterator[Finding]:
    """What is installed besides the core."""
    from merak_like.trainer.run import installed

    for name, extra in EXTRAS.items():
        found = installed(name)
        if found:
            yield Finding("ok", f"{name} {found}")
        else:
            yield Finding("note", f"no {name}: pip install 'merak-like[{extra}]' if you need it")


def talking(ranks: int) -> Finding:
    """Whether processes started by torchrun reach one another."""
    code = (
        "import datetime, torch, torch.distributed as d; d.init_process_group('gloo', "
        "timeout=datetime.timedelta(seconds=30)); x = torch.ones(1); d.all_reduce(x); "
        "assert x.item() == d.get_world_size(); d.destroy_process_group()"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    try:
        done = subprocess.run(
            [*command, "--no-python", sys.executable, "-c", code], capture_output=True, text=True, timeout=90
        )
    except subprocess.TimeoutExpired:
        return Finding("bad", f"{ranks} processes did not sum a number in 90 s: is the loopback network shut off?")
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if "Error" in line][-1:] or ["no reason given"]
        return Finding("bad", f"{ranks} processes could not sum a number over gloo: {last[0].strip()}")
    return Finding("ok", f"{ranks} processes started by torchrun sum a number over gloo")
