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
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.tensor_parallel.layout import Layout, whole_size
from merak_like.partitioner.tensor_parallel.ranks import take
from merak_like.runtime.tensor_parallel.collectives import PEER, Target, TensorGroup

# torch 2.13 renamed them and warns of the old names
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class OnRows(Target):
    """A conversion between the whole and a rank's rows: one axis of a tensor, divided among all ranks."""

    name = "rows"

    def __init__(self, group: TensorGroup, layout: Layout, rank: int, what: str) -> None:
        super().__init__(self.name)
        self.group, self.layout, self.rank, self.what = group, layout, rank, what

    def gather(self, rows: Tensor) -> Tensor:
        """The whole of all ranks' rows."""
        order, (before, after), whole = self._lies(rows)
        mine = rows.permute(order).contiguous()
        found = mine.new_empty((self.group.degree, before, mine.numel() // (before * after), after))
        self.group.watch.wait(self._begin(_all_gather, found.view(-1), mine.view(-1)), self.what, PEER)
        return _back(found.transpose(0, 1).reshape(whole), order)

    def scatter(self, partial: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks."""
        order, (before, after), _ = self._lies(partial)
        given = partial.permute(order).reshape(before, self.group.degree, -1, after).transpose(0, 1).contiguous()
        local = take(partial, self.layout, self.rank).permute(order).shape
        found = given.new_empty(local)
        self.group.watch.wait(self._begin(_reduce_scatter, found.view(-1), given.view(-1)), self.what, PEER)
        return _back(found, order)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's rows, with memory of their own."""
        order, _, _ = self._lies(whole)
        rows = take(whole, self.layout, self.rank).permute(order)
        return _back(rows.clone(memory_format=torch.contiguous_format), order)

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
            return collective(into, given, group=self.group.group, async_op=True)


def _back(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Undo a permutation. No view for autograd: the model may go on in place."""
    return tensor.permute([order.index(dim) for dim in range(len(order))]).detach()


class Scatter(OnRows):
    """Partial sums to a rank's rows of the sum."""

    name = "reduce_scatter"

    def __call__(self, partial: Tensor) -> Tensor:
        return _Scatter.apply(partial, self)  # type: ignore[return-value]


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, node: Scatter) -> Tensor:
        ctx.node = node
        return node.scatter(partial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return ctx.node.gather(grads[0]), None


class GatherEnter(OnRows):
    """Rows to the whole, where each rank goes its own way: the gradient is a rank's rows of the sum over ranks."""

    name = "gather_enter"

    def __call__(self, rows: Tensor) -> Tensor:
        return _GatherEnter.apply(rows, self)  # type: ignore[return-value]


class _GatherEnter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, node: GatherEnter) -> Tensor:
        ctx.node = node
        return node.gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return ctx.node.scatter(grads[0]), None


class Gather(OnRows):
    """Rows to the whole, with which all ranks do the same: the gradient is whole too."""

    name = "gather"

    def __call__(self, rows: Tensor) -> Tensor:
        return _Gather.apply(rows, self)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, node: Gather) -> Tensor:
        ctx.node = node
        return node.gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return ctx.node.cut(grads[0]), None


class Take(OnRows):
    """The whole, which all ranks have, to a rank's rows: the gradient is gathered."""

    name = "take_rows"

    def __call__(self, whole: Tensor) -> Tensor:
        if not whole.requires_grad:
            return take(whole, self.layout, self.rank)
        return _Take.apply(whole, self)  # type: ignore[return-value]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, node: Take) -> Tensor:
        ctx.node = node
        return node.cut(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return ctx.node.gather(grads[0]), None
