"""Whether what the ranks of a dry run did fits together: each send with its receive, all collectives, and no hang.

What is asked of the calls that were heard, not of the schedule they came from:

groups       every member makes each group, and any two ranks make those they share in one order
transfers    on each channel (sender, receiver, group) sends and receives have the same shapes and dtypes, in order
collectives  the members of a group call the same ones, on the same shapes and dtypes, in order
progress     played back, with a send done only once its receive is posted, every wait of every rank ends
replicas     a rank of another replica did the same, with the ranks of its own replica
shares       so did the last rank of each tensor-parallel group, with the ranks that have its own part of the weights
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from math import prod
from typing import Any

from merak_like.partitioner.graph import ITEMSIZE
from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.dry_run.alike import Group, numbered
from merak_like.runtime.dry_run.echo import RECEIVE, SEND, WAIT, Event
from merak_like.runtime.dry_run.rank import Did


@dataclass(frozen=True)
class Proof:
    """What was proved, or what is wrong."""

    world: int
    acted: tuple[int, ...]
    """Ranks whose step was run."""
    grouped: int
    """Further ranks whose groups were made."""
    alike: int
    """Ranks that differ from one that was run in nothing but their replica and their part of the weights."""
    groups: int
    channels: int
    transfers: int
    """Of the ranks that were run."""
    nbytes: int
    """In these transfers."""
    collectives: int
    """That these ranks take part in."""
    waits: int
    """That end."""
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"holds": self.holds, **asdict(self)}


def prove(mesh: Mesh, acted: Sequence[Did], grouped: Sequence[Did] = (), alike: Sequence[Did] = ()) -> Proof:
    """Check the ranks of the first replica, all of them run or ``alike``, against each other, and others against these.

    ``alike`` are ranks that made their groups, with what they do as ``share_of`` has it.
    """
    own = {did.rank: did for did in (*acted, *alike) if mesh.coord(did.rank).dp == 0}
    others = [did for did in acted if did.rank not in own]
    ordered = list(own.values())
    channels = _channels(ordered)
    problems = [
        *_missing(mesh, own),
        *_groups(mesh, own, [*others, *grouped]),
        *_transfers(channels),
        *_collectives(mesh, ordered),
        *_replicas(mesh, own, others),
    ]
    waits, stuck = _play(ordered)
    sends = [event for sent, _ in channels.values() for event in sent]
    collectives = sum(e.what not in (SEND, RECEIVE, WAIT) for did in ordered for e in did.events)
    return Proof(
        world=mesh.size,
        acted=tuple(did.rank for did in acted),
        grouped=len(grouped) + len(alike),
        alike=mesh.size - len(acted),
        groups=len({group for did in ordered for group in numbered(did.groups)}),
        channels=len(channels),
        transfers=len(sends),
        nbytes=sum(prod(shape) * ITEMSIZE[dtype] for event in sends for shape, dtype in event.tensors),
        collectives=collectives,
        waits=waits,
        problems=(*problems, *stuck),
    )


def moved(mesh: Mesh, rank: int, dp: int) -> int:
    """The rank at the same place of another replica, which is ``dp`` further on."""
    coord = mesh.coord(rank)
    return mesh.rank(coord._replace(dp=(coord.dp + dp) % mesh.dp))


def _missing(mesh: Mesh, own: Mapping[int, Did]) -> Iterator[str]:
    lost = [rank for rank in range(mesh.size) if mesh.coord(rank).dp == 0 and rank not in own]
    if lost:
        yield f"ranks {lost} of the first replica were not run"


def _moved_group(mesh: Mesh, ranks: tuple[int, ...], dp: int) -> tuple[int, ...]:
    return tuple(sorted(moved(mesh, rank, dp) for rank in ranks))


def _groups(mesh: Mesh, own: Mapping[int, Did], others: Sequence[Did]) -> Iterator[str]:
    made = {rank: numbered(did.groups) for rank, did in own.items()}
    for rank, groups in made.items():
        for ranks, number in groups:
            if rank not in ranks:
                yield f"rank {rank} made the group of {_few(ranks)}, which it is not in"
            for other in ranks:
                if other in made and (ranks, number) not in made[other]:
                    yield f"rank {rank} made group {number} of {_few(ranks)}, rank {other} did not: both would wait"
    ranks = sorted(made)
    for at, one in enumerate(ranks):
        mine = set(made[one])
        for other in ranks[at + 1 :]:
            theirs = set(made[other])
            if [g for g in made[one] if g in theirs] != [g for g in made[other] if g in mine]:
                yield f"ranks {one} and {other} make the groups they share in different orders"
    for did in others:
        dp = mesh.coord(did.rank).dp
        like = own.get(moved(mesh, did.rank, -dp))
        if like is not None and tuple(_moved_group(mesh, g, dp) for g in like.groups) != did.groups:
            yield f"rank {did.rank} makes other groups than rank {like.rank} of the first replica"


def _channels(acted: Sequence[Did]) -> dict[tuple[int, int, Group], tuple[list[Event], list[Event]]]:
    found: dict[tuple[int, int, Group], tuple[list[Event], list[Event]]] = defaultdict(lambda: ([], []))
    for did in acted:
        for event in did.events:
            if event.what == SEND:
                found[did.rank, event.peer, event.group][0].append(event)
            elif event.what == RECEIVE:
                found[event.peer, did.rank, event.group][1].append(event)
    return found


def _transfers(channels: Mapping[tuple[int, int, Group], tuple[list[Event], list[Event]]]) -> Iterator[str]:
    for (sender, receiver, _), (sent, received) in channels.items():
        if len(sent) != len(received):
            yield (
                f"rank {sender} starts {len(sent)} sends to rank {receiver}, which posts {len(received)} receives from "
                "it in that group"
            )
        for number, (one, other) in enumerate(zip(sent, received, strict=False)):
            if one.tensors != other.tensors:
                yield (
                    f"transfer {number} from rank {sender} to rank {receiver} is sent as {_told(one)} and received as "
                    f"{_told(other)}"
                )
                break


def _collectives(mesh: Mesh, acted: Sequence[Did]) -> Iterator[str]:
    by_group: dict[Group, dict[int, list[Event]]] = defaultdict(dict)
    for did in acted:
        for event in did.events:
            if event.what not in (SEND, RECEIVE, WAIT):
                by_group[event.group].setdefault(did.rank, []).append(event)
    ranks_run = {did.rank for did in acted}
    for (ranks, number), calls in by_group.items():
        strangers = set(calls) - set(ranks)
        if strangers:
            yield f"ranks {sorted(strangers)} call a group that they are not in: {_few(ranks)}"
        for dp in range(mesh.dp):
            if _moved_group(mesh, ranks, dp) != tuple(sorted(ranks)) and ranks_run.isdisjoint(ranks):
                yield f"group {number} of {_few(ranks)} is not the same for every replica"
        members = [rank for rank in ranks if rank in ranks_run]
        first = calls.get(members[0], [])
        for other in members[1:]:
            for at, (a, b) in enumerate(zip_longest(first, calls.get(other, []))):
                if a is None or b is None or (a.what, a.tensors) != (b.what, b.tensors):
                    yield (
                        f"collective {at} of {_few(ranks)} is {_told(a)} on rank {members[0]} and {_told(b)} on rank "
                        f"{other}"
                    )
                    break


def _replicas(mesh: Mesh, own: Mapping[int, Did], others: Sequence[Did]) -> Iterator[str]:
    for did in others:
        dp = mesh.coord(did.rank).dp
        like = own.get(moved(mesh, did.rank, -dp))
        if like is None:
            continue
        base = (like.events[0].at if like.events else 0, did.events[0].at if did.events else 0)
        for at, (a, b) in enumerate(zip_longest(like.events, did.events)):
            if a is None or b is None or _moved_event(mesh, a, dp, base[0]) != _moved_event(mesh, b, 0, base[1]):
                first = f"rank {like.rank} of the first replica {_told(a)}"
                yield f"rank {did.rank} does {_told(b)} as its call {at}, {first}"
                break


def _moved_event(mesh: Mesh, event: Event, dp: int, base: int) -> Event:
    ranks, number = event.group
    return event._replace(
        group=(_moved_group(mesh, ranks, dp), number),
        peer=moved(mesh, event.peer, dp) if event.peer >= 0 else -1,
        at=event.at - base,
        of=event.of - base if event.of >= 0 else -1,
    )


def _play(acted: Sequence[Did]) -> tuple[int, list[str]]:
    """Let every rank go as far as it can, again and again; how many waits ended, and who is stuck in what."""
    progress = _Progress(acted)
    while sum(progress.advance(did) for did in acted):  # all of them, not only until one has moved
        pass
    stuck = [
        f"rank {did.rank} waits for ever in its call {at}: {_told(progress.call(did, did.events[at].of))}"
        for did in acted
        if (at := progress.at[did.rank]) < len(did.events)
    ]
    return progress.waits, stuck


class _Progress:
    """How far each rank is, and how much has been started on each channel and group."""

    def __init__(self, acted: Sequence[Did]) -> None:
        self.at = {did.rank: 0 for did in acted}
        self.waits = 0
        self.run = frozenset(self.at)
        self.started: dict[tuple[Any, ...], int] = defaultdict(int)
        """Starts so far: of one side of a channel, or of one rank in a group."""
        self.place: dict[tuple[int, int], tuple[Event, int]] = {}
        """(rank, number of an event) to the event, and how many like it were started before it."""

    def advance(self, did: Did) -> bool:
        """Whether the rank could do anything."""
        begin = self.at[did.rank]
        for event in did.events[begin:]:
            if event.what == WAIT:
                if not self._over(did.rank, event.of):
                    break
                self.waits += 1
            else:
                key = self._key(did.rank, event)
                self.place[did.rank, event.at] = event, self.started[key]
                self.started[key] += 1
            self.at[did.rank] += 1
        return self.at[did.rank] > begin

    def call(self, did: Did, number: int) -> Event | None:
        """What a wait is for."""
        return next((event for event in did.events if event.at == number), None)

    @staticmethod
    def _key(rank: int, event: Event) -> tuple[Any, ...]:
        if event.what == SEND:
            return SEND, rank, event.peer, event.group
        if event.what == RECEIVE:
            return RECEIVE, event.peer, rank, event.group
        return "collective", rank, event.group

    def _over(self, rank: int, number: int) -> bool:
        """Whether what is waited for is through: the other side has started its part of it."""
        event, turn = self.place[rank, number]
        if event.what == SEND:
            return self.started[RECEIVE, rank, event.peer, event.group] > turn
        if event.what == RECEIVE:
            return self.started[SEND, event.peer, rank, event.group] > turn
        members = self.run.intersection(event.group[0])
        return all(self.started["collective", member, event.group] > turn for member in members)


def _told(event: Event | None) -> str:
    if event is None:
        return "nothing"
    what = f"{event.what} {' '.join(f'{list(shape)} {dtype}' for shape, dtype in event.tensors)}".strip()
    return f"{what} with rank {event.peer}" if event.peer >= 0 else what


def _few(ranks: Sequence[int]) -> str:
    return f"ranks {', '.join(map(str, ranks[:4]))}" + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
