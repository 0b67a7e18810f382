"""``merak plan MODEL``: decide how to train a model on a mesh, without allocating a weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merak_like.cli.files import named_hardware, writable
from merak_like.cli.show import print_tables
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.text import parse_bytes

if TYPE_CHECKING:
    from merak_like.cli.models import Source

STEP = 4
"""Samples of a step for each pipeline rank, when nobody says."""


def run(
    model: Annotated[
        str, typer.Argument(help="A folder with a config.json, or module:function returning (model, example).")
    ],
    dp: Annotated[int, typer.Option(help="Replicas (data parallelism).")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline ranks.")] = 1,
    tp: Annotated[int, typer.Option(help="Shards of each layer (tensor parallelism).")] = 1,
    batch: Annotated[int | None, typer.Option(help="Samples of one step, all replicas; default 4 * dp * pp.")] = None,
    micro_batches: Annotated[int | None, typer.Option(help="Micro-batches of a step; default: the fastest.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Samples of a micro-batch, instead of their number.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sample; default 1024, or what the model can.")] = None,
    task: Annotated[
        str | None, typer.Option(help="causal-lm, masked-lm, ...; default: the config's architecture.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: the config's.")] = None,
    hardware: Annotated[str, typer.Option(help="A preset, a JSON file of figures, or `this` machine.")] = "a100-80gb",
    schedule: Annotated[
        str, typer.Option(help="1f1b, scp, zb-v, ... or auto, auto-v: `merak simulate` has all of them.")
    ] = "1f1b",
    chunks: Annotated[int | None, typer.Option(help="Stages per rank of the interleaved schedule; default 2.")] = None,
    recompute: Annotated[
        str, typer.Option(help="auto: what the memory asks for; none; full: all that the schedule lets.")
    ] = "auto",
    memory: Annotated[str | None, typer.Option(help="Of one rank, such as 40GB; default: the hardware's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan itself; a file only with -o.")] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Then run a step of it without data: `merak verify`.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan file; default plan.json.")] = None,
) -> None:
    """Decide how to train a model on dp x pp x tp devices; no weight is allocated and no device is needed."""
    mesh = Mesh(dp, pp, tp)
    path = None if as_json and output is None else writable(output or Path("plan.json"))
    limit = None if memory is None else parse_bytes(memory)

    from merak_like.cli.models import source

    made = decide(
        source(model, seq=seq, task=task, dtype=dtype),
        mesh,
        hardware=named_hardware(hardware),
        batch=STEP * dp * pp if batch is None else batch,
        micro_batches=micro_batches,
        micro_batch=micro_batch,
        schedule=schedule,
        chunks=chunks,
        recompute=recompute,
        memory_limit=limit,
    )
    if path is not None:
        made.save(path)
    if as_json:
        typer.echo(made.to_json())
    else:
        print_tables(made)
    if check:
        from merak_like.cli.verify import report, verify

        report(verify(made), as_json=False, err=as_json)
    if not as_json:
        typer.echo(f"wrote {path}: look at it with `merak show {path}` or `merak html {path}`")


def decide(
    model: Source,
    mesh: Mesh,
    *,
    batch: int,
    micro_batches: int | None = None,
    micro_batch: int | None = None,
    **options: Any,
) -> Plan:
    """Trace and plan. A model that can be traced at any size is traced again at the size of the micro-batch chosen."""
    each = batch // mesh.dp
    size = micro_batch or (each // micro_batches if micro_batches else 1)
    made = _plan(
        model, max(size, 1), mesh, batch=batch, micro_batches=micro_batches, micro_batch=micro_batch, **options
    )
    if made.micro_batch != size and hasattr(model, "folder"):
        compared = [note for note in made.notes if note.startswith("numbers of micro-batches")]
        again = _plan(model, made.micro_batch, mesh, batch=batch, micro_batches=made.micro_batches, **options)
        made = again.with_notes(compared)
    basis = made.basis and made.basis.remembering(model.words, micro_batches=micro_batches, micro_batch=micro_batch)
    return replace(made, basis=basis)


def _plan(model: Source, samples: int, mesh: Mesh, **options: Any) -> Plan:
    from merak_like.partitioner.planner import make_plan
    from merak_like.partitioner.tracer import trace

    loaded = model.load(samples)
    graph = trace(loaded.model, loaded.example, loaded.loss_fn).graph
    return make_plan(graph, mesh, signature=_signature(loaded.example), **options)


def _signature(example: Any) -> dict[str, str]:
    """The tensors of an example by name."""
    items = (
        example.items()
        if isinstance(example, dict)
        else enumerate(example if isinstance(example, tuple) else (example,))
    )
    return {
        str(name): f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
        for name, item in items
        if hasattr(item, "dtype")
    }
