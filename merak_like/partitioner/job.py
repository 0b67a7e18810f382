"""How a step is run, whatever the partition: what the search for one is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from merak_like.partitioner.coding import Coding, coded
from merak_like.partitioner.hardware import Hardware, Link
from merak_like.partitioner.held import Held, held
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.orders import Orders
from merak_like.partitioner.placement import hop
from merak_like.partitioner.planned import named_schedule
from merak_like.partitioner.schedules import AUTO, AUTO_V
from merak_like.partitioner.schedules.action import Edges, Schedule, chain
from merak_like.partitioner.schedules.scp import LADDER

STAND_IN = {AUTO: ("1f1b", "zb-h1"), AUTO_V: ("zb-v",)}
"""What the stages are cut for where the order is built for the stages: for each, and the first where one must do."""
RECOMPUTE = ("auto", "none", "full", "blocks")
"""As little as the memory asks for; nothing; all that the schedule lets be recomputed; the same, a block at a time."""


@dataclass(frozen=True)
class Job:
    """How a step is run, whatever the partition."""

    mesh: Mesh
    hardware: Hardware
    schedule: str
    micro_batches: int
    memory_limit: int
    chunks: int = 1
    """Stages per rank of an interleaved schedule."""
    recompute: str = "auto"
    coding: Coding | None = None
    """What values between ranks go through."""

    @cached_property
    def order(self) -> Schedule:
        """The compute-only schedule that partitions are judged by."""
        name, *_ = STAND_IN.get(self.schedule, (self.schedule,))
        return named_schedule(name, self.mesh.pp, self.micro_batches, self.chunks)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.order.stages

    @cached_property
    def live(self) -> tuple[int, ...]:
        """Micro-batches alive at once, of each stage."""
        return self.orders.columns.live

    @cached_property
    def held(self) -> tuple[Held, ...]:
        """What each rank holds."""
        return held(self.order, self.orders.columns)

    @cached_property
    def orders(self) -> Orders:
        """The order with transfers, for who judges partitions."""
        return Orders(self.order)

    @cached_property
    def chain(self) -> Edges:
        """Neighbours: each waits for the one before, whatever it receives."""
        return chain(self.stages)

    @cached_property
    def recomputes(self) -> frozenset[int]:
        """The stages that may recompute, or must where everything is recomputed."""
        if self.recompute == "none":
            return frozenset()
        if self.recompute in ("full", "blocks") and self.schedule in LADDER:
            return self.order.recomputes
        return frozenset(range(self.stages))

    def link(self, source: int, target: int) -> Link | None:
        """The slowest link between two stages over all replicas; none on the same rank."""
        return self._link(self.order.stage_rank[source], self.order.stage_rank[target])

    @cached_property
    def _link(self) -> Callable[[int, int], Link | None]:
        return cache(self._slowest)

    def _slowest(self, *ends: int) -> Link | None:
        if ends[0] == ends[1]:
            return None
        return coded(hop(self.mesh, self.hardware, *ends), self.coding, self.hardware)

    @cached_property
    def links(self) -> tuple[Link | None, ...]:
        """``links[s]``: between stage s and the next."""
        return tuple(self.link(stage, stage + 1) for stage in range(self.stages - 1))
