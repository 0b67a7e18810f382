"""Which of a batch's values a rank loads: those that its stages read. Of the rest it is told the shapes.

One rank of a replica, the first whose stages read anything, loads all, and tells the others what micro-batches count:

    stage 0   input_ids           loads input_ids and labels, tells
    stage 1                       loads nothing
    stage 2             labels    loads labels, where samples can be taken apart
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merak_like.partitioner.mesh import Coord
from merak_like.partitioner.tracer.example import leaves
from merak_like.runtime.batches import Outline
from merak_like.runtime.engine import Engine
from merak_like.runtime.outline import hear, outline, read, tell
from merak_like.trainer.data.collate import Collate, stack

PLAIN = (Tensor, bool, int, float, str, type(None))
"""Leaves of a batch that are the same wherever they are sent."""


@dataclass(frozen=True)
class Reading:
    """What this rank loads, and whom it tells or hears."""

    names: frozenset[str] | None = None
    """The values of a batch that it loads; None: all."""
    teller: int = 0
    hearers: tuple[int, ...] = ()
    """Ranks that this one tells."""

    def complete(
        self, engine: Engine, batch: Any, times: int = 1, *, batch_is_global: bool = True
    ) -> tuple[Any, int]:  # fmt: skip
        """A batch as ``engine.step`` takes it here, from what this rank loaded, and how often each row is in it."""
        if self.hearers:
            said = outline(engine, batch, times, batch_is_global=batch_is_global)
            tell(engine, said, self.hearers)
            return said, times
        if self.names is None:
            return batch, times
        said = hear(engine, self.teller)
        whole = {**said.batch, **batch} if self.names else said.batch
        return Outline(whole, said.items), said.times


EVERYTHING = Reading()


def reading(engine: Engine, example: Any, collate: Collate) -> Reading:
    """What this rank loads of batches like the example."""
    mesh, own, found = engine.plan.mesh, engine.groups.coord, leaves(example)
    if mesh.pp == 1 or not all(isinstance(leaf, PLAIN) for leaf in found.values()):
        return EVERYTHING
    paths = read(engine)
    apart = collate is stack and isinstance(example, Mapping)
    every = {path for path, leaf in found.items() if isinstance(leaf, Tensor)}

    def loads(pp: int) -> frozenset[str] | None:
        whole = paths[pp] >= every or (paths[pp] and not apart)
        return None if whole else frozenset(path[0] for path in paths[pp])

    first = next(pp for pp, some in enumerate(paths) if some)
    ranks = {
        mesh.rank(Coord(own.dp, pp, tp)): loads(pp)
        for pp in range(mesh.pp)
        for tp in range(mesh.tp)
        if (pp, tp) != (first, 0)
    }
    hearers = tuple(rank for rank, names in ranks.items() if names is not None)
    teller = mesh.rank(Coord(own.dp, first, 0))
    if engine.world.rank == teller:
        return Reading(None, teller, hearers)
    return Reading(ranks[engine.world.rank], teller)


def alike(reading: Reading, collate: Collate, other: Collate) -> Reading:
    """What a rank loads of other data: the same if the same function collates them, else all."""
    return reading if getattr(collate, "__func__", collate) is getattr(other, "__func__", other) else EVERYTHING
