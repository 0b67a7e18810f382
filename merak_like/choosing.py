"""What a call of ``auto_parallel`` leaves open, and the layout that is chosen for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from merak_like.partitioner.degrees import choose
from merak_like.partitioner.executable import ENGINE
from merak_like.partitioner.hardware import Hardware, hardware_named
from merak_like.partitioner.layouts import Layout, Wanted
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.software import TORCH
from merak_like.partitioner.states import StateBytes
from merak_like.partitioner.tracer import LossFn, trace
from merak_like.partitioner.tracer.fine import fine_trace, steps
from merak_like.runtime.batches import rows, split
from merak_like.runtime.tensor_parallel.blueprint import on_meta

AUTO = "auto"


def degree_of(axis: str, degree: int | str) -> int | None:
    """The degree, or None where it is to be chosen."""
    if degree == AUTO:
        return None
    if not isinstance(degree, int):
        raise ValueError(f"{axis}={degree!r} is not a degree of parallelism: a whole number, or 'auto'")
    return degree


def level_of(zero: int | str, backend: str | None, learns: bool) -> int | None:
    """The level of ZeRO, or None where it is to be chosen: not with DeepSpeed, and not without an optimizer."""
    if zero == AUTO:
        return 0 if not learns else None if backend in (None, "own") else 1
    if not isinstance(zero, int):
        raise ValueError(f"zero={zero!r} is no level of ZeRO: 0, 1, 2 or 3, or 'auto'")
    return zero


def form_of(sequence_parallel: bool | str) -> bool | None:
    """Whether activations are divided by rows, or None where that is to be chosen."""
    if sequence_parallel == AUTO:
        return None
    if not isinstance(sequence_parallel, bool):
        raise ValueError(f"sequence_parallel={sequence_parallel!r}: True, False or 'auto'")
    return sequence_parallel


def best_layout(
    model: nn.Module, example: Any, loss_fn: LossFn | None, wanted: Wanted, hardware: Hardware | str | None,
    states: StateBytes,
) -> Layout:  # fmt: skip
    """The fastest layout that the engine can run. It depends on the arguments alone, so every rank finds the same."""
    named = hardware or "a100-80gb"
    device = hardware_named(named) if isinstance(named, str) else named
    device = replace(device, kernels=TORCH.kernels)
    if wanted.zero == 3:  # what is given stays, and is refused by ``spreading_of`` if it is above 1
        wanted = replace(wanted, pp=wanted.pp or 1, tp=wanted.tp or 1)
    sample = split(example, rows(example))[0]
    graph = trace(model, sample, loss_fn, device="cpu").graph
    try:
        fine = fine_trace(on_meta(model), sample, loss_fn, device="cpu")
        sources = Sources(graph, fine.graph, steps(fine), fine.constants)
    except ValueError:  # it cannot be looked into so finely: then it is not sharded either
        sources, wanted = Sources(graph, graph, ()), replace(wanted, executable=replace(ENGINE, tp=1))
    return choose(sources, wanted, device, TORCH, states=states)[0].layout
