"""``merak plan MODEL``: decide how to train a model on a mesh, without allocating a weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merak_like.cli.files import named_hardware, writable
from merak_like.cli.show import print_tables
from merak_like.partitioner.report.text import parse_bytes

if TYPE_CHECKING:
    from merak_like.partitioner.cost import Hardware


def run(
    model: Annotated[
        str, typer.Argument(help="A folder with a config.json, or module:function returning (model, example).")
    ],
    world: Annotated[int | None, typer.Option(help="Devices; the degrees that are not given are then chosen.")] = None,
    dp: Annotated[str | None, typer.Option(help="Replicas (data parallelism): a number, or auto.")] = None,
    pp: Annotated[str | None, typer.Option(help="Pipeline ranks: a number, or auto.")] = None,
    tp: Annotated[str | None, typer.Option(help="Shards of layers (tensor parallelism): a number, or auto.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Samples of one step, all replicas; default 4 for each dp * pp, or device.")
    ] = None,
    micro_batches: Annotated[int | None, typer.Option(help="Micro-batches of a step; default: the fastest.")] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", "--micro-batch-size", help="Samples of a micro-batch, instead of their number."),
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sample; default 1024, or what the model can.")] = None,
    task: Annotated[
        str | None, typer.Option(help="causal-lm, masked-lm, ...; default: the config's architecture.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights; default: the config's, else what the hardware is used with.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="A preset, a JSON file of figures, or `this` machine.")] = "a100-80gb",
    devices_per_node: Annotated[int | None, typer.Option(help="Devices of a node; default: the hardware's.")] = None,
    inter_bandwidth: Annotated[
        str | None, typer.Option(help="Between nodes, for each device and second, such as 12.5GB.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="1f1b (default), interleaved, scp, zb-v, ... or auto, auto-v: see `merak simulate`."),
    ] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages per rank of the interleaved schedule; default 2.")] = None,
    recompute: Annotated[
        str | None,
        typer.Option(help="auto: what the memory asks for; none; selective: attention scores; full: all."),
    ] = None,
    zero: Annotated[int | None, typer.Option(help="ZeRO level, 0 to 3; default 0, or chosen with the degrees.")] = None,
    sequence_parallel: Annotated[
        bool | None, typer.Option(help="Divide along the sequence what tp ranks share; default: no, or chosen.")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="torch: as the model is written; fused: as large-scale trainers run it.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="Of fused kernels: flash, or math with scores.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw-mixed, adamw-megatron, momentum, sgd: the state kept.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="What values go through between pipeline ranks, such as int8 or int4|int8.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of one rank, such as 40GB; default: the hardware's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan itself; a file only with -o.")] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Then run a step of it without data: `merak verify`.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan file; default plan.json.")] = None,
) -> None:
    """Decide how to train a model on dp x pp x tp devices; no weight is allocated and no device is needed."""
    degrees = {name: _degree(name, text, world) for name, text in (("dp", dp), ("pp", pp), ("tp", tp))}
    path = None if as_json and output is None else writable(output or Path("plan.json"))
    limit = None if memory is None else parse_bytes(memory)

    from merak_like.cli.decide import Question, decide, remembering
    from merak_like.cli.models import source

    device = _hardware(hardware, devices_per_node, inter_bandwidth)
    device = replace(device, kernels=kernels or device.kernels, attention=attention or device.attention)
    question = Question(
        source(model, seq=seq, task=task, dtype=dtype), device, world, batch=batch, micro_batches=micro_batches,
        micro_batch=micro_batch, schedule=schedule, chunks=chunks, recompute=recompute, zero=zero,
        sequence_parallel=sequence_parallel, kernels=device.kernels, attention=device.attention, optimizer=optimizer,
        memory_limit=limit, codec=codec, **degrees,
    )  # fmt: skip
    made, ranked = decide(question)
    made = remembering(made, question, ranked)
    if path is not None:
        made.save(path)
    if as_json:
        typer.echo(made.to_json())
    else:
        print_tables(made)
        if len(ranked) > 1:
            print_ranked(ranked)
    if check:
        from merak_like.cli.verify import report, verify

        report(verify(made), as_json=False, err=as_json)
    if not as_json:
        typer.echo(f"wrote {path}: look at it with `merak show {path}` or `merak html {path}`")


def print_ranked(ranked: Any) -> None:
    """The layouts that were compared."""
    from rich.console import Console

    from merak_like.cli.ranked import render

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(render(ranked))


def _degree(name: str, text: str | None, world: int | None) -> int | None:
    if text is None:
        return None if world is not None else 1
    if text == "auto":
        if world is None:
            raise ValueError(f"--{name} auto: give --world, the number of devices to choose for")
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}={text} is not a degree of parallelism: give a whole number of at least 1, or auto")
    return int(text)


def _hardware(text: str, devices_per_node: int | None, inter_bandwidth: str | None) -> Hardware:

    from merak_like.partitioner.hardware import Link

    found = named_hardware(text)
    if devices_per_node is not None:
        found = replace(found, devices_per_node=devices_per_node)
    if inter_bandwidth is not None:
        found = replace(found, inter=Link(parse_bytes(inter_bandwidth), found.inter.latency))
    return found
