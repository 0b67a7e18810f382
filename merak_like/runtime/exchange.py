"""Collectives that are begun now and waited for later, on CPUs by messages where those are cheaper than gloo's calls.

Summed runs go straight to their owners: gloo's own call first reduces all of it everywhere (torch 2.13), which sends
twice as much. Two ranks swap what they have: gloo's ring sends the same bytes in several messages that wait for one
another. Both ranks add the same two numbers, so both have the same bits. What is small goes past gloo (``pair.py``).

What is begun is waited for once, by ``wait(limit)`` as a work of torch is; until then its tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.runtime.groups import Group
from merak_like.runtime.pair import MOST, pair_of

SUM, MAX = "SUM", "MAX"
"""As torch.distributed names them."""
_COMBINE: dict[str, Callable[..., Tensor]] = {SUM: torch.add, MAX: torch.maximum}


def all_reduce(tensor: Tensor, group: Group, op: str = SUM) -> Any:
    """Start to reduce a contiguous tensor in place, on all ranks; ``op`` is SUM or MAX."""
    if not _swaps(tensor, group):
        return dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group=group, async_op=True)
    theirs, combine, peer = torch.empty_like(tensor), _COMBINE[op], 1 - dist.get_rank(group)
    return Messages(_transfer(theirs, peer, tensor, peer, group), lambda: combine(tensor, theirs, out=tensor))


def all_gather(flat: Tensor, own: Tensor, group: Group) -> Any:
    """Start to bring every rank's run of ``flat`` to all. ``own`` may be a run of ``flat``."""
    if not _swaps(flat, group):
        return _by("all_gather_single", "all_gather_into_tensor")(flat, own, group=group, async_op=True)
    runs, own, mine = flat.view(2, -1), own.view(-1), dist.get_rank(group)
    if own.data_ptr() != runs[mine].data_ptr():
        runs[mine].copy_(own)
    return Messages(_transfer(runs[1 - mine], 1 - mine, own, 1 - mine, group))


def reduce_scatter(own: Tensor, flat: Tensor, group: Group) -> Any:
    """Start to sum ``flat`` over the group, after which ``own`` has this rank's run.

    ``own`` may be that run of ``flat`` itself.
    """
    if flat.device.type != "cpu":
        return _by("reduce_scatter_single", "reduce_scatter_tensor")(own, flat, group=group, async_op=True)
    ranks, mine = dist.get_world_size(group), dist.get_rank(group)
    runs = flat.view(ranks, -1)
    others = torch.empty((ranks - 1, own.numel()), dtype=flat.dtype)
    works: list[Any] = []
    for away, room in enumerate(others, 1):  # all ranks at once, and each pair in one order
        source, target = (mine - away) % ranks, (mine + away) % ranks
        works += _transfer(room, source, runs[target], target, group)

    def add() -> None:
        if own.data_ptr() != runs[mine].data_ptr():
            own.copy_(runs[mine])
        for other in others:
            own.add_(other)

    return Messages(works, add)


def _by(name: str, before: str) -> Callable[..., Any]:
    """Torch's function under its name or, in torch before 2.13, which warns of the other, the one before."""
    return getattr(dist, name, None) or getattr(dist, before)


def _swaps(tensor: Tensor, group: Group) -> bool:
    return tensor.device.type == "cpu" and dist.get_world_size(group) == 2 and dist.get_backend(group) == "gloo"


def _transfer(theirs: Tensor, source: int, mine: Tensor, target: int, group: Group) -> tuple[Any, ...]:
    if mine.nbytes <= MOST and dist.get_world_size(group) == 2 and (pair := pair_of(group)) is not None:
        return (pair.swap(mine, theirs),)
    return dist.irecv(theirs, group=group, group_src=source), dist.isend(mine, group=group, group_dst=target)


class Messages:
    """Transfers under way, and what is done with them when they are there."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], Any] = lambda: None) -> None:
        self._works, self._finish = works, finish

    def wait(self, limit: timedelta) -> bool:
        """Wait for all of them, and finish. False when the limit has passed."""
        if not all(work.wait(limit) is not False for work in self._works):
            return False
        self._finish()
        return True
