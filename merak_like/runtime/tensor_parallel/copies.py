"""Parts of sharded weights that several ranks have, as the keys and values of a multi-query projection: each rank has
the gradient of its own heads only, so they are added up once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from merak_like.runtime.tensor_parallel.collectives import TensorGroup


@dataclass(frozen=True)
class Copy:
    """Elements ``start <= i < stop`` along a dimension of this rank's part, which all ranks of a group have."""

    parameter: nn.Parameter
    dim: int
    start: int
    stop: int
    group: TensorGroup


class Copies:
    """All of one rank's, in the same order on the ranks of a group."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.by_group: dict[int, list[Copy]] = {}
        for copy in copies:
            self.by_group.setdefault(id(copy.group.group), []).append(copy)

    def add_up(self) -> None:
        """Sum their gradients, one collective for each group and dtype."""
        for copies in self.by_group.values():
            pieces = [(c.parameter.grad.narrow(c.dim, c.start, c.stop - c.start), c) for c in copies if c.parameter.grad is not None]
            for dtype in dict.fromkeys(piece.dtype for piece, _ in pieces):
                same = [(piece, copy) for piece, copy in pieces if piece.dtype == dtype]
                flat = torch.cat([piece.flatten() for piece, _ in same])
                same[0][1].group.reduce(flat, "the sum of gradients of weights that several ranks have")
                for (piece, _), total in zip(same, flat.split([piece.numel() for piece, _ in same]), strict=True):
                    piece.copy_(total.view_as(piece))
