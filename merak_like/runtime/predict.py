"""What a model gives besides its loss, brought from the stages that make it to every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.mesh import Coord
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.partitioner.tensor_parallel.layout import Layout
from merak_like.runtime.batches import rows
from merak_like.runtime.initialize import World
from merak_like.runtime.optimizer import StepResult
from merak_like.runtime.tensor_parallel.shards import Shards
from merak_like.runtime.watch import Watch

if TYPE_CHECKING:
    from merak_like.runtime.engine import Engine

LOSS = "loss"


def predict(engine: Engine, batch: Any) -> tuple[StepResult, dict[str, Tensor]]:
    """``engine.evaluate`` on a global batch, and what the model gives besides the loss, by name, on every rank.

    Tensors with a row for each sample come whole, on the CPU, in the batch's order, put together from the parts of
    tensor-parallel ranks; others are left out.
    """
    kept = Kept()
    with engine.doing(lambda do: {**do, Kind.F: kept.around(do[Kind.F])}):
        result = engine.evaluate(batch)
    sizes = [rows(part) for part in engine._batches]
    mine = kept.parts(engine.groups.coord, sizes, [program.parts for program in engine._running])
    parts = mine if engine.world.alone else _everyones(mine, engine.world, engine._watch)
    return result, in_order(parts, engine.plan.mesh.tp)


class Key(NamedTuple):
    """Which output of which micro-batch."""

    replica: int
    micro_batch: int
    name: str


class Part(NamedTuple):
    """What a tensor-parallel rank has of an output."""

    tp: int
    rows: int
    """Of the micro-batch."""
    layout: Layout | None
    """How the whole lies on all of them; None: it has all."""
    tensor: Tensor


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

    def parts(
        self, coord: Coord, sizes: Sequence[int], layouts: Sequence[Mapping[str, Layout]]
    ) -> dict[Key, list[Part]]:  # fmt: skip
        """What others need of them. What all tensor-parallel ranks have, the first one gives.

        ``sizes`` are the rows of each micro-batch, ``layouts`` how its outputs lie.
        """
        found: dict[Key, list[Part]] = {}
        for (at, name), tensor in self.outputs.items():
            layout = layouts[at].get(name)
            if layout is not None or coord.tp == 0:
                own = Part(coord.tp, sizes[at], layout, tensor.detach().contiguous())
                found[Key(coord.dp, at, name)] = [own]
        return found


def in_order(parts: Mapping[Key, Sequence[Part]], tp: int) -> dict[str, Tensor]:
    """Every output whole, micro-batch behind micro-batch; those without a row for each sample are left out."""
    found: dict[str, list[Tensor]] = {}
    for key in sorted(parts):
        some = sorted(parts[key], key=lambda part: part.tp)
        tensors, layout = [part.tensor.cpu() for part in some], some[0].layout
        whole = tensors[0] if layout is None else Shards({key.name: layout}, 0, tp).assemble(key.name, tensors)
        if whole.dim() and whole.shape[0] == some[0].rows:
            found.setdefault(key.name, []).append(whole)
    return {name: torch.cat(tensors) for name, tensors in found.items() if _same(tensors)}


def _everyones(mine: Mapping[Key, Sequence[Part]], world: World, watch: Watch) -> dict[Key, list[Part]]:
    own = {(key, part.tp): part for key, parts in mine.items() for part in parts}
    told = [(k, p._replace(tensor=None), tuple(p.tensor.shape), p.tensor.dtype) for (k, _), p in own.items()]  # pyright: ignore[reportArgumentType]
    said: list[Any] = [None] * world.size
    with watch.waiting("the names of all outputs"):
        dist.all_gather_object(said, told)
    found: dict[Key, list[Part]] = {}
    for rank, one in enumerate(said):
        for key, part, shape, dtype in one:
            here = rank == world.rank
            tensor = own[key, part.tp].tensor if here else torch.empty(shape, dtype=dtype, device=world.device)
            watch.wait(dist.broadcast(tensor, rank, async_op=True), f"the output {key.name}", f"from rank {rank}")
            found.setdefault(key, []).append(part._replace(tensor=tensor))
    return found


def _same(tensors: Sequence[Tensor]) -> bool:
    """Whether the parts differ in their rows only."""
    return len({tensor.shape[1:] for tensor in tensors}) == 1
