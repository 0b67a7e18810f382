"""Micro-batches in shares, one's collectives under another's compute, wherever samples do not meet."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from merak_like.partitioner.tensor_parallel import OUTSIDE
from merak_like.partitioner.tensor_parallel.layout import Layout
from merak_like.partitioner.tensor_parallel.samples import divided, entangled
from merak_like.partitioner.tensor_parallel.units import Tensor, Unit, signature, tensors, units
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.fine import steps, word_of
from merak_like.runtime.prepared import Prepared, Ranges, StageLike
from merak_like.runtime.stage import Stage
from merak_like.runtime.stage_code import build_stage
from merak_like.runtime.tensor_parallel.phased_stage import PhasedStage
from merak_like.runtime.tensor_parallel.phases import phased


def same_steps(one: Trace, other: Trace) -> bool:
    """Whether two traces run the same steps, but for the sizes in them, and were given the same answers."""

    def words(traced: Trace) -> list[Any]:
        return [
            (n.name, n.op, word := word_of(n), n.args[1:] if word == "check_value" else ()) for n in traced.code.nodes
        ]

    return words(one) == words(other)


def alone(traced: Trace, some: Mapping[int, Trace | None], samples: int) -> Collection[int]:
    """The ops of blocks that treat samples one by one; ``some`` are traces of fewer samples, by their number."""
    code = steps(traced)
    known = tensors(traced.graph, code, traced.constants)
    found, memo = set[int](), dict[Any, str]()
    for unit in units(traced.graph, code):
        if unit.name == OUTSIDE:
            continue
        key = signature(unit, known)[0]
        if key not in memo:
            memo[key] = next(filter(None, (_reason(unit, known, one, samples, n) for n, one in some.items())), "")
        if not memo[key]:
            found.update(step.index for step in unit.steps)
    return found


def _reason(unit: Unit, known: Mapping[str, Tensor], one: Trace | None, samples: int, fewer: int) -> str:
    if one is None:
        return "fewer samples run other steps"
    shapes = {name: value.shape for name, value in one.graph.values.items()}
    return entangled(unit, known, shapes, samples, fewer)


def of_samples(rows: Mapping[str, Layout], traced: Trace, some: Mapping[int, Trace | None], samples: int) -> str:
    """A value of which a rank's rows are some of the samples; empty if there is none."""
    whole = {name: traced.graph.values[name].shape for name in rows}
    for fewer, one in some.items():
        if one is not None:
            shapes = {name: one.graph.values[name].shape for name in rows}
            if found := divided(rows, whole, shapes, samples, fewer):
                return found
    return ""


def overlapped(
    whole: Trace, some: Mapping[int, Trace], model: nn.Module, starts: Sequence[int],
    shares: Sequence[tuple[int, int]], apart: Collection[int], keeping: Callable[[], AbstractContextManager[None]],
) -> Prepared:  # fmt: skip
    """``whole`` and ``some`` (by the number of samples) are sharded; ``shares`` are those of a micro-batch.
    ``keeping`` is as in ``Stage``."""
    sizes = [stop - start for start, stop in shares]
    traces = [whole, *(some.get(size, whole) for size in sizes)]

    def make(index: int, again: Ranges, device: torch.device, pending: Counter[int] | None) -> StageLike:
        try:
            code = phased(traces, shares, model, starts, index, again, lambda op: op in apart)
        except ValueError as why:
            warnings.warn(
                f"stage {index} runs its micro-batches whole, its collectives are not hidden: {why}", stacklevel=2
            )
            return Stage(build_stage(whole, model, starts, index, again), whole.inputs, device, pending, keeping)
        return PhasedStage(code, whole.inputs, device, pending, keeping)

    return Prepared(whole, make, whole.fits)
