"""A cloud half on several ranks: the numbers of one rank, whatever breaks on the way to the edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from merak_like.partitioner.schedules.action import Action, Schedule, chain
from merak_like.partitioner.schedules.validate import validate
from merak_like.split.cut import Cut
from merak_like.split.order import orders, stage_rank
from merak_like.split.wire import Kind
from tests.ranks import Call, results_of, selected_calls
from tests.split_pair import CUTS

KINDS = (Kind.BEGIN, Kind.UP_FORWARD, Kind.DOWN_FORWARD, Kind.DOWN_BACKWARD, Kind.UP_BACKWARD, Kind.DONE)


def differences(name: str, cut: str, steps: int, ranks: int = 2, **more: Any) -> Call:
    facts = {"name": name, "cut": cut, "steps": steps, "dp": 1, "pp": ranks, **more}
    return Call("-".join(map(str, facts.values())), "tests.split_crew:differences", facts)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    return results_of(selected_calls(request))


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        differences("calm", CUTS["calm"], 3),
        pytest.param(differences("bert", "bert.encoder.layer.0@6:bert.pooler.dense", 3), marks=pytest.mark.slow),
        pytest.param(differences("bert", "bert.encoder.layer.0", 3), marks=pytest.mark.slow),
        pytest.param(differences("gpt2", CUTS["gpt2"], 3, window=1), marks=pytest.mark.slow),
        pytest.param(differences("bert", CUTS["bert"], 50), marks=pytest.mark.slow),
        pytest.param(
            differences("calm", CUTS["calm"], 10, optimizer={"lr": 0.01}, max_grad_norm=0.1), marks=pytest.mark.slow
        ),
    ],
    ids=lambda call: call.name,
)
def test_two_ranks_compute_what_one_does(call: Call, results: Callable[[Call], list[Any]]):
    found, other = results(call)
    assert other is None
    bar = 1e-5 if call.arguments["name"] == "gpt2" else 1e-9
    assert found["losses"] < bar
    assert found["weights"] < bar
    assert found["moved"] > 1e-4


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call", [Call("cut off", "tests.split_crew:cut_off", {"dp": 1, "pp": 2, "kinds": [int(k) for k in KINDS]})]
)
def test_a_connection_cut_at_any_frame_changes_nothing(call: Call, results: Callable[[Call], list[Any]]):
    assert results(call)[0] == {kind.name: True for kind in KINDS}


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
