"""Activations that are not kept: a piece of a stage is run again before its backward (Chen et al., arXiv 1604.06174).

The first run builds autograd's graph, but where an op would keep a tensor stands its number. The second run makes the
same tensors in the same order and puts them behind the numbers; its own graph is thrown away. So there is one graph,
and the gradients are those of a stage that keeps everything, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from merak_like.runtime import rng
from merak_like.runtime.stage_code import Piece


class Again:
    """One piece and one micro-batch, between its two runs and its backward."""

    def __init__(
        self, piece: Piece, args: Sequence[Tensor], device: torch.device, buffers: Sequence[Tensor]
    ) -> None:  # fmt: skip
        """``buffers`` are those that the piece may change, as batch norm does: running it again must not."""
        self._piece, self._device, self._buffers = piece, device, buffers
        self._args: list[Tensor] = [arg.detach().requires_grad_(arg.requires_grad) for arg in args]
        self._random = rng.state(device) if piece.random else None
        self._before = [buffer.clone() for buffer in buffers]
        self._wanted: list[tuple[torch.Size, torch.dtype]] = []
        self._done = False
        self.kept: list[Tensor] = []
        """What the ops keep, once it was made again."""

    @property
    def entered(self) -> Sequence[Tensor]:
        """What it is run again from; empty once that is done."""
        return self._args

    def first(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the piece and keep nothing."""

        def number(tensor: Tensor) -> int:
            self._wanted.append((tensor.shape, tensor.dtype))
            return len(self._wanted) - 1

        with torch.autograd.graph.saved_tensors_hooks(number, self.kept.__getitem__):
            return self._piece.run(*args)

    def changed(self) -> list[Tensor]:
        """The buffers that the first run did change. By value: batch norm's kernel does not tell autograd."""
        return [b for b, before in zip(self._buffers, self._before, strict=True) if not torch.equal(b, before)]

    def run(self) -> None:
        """Run the piece again; nothing is done the second time.

        Raises RuntimeError where the second run did not keep what the first did: the piece is not a function of its
        inputs, weights, buffers and random numbers.
        """
        if self._done:
            return
        with torch.enable_grad(), self._as_before(), torch.autograd.graph.saved_tensors_hooks(self._keep, _unread):
            self._piece.run(*self._args)
        if [(tensor.shape, tensor.dtype) for tensor in self.kept] != self._wanted:
            raise RuntimeError(
                f"{self._piece.name} kept {len(self._wanted)} tensors for the backward when it ran first and "
                f"{len(self.kept)} when it was run again, or others: it does not do the same twice, so do not "
                "recompute it"
            )
        self._args, self._done = [], True

    def _keep(self, tensor: Tensor) -> None:
        self.kept.append(tensor.detach())

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """The random numbers and the buffers of the first run; what they are now comes back after."""
        now = [buffer.clone() for buffer in self._buffers]
        state = None if self._random is None else rng.state(self._device)
        if self._random is not None:
            rng.resume(self._random, self._device)
        _fill(self._buffers, self._before)
        try:
            yield
        finally:
            _fill(self._buffers, now)
            if state is not None:
                rng.resume(state, self._device)


def _fill(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def _unread(_: None) -> Tensor:
    raise AssertionError("the graph of the second run is thrown away")
