"""Equal calls have equal results: run each distinct torch call once on fakes and copy its shape afterwards.

A thousand equal layers make the same few calls. What a call gives depends only on the metadata of its arguments, so a
call whose results are fresh (no view of an argument, nothing changed in place) need not be dispatched again.
Copies have no ``grad_fn``; a model that needs one (in-place work on an activation) is traced again without this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from merak_like._compat import FakeTensor, FakeTensorMode, fake_tensor, storage_key
from merak_like.partitioner.tracer.counting import tensors_in
from merak_like.partitioner.tracer.encode import CONSTANTS


class Unkeyable(Exception):
    """The call depends on more than metadata."""


@dataclass(frozen=True)
class Result:
    """The metadata of one fresh result and what the call keeps for the backward."""

    kind: type
    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool], ...]
    saved: tuple[tuple[str, int], ...]
    """``("in", k)``, ``("out", k)`` for the k-th argument or result, ``("new", bytes)`` for anything else."""


@dataclass
class Memo:
    """Results by call. ``pack`` is told of every tensor kept for the backward, ``grow`` of bytes that have no tensor."""

    mode: FakeTensorMode
    pack: Callable[[torch.Tensor], Any]
    grow: Callable[[int], None]
    results: dict[Any, Result | None] = field(default_factory=dict)
    log: list[torch.Tensor] | None = None

    def run(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, state: Any) -> Any:
        """Call the function, or copy what it gave before."""
        ins = tensors_in(args) + (tensors_in(kwargs) if kwargs else [])
        if not ins or name == "__get__" or name.endswith("_"):
            return func(*args, **kwargs)
        try:
            key = (func, state, _key(args), _key(kwargs) if kwargs else None)
        except Unkeyable:
            return func(*args, **kwargs)
        if key in self.results:
            known = self.results[key]
            return func(*args, **kwargs) if known is None else self.copy(known, ins)
        versions = [t._version for t in ins]
        self.log = []
        try:
            out = func(*args, **kwargs)
            fresh = versions == [t._version for t in ins]
            self.results[key] = self.describe(out, ins, self.log) if fresh else None
        finally:
            self.log = None
        return out

    def note(self, tensor: torch.Tensor) -> None:
        """A tensor was just kept for the backward."""
        if self.log is not None:
            self.log.append(tensor)

    def describe(self, out: Any, ins: list[torch.Tensor], kept: list[torch.Tensor]) -> Result | None:
        """What to remember, or None if the result is not fresh fakes."""
        if type(out) not in (tuple, list) and not isinstance(out, torch.Tensor):
            return None
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        taken = {storage_key(t): i for i, t in reversed(list(enumerate(ins)))}
        mine: dict[int, int] = {}
        for index, tensor in enumerate(outs):
            if not isinstance(tensor, FakeTensor) or tensor.constant is not None or tensor._is_view():
                return None
            if storage_key(tensor) in taken or storage_key(tensor) in mine:
                return None
            mine[storage_key(tensor)] = index
        saved = []
        for tensor in kept:
            key = storage_key(tensor)
            where = ("in", taken[key]) if key in taken else ("out", mine[key]) if key in mine else None
            saved.append(where or ("new", tensor.numel() * tensor.element_size()))
        kind = torch.Tensor if isinstance(out, torch.Tensor) else type(out)
        meta = tuple((tuple(t.shape), t.stride(), t.dtype, t.fake_device, t.requires_grad) for t in outs)
        return Result(kind, meta, tuple(saved))

    def copy(self, known: Result, ins: list[torch.Tensor]) -> Any:
        """Fresh fakes like the remembered ones."""
        made = []
        for shape, stride, dtype, device, grad in known.tensors:
            tensor = fake_tensor(self.mode, shape, stride, dtype, device)
            made.append(tensor.requires_grad_() if grad else tensor)
        for where, index in known.saved:
            if where == "new":
                self.grow(index)
            else:
                self.pack(ins[index] if where == "in" else made[index])
        return made[0] if known.kind is torch.Tensor else known.kind(made)


def _key(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        if not isinstance(item, FakeTensor) or item.constant is not None:
            raise Unkeyable
        return (tuple(item.shape), item.stride(), item.dtype, item.fake_device, item.requires_grad)
    if isinstance(item, CONSTANTS):
        return (type(item), item)
    if isinstance(item, (tuple, list)):
        return (type(item), *map(_key, item))
    if isinstance(item, dict):
        return tuple((k, _key(v)) for k, v in item.items())
    raise Unkeyable
