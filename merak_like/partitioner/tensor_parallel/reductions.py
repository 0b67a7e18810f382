"""Sums over ranks that live in one process, each with its own backward. The ranks' tensors go in together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.derived import Group


class AllReduce(torch.autograd.Function):
    """Sum over ranks; the gradient of a rank's copy goes to its summand."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack([t.to(torch.promote_types(t.dtype, torch.float64)) for t in tensors]).sum(0)
        return tuple(total.to(tensors[0].dtype, copy=True) for _ in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class Enter(torch.autograd.Function):
    """A copy on every rank; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack(grads).sum(0)
        return tuple(total.clone() for _ in grads)


class Scale(torch.autograd.Function):
    """Divide in one direction only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: int, backward: int) -> Tensor:
        ctx.by = backward
        return x / forward if forward > 1 else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad / ctx.by, None, None


def over(group: Group, tensors: list[Any], function: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
    """Apply a function to the tensors of each set of ranks that form the group."""
    members: dict[tuple[int, int], list[int]] = {}
    for rank in range(len(tensors)):
        key = (rank // (group.repeat * group.degree), rank % group.repeat)
        members.setdefault(key, []).append(rank)
    out = list(tensors)
    for ranks in members.values():
        for rank, result in zip(ranks, function([tensors[r] for r in ranks]), strict=True):
            out[rank] = result
    return out
