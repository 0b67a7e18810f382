"""Whom a group takes: what a client's task must say to be in it."""

from __future__ import annotations

from merak_like.split.group import Group
from merak_like.split.messages import Task
from merak_like.split.session import Refused


def require_fitting(task: Task, owner: str, group: Group) -> None:
    """Raises Refused for a task that does not go with the group's own words."""
    name, text = group.name, group.text
    if task.checkpoint_every != text.checkpoint_every:
        raise Refused(
            f"group {name} keeps a checkpoint every {text.checkpoint_every} rounds, edges with it: say "
            f"checkpoint_every: {text.checkpoint_every}, not {task.checkpoint_every}"
        )
    if bool(text.average) != task.average_edges:
        raise Refused(
            f"group {name} averages the edges' own layers, an edge must agree: say average_edges: true"
            if text.average
            else f"group {name} does not average the edges' own layers: leave average_edges away"
        )
    if (text.mode == "chosen") != (task.local is not None):
        raise Refused(
            f"group {name} chooses whom it hears and sends no gradients, so its edges learn at home: say local:"
            if text.mode == "chosen"
            else f"group {name} is {text.mode}, and an edge that learns at home needs one whose mode is chosen"
        )
    if not text.phi:
        return
    if task.frozen_edge:
        raise Refused(f"the clients of group {name} share gradients at the cut (phi): leave frozen_edge away")
    others = [session.task for session in group.live.values() if session.owner != owner]
    alike = ["micro_batches"] if group.commons.crew.world.alone else ["micro_batches", "window"]
    for key in alike:
        if odd := {getattr(other, key) for other in others} - {getattr(task, key)}:
            raise Refused(
                f"the clients of group {name} share gradients at the cut (phi), micro-batch by micro-batch: say "
                f"{key}: {odd.pop()}, not {getattr(task, key)}"
            )
