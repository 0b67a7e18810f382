"""What a rank does whose sibling was run: the same calls, in the groups that it made itself."""

from __future__ import annotations

from collections.abc import Sequence

from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.dry_run.echo import Event
from merak_like.runtime.dry_run.rank import Did

Group = tuple[tuple[int, ...], int]
"""The ranks of a group, and which of the groups of these ranks it is."""


def numbered(groups: Sequence[tuple[int, ...]]) -> list[Group]:
    """The groups of a rank, in the order it made them."""
    seen: dict[tuple[int, ...], int] = {}
    found: list[Group] = []
    for ranks in groups:
        seen[ranks] = seen.get(ranks, -1) + 1
        found.append((ranks, seen[ranks]))
    return found


def share_of(mesh: Mesh, did: Did, made: Did) -> Did | None:
    """What a rank does if it does the same as one with another part of the weights, in the groups that it ``made``.

    None where these are not groups of as many ranks.
    """
    ours, theirs = numbered(did.groups), numbered(made.groups)
    if [len(ranks) for ranks, _ in ours] != [len(ranks) for ranks, _ in theirs]:
        return None
    name, tp = dict(zip(ours, theirs, strict=True)), mesh.coord(made.rank).tp
    peers = {-1: -1}
    for event in did.events:
        if event.peer not in peers:
            peers[event.peer] = mesh.rank(mesh.coord(event.peer)._replace(tp=tp))
    events = (e._replace(group=name.get(e.group, e.group), peer=peers[e.peer]) for e in did.events)
    return Did(made.rank, made.groups, tuple(events))


def same(one: Did, other: Did) -> bool:
    """Whether two records of one rank are equal, whenever they were taken."""
    return one.groups == other.groups and _since(one.events) == _since(other.events)


def _since(events: Sequence[Event]) -> list[Event]:
    first = events[0].at if events else 0
    return [e._replace(at=e.at - first, of=e.of - first if e.of >= 0 else -1) for e in events]
