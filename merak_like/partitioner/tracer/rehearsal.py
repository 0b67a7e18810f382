"""Run one module for real, twice on random data, to learn what comes out of a module that looks at its data.

Mixtures of experts loop over the experts that were chosen; quantizers read their ranges. Such a module stays whole in
the code, so any choice it makes in training is its own; the trace only needs the shapes of its results, and these must
not depend on the data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from merak_like._compat import (
    FakeTensor,
    fake_tensor,
    fake_view,
    no_torch_function,
    storage_key,
    tree_flatten_with_path,
    tree_map,
    unset_fake,
)
from merak_like.partitioner.tracer.draft import Draft
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.fakes import changed_attributes, plain_attributes
from merak_like.partitioner.tracer.recorder import Recorder
from merak_like.partitioner.tracer.shadow import Unknowable

MOST_BYTES = 2 << 30
"""Weights made up for one module when the model has none (it is on the meta device)."""


@dataclass(frozen=True)
class Rehearsed:
    """What a module gave, as fakes, and which of its arguments and buffers it changed in place."""

    out: Any
    changed: tuple[torch.Tensor, ...]


def rehearse(
    recorder: Recorder, draft: Draft, call: Callable[[Any, Any], Any], module: nn.Module, args: Any, kwargs: Any
) -> Rehearsed:
    """Run ``call(args, kwargs)`` of a module for real. Raises TraceError if its results' shapes depend on the data."""
    where = recorder.writer.where
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first, _ = _once(recorder, draft, call, module, args, kwargs)
            out, changed = _once(recorder, Draft("", "", "", ""), call, module, args, kwargs)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{where} looks at its data, and could not be tried out on random data to learn the shape of its results: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        random.setstate(state)
    if _summary(first) != _summary(out):
        raise TraceError(
            f"{where} looks at its data, and the shape of its results depends on it: a recorded graph cannot follow"
        )
    return Rehearsed(out, changed)


def _summary(out: Any) -> list[Any]:
    return [
        (path, (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf))
        for path, leaf in tree_flatten_with_path(out)
    ]


def _once(
    recorder: Recorder, draft: Draft, call: Callable[[Any, Any], Any], module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, tuple[torch.Tensor, ...]]:
    stands_for: dict[int, torch.Tensor] = {}
    """Memory of a real tensor to the fake it stands in for."""
    keep: list[torch.Tensor] = []

    def real(item: Any) -> Any:
        if not isinstance(item, FakeTensor):
            return item
        made = _values(recorder, item)
        stands_for[storage_key(made)] = item
        keep.append(made)
        return made

    def fake(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        source = stands_for.get(storage_key(item))
        mode, device = recorder.writer.fake.mode, recorder.writer.device
        if source is None:
            made = fake_tensor(mode, tuple(item.shape), item.stride(), item.dtype, device)
        elif any(item is t for t in keep):
            return source
        else:
            made = fake_view(mode, source, tuple(item.shape), item.stride(), int(item.storage_offset()), device)
        return made.requires_grad_().clone() if item.requires_grad else made  # a clone may be changed in place

    attributes = plain_attributes(module)
    with _real_weights(recorder, module, stands_for, keep):
        with unset_fake(), no_torch_function():
            real_args, real_kwargs = tree_map(real, tuple(args)), tree_map(real, dict(kwargs))
        versions = [t._version for t in keep]
        recorder.rehearsing = True
        try:
            with unset_fake(), _autocast(recorder), recorder.costs.trying(draft, stands_for):
                out = call(real_args, real_kwargs)
        finally:
            recorder.rehearsing = False
        changed = tuple(stands_for[storage_key(t)] for t, v in zip(keep, versions, strict=True) if t._version != v)
    after = plain_attributes(module)
    names = changed_attributes(module, attributes)
    leaked = [n for n in names if isinstance(after[n.rpartition(".")[0]][n.rpartition(".")[2]], torch.Tensor)]
    if leaked:
        raise TraceError(f"{recorder.writer.where} looks at its data and keeps the tensors {leaked} between calls")
    with no_torch_function():
        return tree_map(fake, out), changed


def _values(recorder: Recorder, tensor: FakeTensor) -> torch.Tensor:
    """The example's data where it is known, random numbers where it is an activation, zeros for unknown integers."""
    with unset_fake():
        try:
            made = recorder.real_value(tensor).detach().clone()
        except Unknowable:
            shape = tuple(tensor.shape)
            if tensor.is_floating_point() or tensor.is_complex():
                made = torch.randn(shape, dtype=tensor.dtype)
            else:
                made = torch.zeros(shape, dtype=tensor.dtype)
        return made.requires_grad_(tensor.requires_grad)


@contextmanager
def _real_weights(
    recorder: Recorder, module: nn.Module, stands_for: dict[int, torch.Tensor], keep: list[torch.Tensor]
) -> Iterator[None]:
    """Put the real parameters and buffers back while a module runs; buffers as copies, made-up ones for meta."""
    originals = recorder.writer.fake.originals
    places = [(m.__dict__[r], k, t) for m in module.modules() for r in ("_parameters", "_buffers")
              for k, t in m.__dict__[r].items() if t is not None]  # fmt: skip
    made: dict[int, torch.Tensor] = {}
    missing = {id(t): t for _, _, t in places if id(t) in originals and originals[id(t)].device.type == "meta"}
    size = sum(t.numel() * t.element_size() for t in missing.values())
    if size > MOST_BYTES:
        raise TraceError(
            f"{recorder.writer.where} looks at its data, so it must be tried out, but its weights are on the meta "
            f"device and would take {size / 2**30:.1f} GiB: trace a model with real weights, or choose another "
            "implementation of it"
        )
    with unset_fake(), torch.no_grad(), no_torch_function():
        for _, _, tensor in places:
            if id(tensor) in made or id(tensor) not in originals:
                continue
            original = originals[id(tensor)]
            if original.device.type == "meta":
                value = torch.zeros(tuple(original.shape), dtype=original.dtype)
                value = value.normal_(0, 0.02) if original.is_floating_point() else value
            else:
                value = original.detach().cpu()
                value = value if isinstance(original, nn.Parameter) else value.clone()
            if isinstance(original, nn.Parameter):
                value = nn.Parameter(value, requires_grad=original.requires_grad)
            made[id(tensor)] = value
            stands_for[storage_key(value)] = tensor
            keep.append(value)
    try:
        for entries, key, tensor in places:
            entries[key] = made.get(id(tensor), tensor)
        yield
    finally:
        for entries, key, tensor in places:
            entries[key] = tensor


@contextmanager
def _autocast(recorder: Recorder) -> Iterator[None]:
    """What is in force on the device of the trace, on the CPU."""
    _, enabled, dtype = recorder.writer.state()
    if recorder.writer.device.type == "cpu":
        yield
        return
    with torch.autocast("cpu", dtype=dtype, enabled=enabled):
        yield
