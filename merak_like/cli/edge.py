"""``merak edge``: train the edge's half of a model, as a YAML file says; or plan, or measure leakage, before."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merak_like.cli.halves import half_source

if TYPE_CHECKING:
    from merak_like.cli.edge_file import Machines, Setting
    from merak_like.split.half import Source
    from merak_like.split.means import Means


def run(
    action: Annotated[str, typer.Argument(help="train, plan, leakage or fisher.")],
    file: Annotated[Path, typer.Argument(help="edge.yaml; see docs/split.md.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the edge's own weights here, as safetensors.")
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", help="plan: widths of a narrower cut to try besides; may be repeated.")
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option("--codec", help="plan: codecs to try, instead of the usual; may be repeated.")
    ] = None,
    powers: Annotated[
        bool, typer.Option("--powers", help="train: write them as sparse powers of two, about a sixth; with an error.")
    ] = False,
) -> None:
    """Train with a host: data, labels and the edge's layers stay here. Prints one JSON line a step.

    ``plan`` and ``leakage`` need no host. ``plan`` ranks cuts, ranks, codecs and numbers of micro-batches for the
    ``machines`` of the file; ``leakage`` measures how many tokens, or how much of an image, a decoder finds
    again in what would be sent. ``fisher`` measures which numbers of the layer that the cut changes matter, with the
    whole model, for both sides to factor it by.
    """
    from merak_like.cli.edge_file import load  # its checks take a tenth of a second to set up

    if action not in ACTIONS:
        raise ValueError(f"no action {action!r}: there are {', '.join(ACTIONS)}")
    if action != "plan" and (rank or codec):
        raise ValueError(f"--rank and --codec are for plan: write them into the file's cut and codec to {action}")
    if action in ("plan", "leakage") and out is not None:
        raise ValueError(f"merak edge {action} writes no weights: leave --out away")
    if powers and (action != "train" or out is None):
        raise ValueError("--powers is how train writes weights: give it with --out")
    ACTIONS[action](load(file), Options(out, tuple(rank or ()), tuple(codec or ()), powers))


@dataclass(frozen=True)
class Options:
    """What the command line says besides the file."""

    out: Path | None = None
    ranks: tuple[int, ...] = ()
    codecs: tuple[str, ...] = ()
    powers: bool = False


def batches(spec: str) -> Callable[[int], Any]:
    """The function behind ``module:function``. Raises ValueError."""
    module, colon, name = spec.partition(":")
    if not colon:
        raise ValueError(f"data must be module:function, found {spec!r}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot import {module!r} for the data: {error}") from None
    if not callable(found):
        raise ValueError(f"{module!r} has no function {name!r}")
    return found


def _train(setting: Setting, options: Options) -> None:
    from merak_like.cli.edge_file import screen_of, task_of
    from merak_like.runtime.methods.projection import LowRank
    from merak_like.split.edge import Edge
    from merak_like.split.forecast import forecast
    from merak_like.split.tls import Keys
    from merak_like.split.told import beside

    data, task = batches(setting.data), task_of(setting)
    if setting.cut == "auto":
        raise ValueError("the cut is to be chosen: run `merak edge plan`, and write the one you take into the file")
    means = _means(setting.machines)  # a figure that is none is told before a step is done, not after the last
    batch, ids = _batch(data(0))
    source = _source(setting)
    keys = Keys(setting.keys, setting.name) if setting.keys is not None else None
    with Edge(
        source, task, batch, connect=setting.connect, folder=setting.state, keys=keys, insecure=setting.insecure,
        patience=setting.patience, device=setting.device, screen=screen_of(setting),
        methods=[] if setting.low_rank is None else [LowRank(**setting.low_rank.model_dump())],
    ) as edge:  # fmt: skip
        began = time.monotonic()
        lines = list[dict[str, Any]]()

        def told(step: int, result: Any) -> None:
            facts = {"step": step, "loss": result.loss, "seconds": round(time.monotonic() - began, 3)}
            lines.append({**facts, "sent": edge.bytes["sent"], "received": edge.bytes["received"]})
            print(json.dumps(lines[-1]), flush=True)

        edge.train(
            lambda step: _batch(data(step))[0],
            setting.steps,
            samples=(lambda step: _batch(data(step))[1]),
            on_step=told,
        )
        if options.out is not None:
            _write(edge.state_dict(), options.out, powers=options.powers)
    if len(lines) > 1:
        told_before = forecast(source, task, batch, means, samples=ids is not None)
        typer.echo(beside(told_before, lines), err=True)


def _plan(setting: Setting, options: Options) -> None:
    from merak_like.cli.edge_file import task_of
    from merak_like.split.choose import CODECS, Asked, choose
    from merak_like.split.cut import Cut
    from merak_like.split.told import table

    if (means := _means(setting.machines)) is None:
        raise ValueError("nothing to plan for: give the file `machines: {uplink: 20 Mbit, downlink: 100 Mbit}`")
    batch, ids = _batch(batches(setting.data)(0))
    source = _source(setting)
    tail = setting.cut == "auto" or Cut.parse(setting.cut).back is not None
    asked = Asked(tail=tail, ranks=options.ranks, codecs=options.codecs or CODECS, samples=ids is not None)
    typer.echo(table(choose(source, task_of(setting), batch, means, asked), means))


def _means(machines: Machines | None) -> Means | None:
    """Two machines and a line; None where the file names none. Raises ValueError for a figure that is none."""
    if machines is None:
        return None
    from merak_like.cli.files import named_hardware
    from merak_like.split.means import Means, amount, line, machine

    edge = named_hardware(machines.edge)
    if machines.edge_flops is not None:
        flops = amount(machines.edge_flops, "flops")
        edge = machine(
            f"{machines.edge_flops} (given)",
            flops,
            edge.memory_bytes,
            bandwidth=edge.memory_bandwidth,
            launch=edge.launch_seconds,
        )
    if machines.edge_memory is not None:
        edge = replace(edge, memory_bytes=int(amount(machines.edge_memory, "B")), usable_memory=1.0)
    up, down = line(machines.uplink, machines.latency), line(machines.downlink, machines.latency)
    return Means(edge, named_hardware(machines.host), up, down)


def _leakage(setting: Setting, options: Options) -> None:
    from merak_like.cli.edge_file import screen_of, task_of
    from merak_like.split.image_leakage import image_leakage, images_of
    from merak_like.split.leakage import leakage

    data = batches(setting.data)
    source = _source(setting)
    asked = [_batch(data(step)) for step in range(max(8, min(setting.steps, 64)))]
    measure = image_leakage if images_of(asked[0][0]) is not None else leakage
    typer.echo(str(measure(source, task_of(setting), asked, screen=screen_of(setting))))


def _fisher(setting: Setting, options: Options) -> None:
    from merak_like.split.cut import Cut
    from merak_like.split.element_weights import spread
    from merak_like.split.fisher import fisher_of

    if options.out is None:
        raise ValueError("say where the Fisher information goes: --out fisher.safetensors")
    data = batches(setting.data)
    asked = [_batch(data(step))[0] for step in range(min(setting.steps, 64))]
    found = fisher_of(_source(setting), Cut.parse(setting.cut), asked)
    _write(found, options.out)
    for name, information in found.items():
        unequal = spread(information)
        typer.echo(f"{name}: spread {unequal:.2f}, {'elements' if unequal > EVEN else 'sides'} fits")


EVEN = 0.25
"""Spread below which rows and columns weighted as wholes are nearly as good as elements."""


def _source(setting: Setting) -> Source:
    found = half_source(setting.model, task=setting.hf_task, weights=setting.weights)
    return replace(found, fisher=setting.fisher)


def _batch(found: Any) -> tuple[Any, Sequence[int] | None]:
    return found if isinstance(found, tuple) and len(found) == 2 and not hasattr(found[1], "shape") else (found, None)


def _write(state: dict[str, Any], path: Path, *, powers: bool = False) -> None:
    from safetensors.torch import save_file

    from merak_like.runtime.methods.powers import save

    path.parent.mkdir(parents=True, exist_ok=True)
    (save if powers else save_file)({name: t.cpu().contiguous().clone() for name, t in state.items()}, path)


ACTIONS: dict[str, Callable[[Setting, Options], None]] = {
    "train": _train,
    "plan": _plan,
    "leakage": _leakage,
    "fisher": _fisher,
}
