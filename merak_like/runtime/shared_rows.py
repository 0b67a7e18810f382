"""Tensors whose rows replicas share, as ``fully_shard`` leaves them (DTensor).

Apart from what every engine needs: ``torch.distributed.tensor`` cannot be imported where torch was built without
``torch.distributed``, on which a single process does not depend.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from merak_like.runtime.exchange import all_gather
from merak_like.runtime.groups import Group
from merak_like.runtime.watch import Watch


def whole(tensor: Any, name: str, replicas: Group, watch: Watch) -> Tensor:
    """A tensor whose rows replicas share, gathered on the CPU of the first; every replica asks.

    Not by ``full_tensor``: torch finds the group of an equal mesh of before by its name, which may be closed.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    own, _, each = share(tensor, replicas)
    count = dist.get_world_size(replicas)
    padded = own.new_zeros((each, *tensor.shape[1:]))
    padded[: own.shape[0]] = own
    found = own.new_empty((each * count, *tensor.shape[1:]))
    watch.wait(all_gather(found, padded, replicas), name, "with the replicas")
    # nobody reads what others than the first have, and all of a model may be too much for them
    return found[: tensor.shape[0]].cpu() if dist.get_rank(replicas) == 0 else torch.empty(0, dtype=tensor.dtype)


def share(tensor: DTensor, replicas: Group) -> tuple[Tensor, slice, int]:
    """The rows of a shared tensor that this rank has, which of all they are, and how many every rank but the last ones
    has."""
    assert replicas is not None, "rows are shared among replicas"
    own, each = tensor.to_local().detach(), -(-tensor.shape[0] // dist.get_world_size(replicas))
    start = min(dist.get_rank(replicas) * each, tensor.shape[0])
    return own, slice(start, start + own.shape[0]), each
