"""What one rank does in a step, one action after the other: the schedule of the plan with the transfers it needs.

Which stages talk to which depends on the model's inputs: a mask that is all ones may never be made, and then does not
travel. So the transfers of a step join what all its micro-batches need; every rank of a pipeline sees the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.schedules import builder
from merak_like.partitioner.schedules.action import Action, Edges, Kind, Order
from merak_like.partitioner.schedules.passes import add_transfers, forward_only
from merak_like.partitioner.schedules.validate import validate

USERS = {Kind.RECV_F: Kind.F, Kind.RECV_B: Kind.B}
"""Which computation waits for a receive."""


@dataclass(frozen=True)
class Work:
    """A rank's part of a step."""

    order: Order
    waits: Mapping[Action, tuple[Action, ...]]
    """The receives that a computation waits for."""
    last_backward: int
    """Index into ``order``; -1 without a backward."""


class Orders:
    """This rank's orders for a plan, each verified once."""

    def __init__(self, plan: Plan, stage: int) -> None:
        self.plan, self.stage = plan, stage
        self._plain = builder(plan.schedule)(len(plan.stages), plan.micro_batches)
        self._known: dict[tuple[bool, Edges], Work] = {}

    def at(self, edges: Edges, *, training: bool) -> Work:
        """What to do when values cross these edges, in training or forward only."""
        if (training, edges) not in self._known:
            self._known[training, edges] = self._make(edges, training)
        return self._known[training, edges]

    def _make(self, edges: Edges, training: bool) -> Work:
        full = add_transfers(self._plain, edges)
        validate(full, edges)
        order = (full if training else forward_only(full)).orders[self.stage]
        waits: dict[Action, tuple[Action, ...]] = {}
        for action in order:
            if action.kind in USERS:
                user = Action(USERS[action.kind], action.micro_batch, action.stage)
                waits[user] = (*waits.get(user, ()), action)
        last = max((i for i, action in enumerate(order) if action.kind is Kind.B), default=-1)
        return Work(order, waits, last)
