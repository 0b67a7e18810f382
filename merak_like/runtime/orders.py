"""What one rank does in a step, one action after the other: the schedule of the plan with the transfers it needs.

Which stages talk to which depends on the model's inputs: a mask that is all ones may never be made, and then does not
travel. So the transfers of a step join what all its micro-batches need; every rank of a pipeline sees the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.schedules.action import USER_OF, Action, Edges, Kind, Order
from merak_like.partitioner.schedules.passes import add_transfers, forward_only
from merak_like.partitioner.schedules.validate import validate


@dataclass(frozen=True)
class Work:
    """A rank's part of a step."""

    order: Order
    waits: Mapping[Action, tuple[Action, ...]]
    """The receives that a computation waits for."""
    near: Mapping[Action, tuple[int, ...]]
    """The stages of this rank whose values (for an F) or gradients (for a B) a computation takes."""
    put_off: frozenset[tuple[int, int]]
    """(micro-batch, stage) whose B leaves the weights to a W."""
    last: frozenset[Action]
    """The last B of each stage."""


class Orders:
    """A rank's orders for a plan, each verified once."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        self._plain = schedule_of(plan)
        self._known: dict[tuple[bool, Edges], Work] = {}

    def at(self, edges: Edges, *, training: bool) -> Work:
        """What to do when values cross these edges, in training or forward only."""
        if (training, edges) not in self._known:
            self._known[training, edges] = self._make(edges, training)
        return self._known[training, edges]

    def _make(self, edges: Edges, training: bool) -> Work:
        full = add_transfers(self._plain, edges)
        validate(full, edges)
        schedule = full if training else forward_only(full)
        order = schedule.orders[self.rank]
        waits: dict[Action, tuple[Action, ...]] = {}
        near: dict[Action, tuple[int, ...]] = {}
        last: dict[int, Action] = {}
        own = {stage for stage, rank in enumerate(schedule.stage_rank) if rank == self.rank}
        givers = {
            Kind.F: {t: tuple(sorted(s for s in own if (s, t) in edges)) for t in own},
            Kind.B: {s: tuple(sorted(t for t in own if (s, t) in edges)) for s in own},
        }
        for action in order:
            if action.kind in USER_OF:
                user = Action(USER_OF[action.kind], action.micro_batch, action.stage)
                waits[user] = (*waits.get(user, ()), action)
            if action.kind in givers:
                near[action] = givers[action.kind][action.stage]
            if action.kind is Kind.B:
                last[action.stage] = action
        return Work(order, waits, near, frozenset(schedule.apart(Kind.W)), frozenset(last.values()))
