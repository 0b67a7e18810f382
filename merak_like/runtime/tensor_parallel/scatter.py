"""Collectives of sequence parallelism as nodes of a graph: each rank has its rows (Korthikanti et al., arXiv 2205.05198).

::

    partial sums ──► Scatter ──► rows ──► norm, dropout, ... ──► GatherEnter ──► whole ──► linear (columns)
                     backward: gather                            backward: sum, each rank its rows
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.tensor_parallel.layout import Layout, whole_size
from merak_like.runtime.tensor_parallel.collectives import PEER, Target, TensorGroup
from merak_like.runtime.tensor_parallel.shards import part

# torch 2.13 renamed them and warns of the old names
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class OnRows(Target):
    """A conversion between the whole and a rank's rows: one axis of a tensor, divided among all ranks."""

    name = "rows"

    def __init__(self, group: TensorGroup, layout: Layout, rank: int, what: str) -> None:
        super().__init__(self.name)
        self.group, self.layout, self.rank, self.what = group, layout, rank, what
        factors = [factor for dim in layout for factor in dim]
        (at,) = (i for i, factor in enumerate(factors) if factor.degree > 1)  # type: ignore[union-attr]
        sizes = [factor.size for factor in factors]  # type: ignore[union-attr]
        self.before, self.rows, self.after = prod(sizes[:at]), sizes[at] // group.degree, prod(sizes[at + 1 :])
        """A row-major tensor is ``(before, rows of all ranks, after)``."""
        self.whole = tuple(map(whole_size, layout))

    def gather(self, rows: Tensor) -> Tensor:
        """The whole of all ranks' rows."""
        mine = rows.contiguous()
        found = mine.new_empty((self.group.degree, self.before, self.rows, self.after))
        self.group.watch.wait(self._begin(_all_gather, found.view(-1), mine.view(-1)), self.what, PEER)
        return found.transpose(0, 1).reshape(self.whole)

    def scatter(self, partial: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks."""
        local = part(partial, self.layout, self.rank).shape
        given = partial.reshape(self.before, self.group.degree, self.rows, self.after).transpose(0, 1).contiguous()
        found = given.new_empty(local)
        self.group.watch.wait(self._begin(_reduce_scatter, found.view(-1), given.view(-1)), self.what, PEER)
        return found

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's rows, with memory of their own."""
        return part(whole, self.layout, self.rank).clone(memory_format=torch.contiguous_format)

    def _begin(self, collective: Any, into: Tensor, given: Tensor) -> Any:
        with self.group.watch.waiting(f"the start of {self.what}"):
            return collective(into, given, group=self.group.group, async_op=True)


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


class Cut(OnRows):
    """The whole, which all ranks have, to a rank's rows: the gradient is gathered."""

    name = "rows"

    def __call__(self, whole: Tensor) -> Tensor:
        if not whole.requires_grad:
            return part(whole, self.layout, self.rank)
        return _Cut.apply(whole, self)  # type: ignore[return-value]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, node: Cut) -> Tensor:
        ctx.node = node
        return node.cut(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return ctx.node.gather(grads[0]), None
