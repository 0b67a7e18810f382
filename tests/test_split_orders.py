"""Whatever the window, the ranks and the replicas, no order of an edge and its host waits in a circle."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from merak_like.partitioner.schedules.action import Action, Schedule, chain
from merak_like.partitioner.schedules.validate import validate
from merak_like.split.cut import Cut
from merak_like.split.order import dealt, orders, stage_rank


@pytest.mark.parametrize("cut", ["a:c", "a"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("micro_batches", "window"), [(1, 1), (4, 1), (4, 2), (6, 4), (3, 8)])
def test_every_order_ends(cut: str, ranks: int, micro_batches: int, window: int):
    """Both sides as one pipeline: where the one sends, the other receives, and no order waits in a circle."""
    place = Cut.parse(cut)
    host = stage_rank("host", place, ranks)
    tailed = place.back is not None
    # head, edge's Leaves and host's Arrives, parts, host's Leaves and edge's Arrives, tail
    joint = {("edge", 0): 0, ("edge", 1): 1, ("host", 0): 2} | {("host", 1 + r): 3 + r for r in range(ranks)}
    if tailed:
        joint |= {("host", 1 + ranks): 3 + ranks, ("edge", 2): 4 + ranks, ("edge", 3): 5 + ranks}
    rank_of = {**{joint["host", s]: 1 + r for s, r in enumerate(host)}}
    stages = tuple(rank_of.get(s, 0) for s in range(len(joint)))

    def moved(side: str, line: str) -> tuple[Action, ...]:
        return tuple(a._replace(stage=joint[side, a.stage]) for a in map(Action.parse, line.split()))

    lines = [moved("edge", orders("edge", place, micro_batches, window)[0])]
    lines += [moved("host", line) for line in orders("host", place, micro_batches, window, ranks)]
    live = validate(Schedule(len(joint), micro_batches, tuple(lines), stages), chain(len(joint)))
    assert max(live) <= min(micro_batches, window) + 2


@pytest.mark.parametrize("cut", ["a:c", "a"])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_order_of_replicas_ends(cut: str, replicas: int, ranks: int):
    """Whatever the window, nobody waits in a circle: the edge takes micro-batches in their order, and all pass one
    desk in it, while each replica does its own in the order of its pipeline."""
    for micro_batches, window in product((replicas, 2 * replicas, 4 * replicas), range(1, 9)):
        assert stuck(Cut.parse(cut), micro_batches, window, ranks, replicas) == {}, (micro_batches, window)


def stuck(cut: Cut, micro_batches: int, window: int, ranks: int, replicas: int) -> dict[str, Any]:
    """Who does not come to the end of its order, and what it waits for."""
    leaves = ranks + 1 if cut.back is not None else None
    lines: dict[str, list[tuple[Any, list[Any]]]] = {}
    """Of each process what it makes, one after the other, and what it needs for that."""

    def of_edge(a: Action) -> tuple[Any, list[Any]]:
        makes = {("F", 1): "up forward", ("B", 2): "down backward"}.get((a.kind.name, a.stage))
        needs = {("F", 2): "down forward", ("B", 1): "up backward"}.get((a.kind.name, a.stage))
        return (makes or a, a.micro_batch), [(needs, a.micro_batch)] if needs else []

    def of_host(a: Action, m: int) -> tuple[Any, list[Any]]:
        match a.kind.name, a.stage:
            case "F", 0:
                return ("taken", m), [("up forward", m), ("taken", m - 1)]
            case "F", at if at == leaves:
                return ("down forward", m), [(f"F{ranks}", m), ("down forward", m - 1)]
            case "F", at:
                return (f"F{at}", m), [(f"F{at - 1}" if at > 1 else "taken", m)]
            case "B", at if at == leaves:
                return (f"B{leaves}", m), [("down backward", m), (f"B{leaves}", m - 1)]
            case "B", 0:
                return ("up backward", m), [("B1", m), ("up backward", m - 1)]
            case _, at:
                return (f"B{at}", m), [(f"B{at + 1}" if at < ranks or leaves else f"F{at}", m)]

    lines["edge"] = [of_edge(Action.parse(w)) for w in orders("edge", cut, micro_batches, window)[0].split()]
    for replica in range(replicas):
        mine = dealt(micro_batches, replica, replicas)
        for rank, line in enumerate(orders("host", cut, micro_batches, window, ranks, replicas)):
            each = [Action.parse(word) for word in line.split()]
            lines[f"{replica}.{rank}"] = [of_host(a, mine[a.micro_batch]) for a in each]
    done, moving = {(what, -1) for what in ("taken", "down forward", "up backward", f"B{leaves}")}, True
    while moving:
        moving = False
        for line in lines.values():
            while line and done.issuperset(line[0][1]):
                done.add(line.pop(0)[0])
                moving = True
    return {who: line[0] for who, line in lines.items() if line}
