"""A process group that moves nothing and writes down what it is asked for.

It is a backend of torch.distributed, so what is heard is what the engine really calls, down to the shape and dtype of
every tensor. Every wait is over at once; collectives answer as if the other ranks said what this one says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from merak_like._compat import fake_store

BACKEND = "echo"
SEND, RECEIVE, WAIT = "send", "receive", "wait"
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "reduce", "broadcast", "allgather", "allgather_coalesced", "_allgather_base",
    "allgather_into_tensor_coalesced", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "barrier",
)  # fmt: skip
_CLOCK = count()


class Event(NamedTuple):
    """One thing that a rank did."""

    what: str
    """``send``, ``receive``, ``wait``, or the collective."""
    group: tuple[tuple[int, ...], int]
    """The ranks of the group, and which of the groups of these ranks it is."""
    peer: int
    """Global rank at the other end of a transfer; -1 otherwise."""
    tensors: tuple[tuple[tuple[int, ...], str], ...]
    """Shapes and dtypes."""
    at: int
    """Its number on this rank; a wait has that of what it waits for in ``of``."""
    of: int = -1


class Work:
    """What a call gives back: done at once, and its wait is heard."""

    def __init__(self, group: Echo, at: int) -> None:
        self._group, self._at = group, at

    def wait(self, timeout: Any = None) -> bool:
        """Note the wait."""
        self._group.note(WAIT, (), of=self._at)
        return True

    def is_completed(self) -> bool:
        """Never before it is waited for: then nothing is forgotten early."""
        return False


class Echo(dist.ProcessGroup):
    """One group of one rank."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self.events: list[tuple[str, int, tuple[Any, ...], int, int]] = []
        self.over = False
        """Whether its job has ended: a call now would be one of another rank."""

    def getBackendName(self) -> str:
        """For torch.distributed."""
        return BACKEND

    def note(self, what: str, tensors: Sequence[torch.Tensor], peer: int = -1, of: int = -1) -> Work:
        """Write one call down."""
        assert not self.over, f"{what} in a group of a rank whose step is over"
        at = next(_CLOCK)
        seen = tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors)
        self.events.append((what, peer, seen, at, of))
        return Work(self, at)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Work:  # pyright: ignore
        """To a rank of the group."""
        return self.note(SEND, tensors, peer)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> Work:  # pyright: ignore
        """From a rank of the group."""
        return self.note(RECEIVE, tensors, peer)

    def heard(self, ordinal: int) -> list[Event]:
        """The events, with ranks of the job."""
        ranks = tuple(dist.get_process_group_ranks(self))
        return [
            Event(what, (ranks, ordinal), ranks[peer] if peer >= 0 else -1, seen, at, of)
            for what, peer, seen, at, of in self.events
        ]


Call = tuple[Echo, tuple[str, int, tuple[Any, ...], int, int]]
"""A group, and one event in it."""


def calls_of(groups: Sequence[Echo], work: Callable[[], Any]) -> tuple[Any, tuple[Call, ...]]:
    """What some work gives, and the calls that it made in these groups."""
    before = [len(group.events) for group in groups]
    given = work()
    made = [(group, event) for group, at in zip(groups, before, strict=True) for event in group.events[at:]]
    return given, tuple(sorted(made, key=lambda call: call[1][3]))


def call_again(calls: Sequence[Call]) -> None:
    """Note the same calls once more, now."""
    number: dict[int, int] = {}
    for group, (what, peer, seen, at, of) in calls:
        number[at] = next(_CLOCK)
        group.events.append((what, peer, seen, number[at], number.get(of, of)))


def _collective(name: str) -> Callable[..., Work]:
    def called(self: Echo, *args: Any, **_: Any) -> Work:
        lists = [a for a in args if isinstance(a, (list, tuple))]
        tensors = [t for t in (*args, *(x for a in lists for x in a)) if isinstance(t, torch.Tensor)]
        return self.note(name, tensors)

    called.__name__ = name
    return called


for _name in COLLECTIVES:
    setattr(Echo, _name, _collective(_name))


def join(rank: int, size: int) -> None:
    """Be one rank of a job of that size. ``dist.destroy_process_group()`` ends it."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, lambda store, rank, size, timeout: Echo(rank, size), devices=["cpu"])
    dist.init_process_group(BACKEND, store=fake_store(), rank=rank, world_size=size)


def heard(groups: Sequence[Any]) -> tuple[Event, ...]:
    """What this rank did in the job and in these groups, which it made in this order."""
    found: list[Event] = list(dist.group.WORLD.heard(-1)) if isinstance(dist.group.WORLD, Echo) else []
    seen: dict[tuple[int, ...], int] = {}
    for group in groups:
        ranks = tuple(dist.get_process_group_ranks(group))
        ordinal = seen[ranks] = seen.get(ranks, -1) + 1
        found += group.heard(ordinal)
        group.over = True
    return tuple(sorted(found, key=lambda event: event.at))
