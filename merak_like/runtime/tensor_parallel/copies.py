"""Parts of sharded weights that several ranks have, as the keys and values of a multi-query projection: each rank has
the gradient of its own heads only, so they are added up once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from merak_like.runtime.optimizer import Slot
from merak_like.runtime.tensor_parallel.collectives import TensorGroup


@dataclass(frozen=True)
class Copy:
    """Elements ``start <= i < stop`` along a dimension of this rank's part, which all ranks of a group have."""

    slot: Slot
    dim: int
    start: int
    stop: int
    group: TensorGroup

    def cut(self, gradient: Tensor) -> Tensor:
        """These elements of a gradient of the slot: a view, or copied together from a run."""
        return gradient[self._places] if self.slot.run else self._narrow(gradient)

    def put(self, gradient: Tensor, elements: Tensor) -> None:
        """Write these elements into a gradient."""
        if self.slot.run:
            gradient[self._places] = elements
        else:
            part = self._narrow(gradient)
            part.copy_(elements.view_as(part))

    def _narrow(self, whole: Tensor) -> Tensor:
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    @cached_property
    def _places(self) -> Tensor:
        """Where they are in the run; the ranks of a group have runs at the same place."""
        assert self.slot.run is not None
        marks = torch.zeros(self.slot.shape, dtype=torch.bool, device=self.slot.target.device)
        self._narrow(marks).fill_(True)
        return marks.flatten()[slice(*self.slot.run)].nonzero()[:, 0]


class Copies:
    """All of one rank's, in the same order on the ranks of a group."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self.by_group: dict[int, list[Copy]] = {}
        for copy in copies:
            self.by_group.setdefault(id(copy.group.group), []).append(copy)

    def add_up(self) -> None:
        """Sum their gradients, one collective for each group and dtype."""
        for copies in self.by_group.values():
            found = [(copy, grad) for copy in copies if (grad := copy.slot.target.grad) is not None]
            for dtype in dict.fromkeys(grad.dtype for _, grad in found):
                same = [(copy, grad) for copy, grad in found if grad.dtype == dtype]
                pieces = [copy.cut(grad).flatten() for copy, grad in same]
                flat = torch.cat(pieces)
                copies[0].group.reduce(flat, "the sum of gradients of weights that several ranks have")
                for (copy, grad), total in zip(same, flat.split([p.numel() for p in pieces]), strict=True):
                    copy.put(grad, total)
