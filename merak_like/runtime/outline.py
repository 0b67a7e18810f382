"""Who must have what of a batch, and how a rank that has all of it tells the others what they need not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from merak_like.runtime.batches import Outline, to_device, weighed
from merak_like.runtime.engine import Engine


def read(engine: Engine) -> list[set[tuple[Any, ...]]]:
    """For each pipeline rank, where in a batch like the example is what its stages read."""
    return [engine._programs.read(rank) for rank in range(engine.plan.mesh.pp)]


def outline(engine: Engine, batch: Any, times: int, *, batch_is_global: bool) -> Outline:
    """A batch with what its micro-batches count."""
    parts = engine.plan.micro_batches * (engine.plan.mesh.dp if batch_is_global else 1)
    return Outline(batch, tuple(weighed(batch, parts, engine._prepare, engine._loss_weight)[1]), times)


def tell(engine: Engine, said: Outline, ranks: Iterable[int]) -> None:
    """Let other ranks know a batch's shapes, and what it counts."""
    blank = Outline(to_device(said.batch, torch.device("meta")), said.items, said.times)
    for rank in ranks:
        with engine._watch.waiting("the end of telling of a batch", f"to rank {rank}"):
            dist.send_object_list([blank], rank)


def hear(engine: Engine, rank: int) -> Outline:
    """What another rank tells."""
    box: list[Any] = [None]
    with engine._watch.waiting("the outline of a batch", f"from rank {rank}"):
        dist.recv_object_list(box, rank)
    return box[0]
