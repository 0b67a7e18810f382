"""Gathered rows are not kept for the backward, which gathers them again (Korthikanti et al., arXiv 2205.05198, 4.2.2).

::

    forward     rows ──► gather ──► whole ──► linear          the linear would keep the whole for its weight's gradient
    kept        rows ┘
    backward    rows ──► gather ──► whole ──► weight's gradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merak_like._compat import StorageWeakRef


class Held:
    """Rows in the place of the whole. What was gathered again lives as long as somebody's backward is still to come."""

    def __init__(self, gather: Callable[[], Tensor]) -> None:
        self._gather = gather
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """Gathered once, for all that keep it."""
        if self._whole is None:
            self._whole = self._gather()
        return self._whole


@dataclass(frozen=True, eq=False)
class _View:
    """What an operation would have kept: the whole, or a view of it."""

    held: Held
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.held.whole().as_strided(self.size, self.stride, self.offset)


class Gathered:
    """What a rank's code gathered in the forward that is running."""

    def __init__(self) -> None:
        self._held: dict[StorageWeakRef, Held] = {}
        self._open = False

    def note(self, whole: Tensor, gather: Callable[[], Tensor]) -> None:
        """``whole`` is what ``gather`` makes, of rows that nobody changes."""
        if self._open:
            self._held = {key: held for key, held in self._held.items() if not key.expired()}
            self._held[StorageWeakRef(whole.untyped_storage())] = Held(gather)

    @contextmanager
    def kept_as_rows(self) -> Iterator[None]:
        """While it is on, autograd keeps rows where it would keep what was gathered of them."""
        self._open = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._open = False
            self._held.clear()

    def _pack(self, tensor: Tensor) -> Any:
        there = tensor.layout is torch.strided and bool(self._held)
        held = self._held.get(StorageWeakRef(tensor.untyped_storage())) if there else None
        if held is None:
            return tensor
        return _View(held, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Any) -> Tensor:
    return kept.tensor() if isinstance(kept, _View) else kept
