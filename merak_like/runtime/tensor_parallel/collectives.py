"""Sums over tensor-parallel ranks as nodes of a graph, each with its own backward (Shoeybi et al., arXiv 1909.08053).

::

    x ──► Enter ──► linear (columns) ──► ... ──► linear (rows) ──► Reduce ──► y
          backward: sum                                            forward: sum
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merak_like.runtime.exchange import SUM, all_reduce
from merak_like.runtime.watch import Watch

PEER = "with the tensor-parallel ranks"


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """The ranks that divide some axes among them, seen from one of them."""

    group: Any
    """Process group of torch.distributed."""
    degree: int
    watch: Watch

    def begin(self, tensor: Tensor, what: str, op: str = SUM) -> Any:
        """Start to reduce a contiguous tensor in place."""
        with self.watch.waiting("the start of", what):
            return all_reduce(tensor, self.group, op)

    def reduce(self, tensor: Tensor, what: str, op: str = SUM) -> Tensor:
        """Reduce a contiguous tensor in place."""
        self.watch.wait(self.begin(tensor, what, op), what, PEER)
        return tensor


class Flight:
    """A collective on its way."""

    def __init__(
        self, group: TensorGroup, work: Any, what: str, finish: Callable[[], Tensor], given: Tensor | None = None
    ) -> None:
        """``finish`` gives the result once the work is done; ``given`` is read until then."""
        self._group, self._work, self._what, self._finish, self._given = group, work, what, finish, given

    def land(self) -> Tensor:
        """Wait for it, once."""
        self._group.watch.wait(self._work, self._what, PEER)
        return self._finish()

    def then(self, look: Callable[[Tensor], None]) -> Flight:
        """The same, and the result is looked at when it is there."""

        def finish() -> Tensor:
            found = self._finish()
            look(found)
            return found

        return Flight(self._group, self._work, self._what, finish, self._given)


def landed(value: Tensor | Flight) -> Tensor:
    """Waited for, if need be."""
    return value.land() if isinstance(value, Flight) else value


class Target:
    """What a node of a generated graph calls: an object with the name that the code shows."""

    __module__ = "merak_like.runtime.tensor_parallel"

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name


class Collective(Target):
    """A conversion over ranks, in two directions, each of which may be on its way while something else is computed."""

    sends = sends_back = False
    """Whether something is sent in the forward, in the backward."""

    def start(self, value: Tensor) -> Tensor | Flight:
        """The value to its converted form. No view of it for autograd."""
        return value

    def start_back(self, gradient: Tensor) -> Tensor | Flight:
        """The gradient of the converted form to that of the value."""
        return gradient


class Reduce(Collective):
    """A partial sum of each rank to the whole sum on all; a gradient passes as it is."""

    sends = True

    def __init__(self, group: TensorGroup, what: str, own: bool) -> None:
        """``own``: nothing else reads the partial sum, so it may be overwritten."""
        super().__init__("reduce")
        self.group, self.what, self.own = group, what, own

    def start(self, value: Tensor) -> Tensor | Flight:
        mine = _own(value, self.own)
        return Flight(self.group, self.group.begin(mine, self.what), self.what, lambda: mine)

    def __call__(self, partial: Tensor) -> Tensor:
        return _Reduce.apply(partial, self)  # type: ignore[return-value]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, node: Reduce) -> Tensor:
        ctx.set_materialize_grads(False)
        return landed(node.start(partial))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


class Enter(Collective):
    """A whole value where each rank goes its own way: the gradient is the sum over ranks."""

    sends_back = True

    def __init__(self, group: TensorGroup, what: str, own: bool = False) -> None:
        """``own``: the gradient that comes back is nobody else's, so it may be overwritten."""
        super().__init__("enter")
        self.group, self.what, self.own = group, what, own

    def start_back(self, gradient: Tensor) -> Tensor | Flight:
        mine = _own(gradient, self.own)
        return Flight(self.group, self.group.begin(mine, self.what), self.what, lambda: mine)

    def __call__(self, whole: Tensor) -> Tensor:
        return _Enter.apply(whole, self) if whole.requires_grad else whole  # type: ignore[return-value]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, node: Enter) -> Tensor:
        ctx.node = node
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return landed(ctx.node.start_back(grads[0])), None


def _own(tensor: Tensor, own: bool) -> Tensor:
    """To be overwritten: its memory if that may be, but no view of it, since the model may go on in place."""
    mine = tensor.detach()
    return mine if own and mine.is_contiguous() else mine.clone(memory_format=torch.contiguous_format)


class Scale(Target):
    """Divide by the ranks in one direction only."""

    def __init__(self, forward: int, backward: int) -> None:
        super().__init__("share" if forward > 1 else "even")
        self.forward, self.backward = forward, backward

    def __call__(self, x: Tensor) -> Tensor:
        return _Scale.apply(x, self)  # type: ignore[return-value]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, node: Scale) -> Tensor:
        ctx.by = node.backward
        return x / node.forward if node.forward > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0] / ctx.by if ctx.by > 1 else grads[0], None
