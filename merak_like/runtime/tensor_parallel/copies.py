"""Parts of sharded weights that several ranks have, as the keys and values of a multi-query projection: each rank has
the gradient of its own heads only, so they are added up once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merak_like.runtime.tensor_parallel.collectives import TensorGroup


@dataclass(frozen=True)
class Copy:
    """Elements ``start <= i < stop`` along a dimension of this rank's part, which all ranks of a group have."""

    parameter: nn.Parameter
    dim: int
    start: int
    stop: int
    group: TensorGroup

    @property
    def gradient(self) -> Tensor | None:
        """Of these elements, as a view; None if the parameter has none."""
        grad = self.parameter.grad
        return None if grad is None else grad.narrow(self.dim, self.start, self.stop - self.start)


class Copies:
    """All of one rank's, in the same order on the ranks of a group."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.by_group: dict[int, list[Copy]] = {}
        for copy in copies:
            self.by_group.setdefault(id(copy.group.group), []).append(copy)

    def add_up(self) -> None:
        """Sum their gradients, one collective for each group and dtype."""
        for copies in self.by_group.values():
            pieces = [piece for copy in copies if (piece := copy.gradient) is not None]
            for dtype in dict.fromkeys(piece.dtype for piece in pieces):
                same = [piece for piece in pieces if piece.dtype == dtype]
                flat = torch.cat([piece.flatten() for piece in same])
                copies[0].group.reduce(flat, "the sum of gradients of weights that several ranks have")
                for piece, total in zip(same, flat.split([piece.numel() for piece in same]), strict=True):
                    piece.copy_(total.view_as(piece))
