"""The values and gradients of a micro-batch between segments: by share or for all samples, some on their way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from merak_like.runtime.tensor_parallel.collectives import Flight, landed
from merak_like.runtime.tensor_parallel.segments import PhasedCode

Key = tuple[str, int | None]
"""A value and the share of samples; None for all samples."""


class Values:
    """The values of one micro-batch as it runs, detached, for all samples or by share, whichever is asked for."""

    def __init__(self, code: PhasedCode) -> None:
        self._code = code
        self._there: dict[Key, Any] = {}
        self.grads: dict[Key, bool] = {}
        """Whether what is on its way will need a gradient."""

    def has(self, key: Key) -> bool:
        """Whether it is there, or on its way, in this form."""
        return key in self._there

    def on_its_way(self, key: Key) -> bool:
        """Whether one would have to wait for it."""
        return isinstance(self._there.get(key), Flight)

    def send(self, key: Key, value: Tensor | Flight, needs: bool) -> None:
        """What a collective makes; ``needs`` tells whether it will need a gradient."""
        self._there[key] = value if isinstance(value, Flight) else value.detach().requires_grad_(needs)
        self.grads[key] = needs

    def forget(self, key: Key) -> None:
        """Nothing will ask for it any more."""
        self._there.pop(key, None)

    def put(self, key: Key, value: Any) -> None:
        """A value that was made, or is on its way."""
        needs = torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad
        self._there[key] = value.detach().requires_grad_(needs) if isinstance(value, Tensor) else value

    def get(self, key: Key) -> Any:
        """The value, waited for, cut or put together as need be."""
        if key not in self._there:
            self._there[key] = self._converted(*key)
        value = self._there[key]
        if isinstance(value, Flight):
            needs = torch.is_grad_enabled() and self.grads[key]
            value = self._there[key] = value.land().requires_grad_(needs)
        return value

    def _converted(self, name: str, share: int | None) -> Any:
        dim = self._code.dims[name]
        if share is None:
            parts = [self.get((name, j)) for j in range(len(self._code.shares))]
            whole = parts[0] if dim is None else torch.cat([part.detach() for part in parts], dim)
            return whole.detach().requires_grad_(parts[0].requires_grad) if isinstance(whole, Tensor) else whole
        whole = self.get((name, None))
        if dim is None or not isinstance(whole, Tensor):
            return whole
        return _rows(whole.detach(), self._code, dim, share).requires_grad_(whole.requires_grad)


def _rows(whole: Tensor, code: PhasedCode, dim: int, share: int) -> Tensor:
    start, stop = code.shares[share]
    each = whole.shape[dim] // code.samples
    return whole.narrow(dim, start * each, (stop - start) * each)


class Gradients:
    """The gradients of one micro-batch's values as they flow back, each added up when it is taken."""

    def __init__(self, code: PhasedCode) -> None:
        self._code = code
        self._found: dict[Key, list[Tensor | Flight]] = {}
        self._whole: dict[str, Tensor | None] = {}

    def on_its_way(self, key: Key) -> bool:
        """Whether one would have to wait for a part of it."""
        return any(isinstance(part, Flight) for part in self._found.get(key, ()))

    def add(self, key: Key, gradient: Tensor | Flight | None) -> None:
        """A part of a value's gradient."""
        if gradient is not None:
            self._found.setdefault(key, []).append(gradient)

    def take(self, key: Key) -> Tensor | None:
        """All of a value's gradient; None if nothing read it. It is taken in the form the value was made in."""
        name, share = key
        dim = self._code.dims.get(name)
        total = self._sum(key)
        if share is None:
            shares = [self._sum((name, j)) for j in range(len(self._code.shares))]
            return _added(total, *self._together(shares, dim))
        if name not in self._whole:
            self._whole[name] = self._sum((name, None))
        whole = self._whole[name]
        if whole is None or (dim is None and share):
            return total
        return _added(total, whole if dim is None else _rows(whole, self._code, dim, share).clone())

    def _together(self, shares: list[Tensor | None], dim: int | None) -> Iterator[Tensor]:
        there = [part for part in shares if part is not None]
        if dim is None:
            yield from there
        elif there:
            each = there[0].shape[dim] // next(
                b - a for (a, b), g in zip(self._code.shares, shares, strict=True) if g is not None
            )
            sizes = [each * (stop - start) for start, stop in self._code.shares]
            like = there[0]
            zeros = [like.new_zeros((*like.shape[:dim], size, *like.shape[dim + 1 :])) for size in sizes]
            yield torch.cat([zero if part is None else part for part, zero in zip(shares, zeros, strict=True)], dim)

    def _sum(self, key: Key) -> Tensor | None:
        found = self._found.pop(key, [])
        return _added(*map(landed, found))


def _added(*parts: Tensor | None) -> Tensor | None:
    total: Tensor | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total
