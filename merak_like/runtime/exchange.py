"""What one rank has of a flat tensor, brought to all; and all of it summed, to the one that owns each run.

On a CPU summed runs go straight to their owners: gloo's own call first reduces all of it everywhere (torch 2.13), which
sends twice as much.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.runtime.groups import Group

# torch 2.13 renamed them and warns of the names before it
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(flat: Tensor, own: Tensor, group: Group) -> Any:
    """Start to bring every rank's run of ``flat`` to all; something to wait for. ``own`` may be a run of ``flat``."""
    return _gather(flat, own, group=group, async_op=True)


def reduce_scatter(own: Tensor, flat: Tensor, group: Group) -> Any:
    """Start to sum ``flat`` over the group; something to wait for, after which ``own`` has this rank's run.

    ``own`` may be that run of ``flat`` itself.
    """
    if flat.device.type != "cpu":
        return _scatter(own, flat, group=group, async_op=True)
    return Exchange(own, flat, group)


class Exchange:
    """A reduce-scatter under way, as messages between every two ranks."""

    def __init__(self, own: Tensor, flat: Tensor, group: Group) -> None:
        ranks, mine = dist.get_world_size(group), dist.get_rank(group)
        runs = flat.view(ranks, -1)
        self._own, self._mine = own, runs[mine]
        self._others = torch.empty((ranks - 1, own.numel()), dtype=flat.dtype)
        self._works: list[Any] = []
        for away, room in enumerate(self._others, 1):  # all ranks at once, and each pair in one order
            source, target = (mine - away) % ranks, (mine + away) % ranks
            self._works.append(dist.irecv(room, group=group, group_src=source))
            self._works.append(dist.isend(runs[target], group=group, group_dst=target))

    def wait(self, limit: timedelta) -> bool:
        """Wait for all messages, and sum. False when the limit has passed."""
        if not all(work.wait(limit) is not False for work in self._works):
            return False
        if self._own.data_ptr() != self._mine.data_ptr():
            self._own.copy_(self._mine)
        for other in self._others:
            self._own.add_(other)
        return True
