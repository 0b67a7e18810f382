"""Equal calls have equal results: run each distinct torch call once on fakes and copy its shape afterwards.

A thousand equal layers make the same few calls. What a call gives depends only on the metadata of its arguments, so a
call that changes nothing in place need not be dispatched again, be its results fresh or views of its arguments.
Copies have no ``grad_fn``; a model that needs one (in-place work on an activation) is traced again without this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from merak_like._compat import FakeTensor, FakeTensorMode, fake_tensor, fake_view, storage_key
from merak_like.partitioner.tracer.encode import CONSTANTS
from merak_like.partitioner.tracer.words import in_place


class Unkeyable(Exception):
    """The call depends on more than metadata."""


Key = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device, bool]
"""Shape, strides, storage offset, dtype, device, needs a gradient."""


@dataclass(frozen=True)
class Result:
    """The metadata of the results and what the call keeps for the backward."""

    kind: type
    tensors: tuple[tuple[Key, int, bool], ...]
    """Of each result: metadata, the argument whose memory it shares (-1: none), whether it is that argument."""
    saved: tuple[tuple[str, int], ...]
    """``("in", k)``, ``("out", k)`` for the k-th argument or result, ``("new", bytes)`` for anything else."""


@dataclass
class Memo:
    """Results by call.

    ``pack`` is told of every tensor kept for the backward, ``grow`` of bytes that have no tensor.
    """

    mode: FakeTensorMode
    pack: Callable[[torch.Tensor], Any]
    grow: Callable[[int], None]
    results: dict[Any, Result | None] = field(default_factory=dict)
    log: list[torch.Tensor] | None = None

    def run(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, state: Any) -> Any:
        """Call the function, or copy what it gave before."""
        if name == "__get__" or in_place(name):
            return func(*args, **kwargs)
        ins: list[torch.Tensor] = []
        try:
            key = (func, state, _key(args, ins), _key(kwargs, ins) if kwargs else None)
            known = self.results.get(key, self)
        except (Unkeyable, TypeError):  # TypeError: a function or constant that cannot be hashed
            return func(*args, **kwargs)
        if known is None or not ins:
            return func(*args, **kwargs)
        if isinstance(known, Result):
            return self.copy(known, ins)
        versions = [t._version for t in ins]
        self.log = []
        try:
            out = func(*args, **kwargs)
            unchanged = versions == [t._version for t in ins]
            self.results[key] = self.describe(out, ins, self.log) if unchanged else None
        finally:
            self.log = None
        return out

    def note(self, tensor: torch.Tensor) -> None:
        """A tensor was just kept for the backward."""
        if self.log is not None:
            self.log.append(tensor)

    def describe(self, out: Any, ins: list[torch.Tensor], kept: list[torch.Tensor]) -> Result | None:
        """What to remember, or None if the results are more than fresh fakes and views of arguments."""
        if type(out) not in (tuple, list) and not isinstance(out, torch.Tensor):
            return None
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        taken = {storage_key(t): i for i, t in reversed(list(enumerate(ins)))}
        mine: dict[int, int] = {}
        tensors: list[tuple[Key, int, bool]] = []
        for index, tensor in enumerate(outs):
            if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
                return None
            storage = storage_key(tensor)
            source = taken.get(storage, -1)
            if source >= 0 and len(taken) < len(ins):
                return None  # which of the arguments that share memory is it a view of?
            if source < 0 and (tensor._is_view() or storage in mine):
                return None
            if source >= 0 and (tensor.dtype != ins[source].dtype or tensor.is_conj() or tensor.is_neg()):
                return None
            mine[storage] = index
            tensors.append((_metadata(tensor), source, source >= 0 and tensor is ins[source]))
        saved: list[tuple[str, int]] = []
        for key, tensor in {storage_key(t): t for t in kept}.items():
            where = ("in", taken[key]) if key in taken else ("out", mine[key]) if key in mine else None
            saved.append(where or ("new", tensor.untyped_storage().nbytes()))
        kind = torch.Tensor if isinstance(out, torch.Tensor) else type(out)
        return Result(kind, tuple(tensors), tuple(saved))

    def copy(self, known: Result, ins: list[torch.Tensor]) -> Any:
        """Fakes like the remembered ones."""
        made: list[torch.Tensor] = []
        for (shape, stride, offset, dtype, device, grad), source, same in known.tensors:
            if same:
                made.append(ins[source])
                continue
            if source < 0:
                tensor = fake_tensor(self.mode, shape, stride, dtype, device)
            else:
                tensor = fake_view(self.mode, ins[source], shape, stride, offset, device)
            made.append(tensor.requires_grad_() if grad else tensor)
        for where, index in known.saved:
            if where == "new":
                self.grow(index)
            else:
                self.pack(ins[index] if where == "in" else made[index])
        return made[0] if known.kind is torch.Tensor else known.kind(made)


def _metadata(tensor: FakeTensor) -> Key:
    return (
        tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.fake_device,
        tensor.requires_grad,
    )  # fmt: skip


def _key(item: Any, ins: list[torch.Tensor]) -> Any:
    """What the call depends on; collects its tensors."""
    if isinstance(item, FakeTensor):
        if item.constant is not None:
            raise Unkeyable
        ins.append(item)
        return _metadata(item)
    if isinstance(item, CONSTANTS):
        return (type(item), item)
    if isinstance(item, (tuple, list)):
        return (type(item), *[_key(x, ins) for x in item])
    if isinstance(item, dict):
        return tuple([(k, _key(v, ins)) for k, v in item.items()])
    if isinstance(item, slice):
        return (slice, _key(item.start, ins), _key(item.stop, ins), _key(item.step, ins))
    raise Unkeyable
