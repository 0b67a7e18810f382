"""What does not fit together is found by a dry run: the first replica's calls, and one thing changed in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.dry_run.echo import RECEIVE, SEND, WAIT, Event
from merak_like.runtime.dry_run.proof import prove
from merak_like.runtime.dry_run.rank import Cast, Did
from tests.skips import ROWS, WIDTH, Skips, planned, squares


@pytest.fixture(scope="module")
def honest() -> tuple[Mesh, tuple[Did, ...]]:
    plan = planned(pp=3, dp=2)
    cast = Cast(plan, Skips(), torch.ones(ROWS, WIDTH), squares)
    with cast():
        return plan.mesh, tuple(cast.act(rank) for rank in range(plan.mesh.size))


def changed(did: Did, change: Callable[[list[Event]], Any]) -> Did:
    events = list(did.events)
    change(events)
    return replace(did, events=tuple(events))


def first(events: list[Event], what: str, after: int = 0) -> int:
    return next(i for i, event in enumerate(events) if event.what == what and i >= after)


def drop(what: str) -> Callable[[list[Event]], None]:
    def change(events: list[Event]) -> None:
        at = events.pop(first(events, what)).at
        events[:] = [event for event in events if event.of != at]

    return change


def reshape(what: str) -> Callable[[list[Event]], None]:
    def change(events: list[Event]) -> None:
        at = first(events, what)
        events[at] = events[at]._replace(tensors=(((1, 2, 3), "float32"),))

    return change


def retype(events: list[Event]) -> None:
    at = first(events, SEND)
    events[at] = events[at]._replace(tensors=tuple((shape, "float16") for shape, _ in events[at].tensors))


def swap(events: list[Event]) -> None:
    """Two sends to the same peer, of a state and of a value, change places."""
    one = first(events, SEND)
    here = events[one]
    two = next(at for at, e in enumerate(events) if e[:3] == here[:3] and e.tensors != here.tensors)
    events[one], events[two] = (
        events[one]._replace(tensors=events[two].tensors), events[two]._replace(tensors=events[one].tensors)
    )  # fmt: skip


def wait_early(events: list[Event]) -> None:
    """Its first receive from a later rank is waited for before anything is sent there."""
    at = next(i for i, e in enumerate(events) if e.what == RECEIVE and e.peer > 0)
    events.insert(0, events.pop(at))
    events.insert(1, Event(WAIT, events[0].group, -1, (), 10**9, events[0].at))


SABOTAGE: dict[str, tuple[Callable[[list[Event]], None], str]] = {
    "a send is missing": (drop(SEND), r"starts \d+ sends to rank 1, which posts \d+ receives"),
    "a collective is missing": (drop("allreduce"), r"collective \d+ of .* on rank|as its call"),
    "another shape is sent": (reshape(SEND), "is sent as send .* and received as receive"),
    "another shape is summed": (reshape("allreduce"), r"allreduce \[1, 2, 3\] float32"),
    "another dtype is sent": (retype, "float16"),
    "two sends are swapped": (swap, "is sent as"),
    "a wait comes too early": (wait_early, "rank 0 waits for ever in its call 1: receive"),
}  # fmt: skip


def test_what_is_not_changed_holds(honest: tuple[Mesh, tuple[Did, ...]]):
    assert prove(*honest).problems == ()


@pytest.mark.parametrize("name", SABOTAGE)
def test_what_does_not_fit_is_found(honest: tuple[Mesh, tuple[Did, ...]], name: str):
    mesh, (did, *others) = honest
    change, told = SABOTAGE[name]
    found = prove(mesh, [changed(did, change), *others])
    assert not found.holds
    assert any(re.search(told, problem) for problem in found.problems), found.problems


def test_a_replica_that_does_something_else_is_found(honest: tuple[Mesh, tuple[Did, ...]]):
    mesh, dids = honest
    other = changed(dids[-1], drop("allreduce"))
    assert any("rank 5 does" in problem for problem in prove(mesh, [*dids[:-1], other]).problems)
    lost = replace(dids[-1], groups=dids[-1].groups[1:])
    assert any("makes other groups" in problem for problem in prove(mesh, [*dids[:-1], lost]).problems)


def test_groups_made_in_another_order_are_found(honest: tuple[Mesh, tuple[Did, ...]]):
    mesh, (did, *others) = honest
    groups = tuple(reversed(did.groups))
    assert any("different orders" in p for p in prove(mesh, [replace(did, groups=groups), *others]).problems)
    less = replace(did, groups=did.groups[:-1])
    assert any("both would wait" in p for p in prove(mesh, [less, *others]).problems)
    assert any("were not run" in p for p in prove(mesh, others).problems)
