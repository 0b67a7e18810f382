"""What a model gives besides its loss, brought from the stages that make it to every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.runtime.batches import rows
from merak_like.runtime.engine import Engine
from merak_like.runtime.initialize import World
from merak_like.runtime.optimizer import StepResult
from merak_like.runtime.watch import Watch

LOSS = "loss"


def predict(engine: Engine, batch: Any) -> tuple[StepResult, dict[str, Tensor]]:
    """``engine.evaluate`` on a global batch, and what the model gives besides the loss, by name, on every rank.

    Tensors with a row for each sample come whole, on the CPU, in the batch's order; others are left out. Raises
    ValueError under tensor parallelism, where a rank may hold some columns of an output only.
    """
    if engine.plan.mesh.tp > 1:
        raise ValueError(
            f"the outputs of a model on {engine.plan.mesh} may lie in parts on the tensor-parallel ranks and are not "
            "brought together yet: use tp=1 for predictions and metrics; the loss is there under any tp"
        )
    kept, before = Kept(), engine._do
    engine._do = {**before, Kind.F: kept.around(before[Kind.F])}
    try:
        result = engine.evaluate(batch)
    finally:
        engine._do = before
    sizes = [rows(part) for part in engine._batches]
    return result, kept.whole(sizes, engine.groups.coord.dp, engine.world, engine._watch)


class Kept:
    """The outputs of the forwards that ran on this rank, by micro-batch and name."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, str], Tensor] = {}

    def around(self, forward: Callable[[Action], object]) -> Callable[[Action], object]:
        """The same action, keeping what it returns."""

        def keep(action: Action) -> None:
            made: Any = forward(action)
            named: Mapping[str, Tensor] = made
            self.outputs.update(((action.micro_batch, n), t) for n, t in named.items() if n != LOSS)

        return keep

    def whole(self, sizes: Sequence[int], replica: int, world: World, watch: Watch) -> dict[str, Tensor]:
        """Every output of every rank, micro-batch behind micro-batch; ``sizes`` are the rows of this rank's.

        Outputs without a row for each sample are left out.
        """
        mine = {
            (replica, at, name): tensor.detach().contiguous()
            for (at, name), tensor in self.outputs.items()
            if tensor.dim() and tensor.shape[0] == sizes[at]
        }
        parts = mine if world.alone else _everyones(mine, world, watch)
        found: dict[str, list[Tensor]] = {}
        for _, _, name in (keys := sorted(parts)):
            found.setdefault(name, [])
        for key in keys:
            found[key[2]].append(parts[key].cpu())
        return {name: torch.cat(tensors) for name, tensors in found.items() if _same(tensors)}


Key = tuple[int, int, str]
"""Replica, micro-batch, name."""


def _everyones(mine: Mapping[Key, Tensor], world: World, watch: Watch) -> dict[Key, Tensor]:
    said: list[Any] = [None] * world.size
    with watch.waiting("the names of all outputs"):
        dist.all_gather_object(said, [(key, tuple(t.shape), t.dtype) for key, t in mine.items()])
    found: dict[Key, Tensor] = {}
    for rank, one in enumerate(said):
        for key, shape, dtype in one:
            own = rank == world.rank
            found[key] = mine[key] if own else torch.empty(shape, dtype=dtype, device=world.device)
            watch.wait(dist.broadcast(found[key], rank, async_op=True), f"the output {key[2]}", f"from rank {rank}")
    return found


def _same(tensors: Sequence[Tensor]) -> bool:
    """Whether the parts differ in their rows only."""
    return len({tensor.shape[1:] for tensor in tensors}) == 1
