"""Collectives of sequence parallelism as nodes of a graph (Korthikanti et al., arXiv 2205.05198): a rank has its rows.

::

    partial sums ──► Scatter ──► rows ──► norm, dropout, ... ──► GatherEnter ──► whole ──► linear (columns)
                     backward: gather                            backward: sum, each rank its rows
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.layout import Layout, whole_size
from merak_like.partitioner.tensor_parallel.ranks import take
from merak_like.runtime.exchange import all_gather, reduce_scatter
from merak_like.runtime.tensor_parallel.collectives import Collective, Flight, TensorGroup, landed
from merak_like.runtime.tensor_parallel.gathered import Gathered


class OnRows(Collective):
    """A conversion between the whole and a rank's rows: one axis of a tensor, divided among all ranks."""

    name = "rows"

    def __init__(self, group: TensorGroup, layout: Layout, rank: int, what: str) -> None:
        super().__init__(self.name)
        self.group, self.layout, self.rank, self.what = group, layout, rank, what

    def gather(self, rows: Tensor) -> Flight:
        """The whole of all ranks' rows."""
        order, (before, after), whole = self._lies(rows)
        mine = rows.detach().permute(order).contiguous()
        found = mine.new_empty((self.group.degree, before, mine.numel() // (before * after), after))
        work = self._begin(all_gather, found.view(-1), mine.view(-1))
        return Flight(
            self.group, work, self.what, lambda: _back(found.transpose(0, 1).reshape(whole), order), given=mine
        )

    def scatter(self, partial: Tensor) -> Flight:
        """This rank's rows of the sum over ranks."""
        order, (before, after), _ = self._lies(partial)
        given = partial.detach().permute(order).reshape(before, self.group.degree, -1, after)
        given = given.transpose(0, 1).contiguous()
        found = given.new_empty(take(partial, self.layout, self.rank).permute(order).shape)
        work = self._begin(reduce_scatter, found.view(-1), given.view(-1))
        return Flight(self.group, work, self.what, lambda: _back(found, order), given)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's rows, with memory of their own."""
        order, _, _ = self._lies(whole)
        rows = take(whole, self.layout, self.rank).permute(order)
        return _back(rows.clone(memory_format=torch.contiguous_format), order)

    def __call__(self, value: Tensor) -> Tensor:
        return _Convert.apply(value, self)  # type: ignore[return-value]

    def _lies(self, tensor: Tensor) -> tuple[list[int], tuple[int, int], tuple[int, ...]]:
        """The dimensions in the order of memory, in which a dropout would draw; elements before and after the axis of
        rows, and sizes of the whole, in that order."""
        order = sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride(dim), dim))
        factors = [factor for dim in order for factor in self.layout[dim]]
        (at,) = (i for i, factor in enumerate(factors) if factor.degree > 1)  # type: ignore[union-attr]
        sizes = [factor.size for factor in factors]  # type: ignore[union-attr]
        return order, (prod(sizes[:at]), prod(sizes[at + 1 :])), tuple(whole_size(self.layout[dim]) for dim in order)

    def _begin(self, collective: Any, into: Tensor, given: Tensor) -> Any:
        with self.group.watch.waiting(f"the start of {self.what}"):
            return collective(into, given, self.group.group)


def _back(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Undo a permutation. No view for autograd: the model may go on in place."""
    return tensor.permute([order.index(dim) for dim in range(len(order))]).detach()


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, node: OnRows) -> Tensor:
        ctx.node = node
        return landed(node.start(value))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return landed(ctx.node.start_back(grads[0])), None


class Scatter(OnRows):
    """Partial sums to a rank's rows of the sum."""

    name = "reduce_scatter"
    sends = sends_back = True

    def start(self, value: Tensor) -> Flight:
        return self.scatter(value)

    def start_back(self, gradient: Tensor) -> Flight:
        return self.gather(gradient)


class ToWhole(OnRows):
    """Rows to the whole, which the backward may gather again."""

    sends = True

    def __init__(
        self, group: TensorGroup, layout: Layout, rank: int, what: str, gathered: Gathered | None = None
    ) -> None:
        """``gathered`` is told what was made of which rows; None if the rows are written into later."""
        super().__init__(group, layout, rank, what)
        self.gathered = gathered

    def start(self, value: Tensor) -> Flight:
        flight, rows = self.gather(value), value.detach()
        if self.gathered is None:
            return flight
        note = self.gathered.note
        return flight.then(lambda whole: note(whole, lambda: self.gather(rows).land()))


class GatherEnter(ToWhole):
    """Rows to the whole, where each rank goes its own way: the gradient is a rank's rows of the sum over ranks."""

    name = "gather_enter"
    sends_back = True

    def start_back(self, gradient: Tensor) -> Flight:
        return self.scatter(gradient)


class Gather(ToWhole):
    """Rows to the whole, with which all ranks do the same: the gradient is whole too."""

    name = "gather"

    def start_back(self, gradient: Tensor) -> Tensor:
        return self.cut(gradient)


class Take(OnRows):
    """The whole, which all ranks have, to a rank's rows: the gradient is gathered."""

    name = "take_rows"
    sends_back = True

    def start(self, value: Tensor) -> Tensor:
        return self.cut(value)

    def start_back(self, gradient: Tensor) -> Flight:
        return self.gather(gradient)

    def __call__(self, value: Tensor) -> Tensor:
        return super().__call__(value) if value.requires_grad else take(value, self.layout, self.rank)
