"""Run a model on tensors without data, and leave no trace of it in the model."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn

from merak_like._compat import FakeTensorMode, fake_like, fake_parameter, storage_key
from merak_like.partitioner.graph import Parameter


@dataclass(frozen=True)
class FakeModel:
    """The fake stand-ins of a model's parameters and buffers."""

    names: Mapping[int, str]
    """``id`` of each fake tensor to its first name in the model."""
    buffers: frozenset[str]
    parameters: tuple[Parameter, ...]
    tensors: tuple[torch.Tensor, ...]
    """Keeps the fakes alive, so that their ids stay theirs."""
    originals: Mapping[int, torch.Tensor]
    """``id`` of each fake tensor to the parameter or buffer it stands for."""
    lasting: Mapping[str, torch.Tensor]
    """The buffers and frozen parameters that have data, by their first name."""
    paths: Mapping[int, str]
    """``id`` of each of the model's modules to its first path."""
    mode: FakeTensorMode


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def describe(model: nn.Module) -> tuple[Parameter, ...]:
    """Every parameter and buffer once, with the names tied to it by sharing its storage (not its shape)."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    found: dict[str, tuple[torch.Tensor, bool]] = {}
    named = [(n, p, False) for n, p in model.named_parameters(remove_duplicate=False)]
    named += [(n, b, True) for n, b in model.named_buffers(remove_duplicate=False)]
    for name, tensor, is_buffer in named:
        owner = first.setdefault(storage_key(tensor), name)
        if owner == name:
            found[name] = (tensor, is_buffer)
        elif owner not in tied or name not in tied[owner]:
            tied.setdefault(owner, []).append(name)
    return tuple(
        Parameter(name, tuple(t.shape), dtype_name(t.dtype), t.requires_grad, tuple(tied.get(name, ())), is_buffer)
        for name, (t, is_buffer) in found.items()
    )


@contextmanager
def fake_model(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[FakeModel]:
    """Swap every parameter and buffer for a fake one; on leaving, every module's attributes are as before."""
    named = list(model.named_modules())
    before = [(m, dict(m.__dict__), _registries(m)) for _, m in named]
    belongings = _belongings(m for _, m in named)
    parameters = describe(model)
    canonical = {alias: p.name for p in parameters for alias in (p.name, *p.tied)}
    fakes: dict[int, torch.Tensor] = {}
    names: dict[int, str] = {}
    originals: dict[int, torch.Tensor] = {}
    lasting: dict[str, torch.Tensor] = {}
    try:
        for path, module in named:
            for registry in ("_parameters", "_buffers"):
                entries = module.__dict__[registry]
                for key, tensor in entries.items():
                    if tensor is None:
                        continue
                    fake = fakes.get(id(tensor))
                    if fake is None:
                        make = fake_parameter if isinstance(tensor, nn.Parameter) else fake_like
                        fake = make(mode, tensor, device)
                        name = canonical[f"{path}.{key}" if path else key]
                        fakes[id(tensor)], originals[id(fake)], names[id(fake)] = fake, tensor, name
                        if not tensor.requires_grad and tensor.device.type != "meta":
                            lasting[name] = tensor.detach()
                    entries[key] = fake
        yield FakeModel(
            names, frozenset(p.name for p in parameters if p.buffer), parameters, tuple(fakes.values()), originals,
            lasting, {id(m): path for path, m in named}, mode,
        )  # fmt: skip
    finally:
        for module, attributes, registries in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in registries.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(entries)
        for owned, content in belongings:
            _restore(owned, content)


def _belongings(modules: Iterable[nn.Module]) -> list[tuple[Any, Any]]:
    """The containers and objects (configs) that modules hold, each with a shallow copy of its content."""
    found: dict[int, tuple[Any, Any]] = {}
    for module in modules:
        for key, item in module.__dict__.items():
            if _of_torch(key) or id(item) in found or isinstance(item, (nn.Module, torch.Tensor, type)):
                continue
            if type(item) in (list, dict, set):
                found[id(item)] = (item, item.copy())
            elif isinstance(getattr(item, "__dict__", None), dict) and not callable(item):
                found[id(item)] = (item, dict(item.__dict__))
    return list(found.values())


def _restore(owned: Any, content: Any) -> None:
    if type(owned) is list:
        owned[:] = content
        return
    inner = owned if type(owned) in (dict, set) else owned.__dict__
    if type(inner) is set or inner.keys() != content.keys() or any(inner[k] is not content[k] for k in content):
        inner.clear()
        inner.update(content)


@contextmanager
def no_garbage() -> Iterator[None]:
    """Leave cyclic garbage for later: a trace makes many objects and drops almost none."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def clean_caches() -> Iterator[None]:
    """Forget what ``functools.lru_cache`` kept during the trace: a cached fake tensor would poison real runs."""
    before = [(cache, cache.cache_info().misses) for cache in _caches()]
    try:
        yield
    finally:
        known = {id(cache): misses for cache, misses in before}
        for cache in _caches():
            if cache.cache_info().misses != known.get(id(cache), 0):
                cache.cache_clear()


def _caches() -> list[Any]:
    """Every one there is, found by their type, which each of them refers to.

    Not by ``gc.get_objects``: a tuple that another thread has half made would have a second owner while it is listed,
    and CPython answers that with a SystemError there.
    """
    kind = type(lru_cache(len))
    return [item for item in gc.get_referrers(kind) if type(item) is kind]


def changed_attributes(
    model: nn.Module, before: Mapping[str, Mapping[str, Any]], *, tensors: bool = True
) -> tuple[str, ...]:
    """Names of the plain Python attributes of modules that differ from a snapshot (see ``plain_attributes``)."""
    after = plain_attributes(model)
    return tuple(
        f"{path}.{key}" if path else key
        for path, attributes in after.items()
        for key, value in attributes.items()
        if (tensors or not isinstance(value, torch.Tensor))
        and not (key in (was := before.get(path, {})) and _same(was[key], value))
    )


def plain_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes of every module outside torch's own registries."""
    return {
        path: {k: v for k, v in module.__dict__.items() if not _of_torch(k)} for path, module in model.named_modules()
    }


_TORCH_ATTRIBUTES = frozenset(nn.Module().__dict__) | {"training"}


def _of_torch(key: str) -> bool:
    return key in _TORCH_ATTRIBUTES


def _registries(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Copies of a module's dictionaries of parameters, buffers, sub-modules and hooks."""
    return {k: dict(v) for k, v in module.__dict__.items() if _of_torch(k) and isinstance(v, dict)}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, (bool, int, float, str, bytes, tuple)):
        return bool(a == b)
    return (
        True  # containers and objects keep their identity or are rebuilt: their tensors are caught when they are read
    )
