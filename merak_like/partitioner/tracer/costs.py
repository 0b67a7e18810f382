"""What the op being recorded costs: flops, bytes moved, kernels, and bytes kept for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from merak_like._compat import FakeTensorMode, storage_key
from merak_like.partitioner.tracer.counting import count
from merak_like.partitioner.tracer.draft import Draft
from merak_like.partitioner.tracer.memo import Memo
from merak_like.partitioner.tracer.words import draws


class Costs:
    """Adds up on ``current``, whoever runs: a recorded call, or everything inside a leaf."""

    def __init__(self, mode: FakeTensorMode, parameters: Sequence[torch.Tensor], keep: list[Any], memo: bool) -> None:
        self.current = Draft("", "", "", "")
        self.keep = keep
        self.paid = {storage_key(t) for t in parameters}
        """Storages that are kept anyway, or that an earlier op already keeps."""
        self.trial: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.memo = Memo(mode, self.pack, self.grow) if memo else None

    def tally(self, name: str, args: Any, kwargs: Any, outs: Sequence[torch.Tensor]) -> None:
        """Add one function call."""
        if not outs:
            return
        flops, moved = count(name, args, kwargs, outs)
        current = self.current
        current.flops += flops
        current.moved += moved
        current.kernels += bool(moved)
        current.random = current.random or draws(name, args, kwargs)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Saved-tensor hook: the op that first keeps a storage for the backward pays for it."""
        if self.trial:
            return self.trial(tensor)
        if self.memo:
            self.memo.note(tensor)
        key = storage_key(tensor)
        if key not in self.paid:
            self.paid.add(key)
            self.keep.append(tensor)
            self.current.kept.append(key)
            self.current.saved += tensor.untyped_storage().nbytes()  # a view keeps all of what it is a view of
        return tensor

    @contextmanager
    def trying(self, draft: Draft, stands_for: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Count real tensors for this op; those that stand for fakes, by their storage, as these."""
        mine: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            key = storage_key(tensor)
            fake = stands_for.get(key)
            if fake is not None:
                self.trial = None
                self.pack(fake)
                self.trial = pack
            elif key not in mine:
                mine[key] = tensor
                self.grow(tensor.untyped_storage().nbytes())
            return tensor

        before, self.current, self.trial = self.current, draft, pack
        try:
            yield
        finally:
            self.current, self.trial = before, None

    def grow(self, nbytes: int) -> None:
        """Bytes kept for the backward that no tensor here stands for."""
        self.current.saved += nbytes
