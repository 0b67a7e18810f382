"""The critical path has no hole, and shortening what lies on it shortens the step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from merak_like.partitioner.explain.critical import Path, critical_path
from merak_like.partitioner.planned import recomputing
from merak_like.partitioner.schedules import AS_DATA
from merak_like.partitioner.schedules.action import Edges, Schedule, chain
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from tests.schedule_cases import random_edges, random_schedule


def path_of(schedule: Schedule, costs: Costs, edges: Edges) -> Path:
    return critical_path(schedule, simulate(schedule, costs, edges), costs, edges)


def check(path: Path) -> None:
    assert path.seconds() == pytest.approx(path.makespan, rel=1e-9)
    assert path.legs[0].start == pytest.approx(0.0, abs=1e-12)
    assert path.legs[-1].end == pytest.approx(path.makespan)
    for before, after in pairwise(path.legs):
        assert before.end == pytest.approx(after.start, abs=1e-9), (before, after)


def random_costs(random: Random, stages: int, edges: Edges) -> Costs:
    def some() -> float:
        return random.uniform(0.1, 2)

    each = tuple(StageCosts(some(), some(), some(), some()) for _ in range(stages))
    return Costs(each, {edge: random.choice([0.0, random.uniform(0, 3)]) for edge in edges})


@pytest.mark.parametrize("transfers", [True, False])
def test_any_schedule_has_a_path_without_holes(transfers: bool):
    random = Random(5)
    for _ in range(150):
        stages = random.randint(1, 6)
        edges = random_edges(random, stages)
        plain = random_schedule(random, edges, stages, random.randint(1, 5), random.randint(1, stages))
        schedule = add_transfers(plain, edges) if transfers else plain
        check(path_of(schedule, random_costs(random, stages, edges), edges))


@pytest.mark.parametrize("name", AS_DATA)
def test_every_named_schedule_has_a_path_without_holes(name: str):
    plain = AS_DATA[name](4, 8)
    schedule = add_transfers(recomputing(plain, {0, 1}), chain(plain.stages))
    check(path_of(schedule, random_costs(Random(1), plain.stages, chain(plain.stages)), chain(plain.stages)))


def test_seconds_on_the_path_are_what_the_step_gains():
    """Where one stage is on it for s seconds, making it a little faster saves that share of s, and others save none."""
    random = Random(2)
    for _ in range(60):
        edges = chain(4)
        schedule = add_transfers(AS_DATA["1f1b"](4, 6), edges)
        costs = random_costs(random, 4, edges)
        path, little = path_of(schedule, costs, edges), 1e-6
        for stage, seconds in enumerate(path.stage_seconds(4)):
            cost = costs.stages[stage]
            share = 1 - little
            faster = StageCosts(
                cost.forward * share, cost.backward * share, cost.recompute * share, cost.weight * share
            )  # fmt: skip
            changed = replace(costs, stages=(*costs.stages[:stage], faster, *costs.stages[stage + 1 :]))
            gained = path.makespan - simulate(schedule, changed, edges).makespan
            assert gained == pytest.approx(little * seconds, abs=2e-9)


def test_a_path_by_hand():
    # rank 0  F0 F1 . . B0 B1     the last stage is slow: its work is on the path, with the first forward, a hop
    # rank 1   . F0 B0 F1 B1      there, the hop back and the last backward
    costs = Costs((StageCosts(1, 1), StageCosts(2, 4)), {(0, 1): 0.5})
    path = path_of(add_transfers(AS_DATA["1f1b"](2, 2), chain(2)), costs, chain(2))
    assert path.makespan == 1 + 0.5 + 12 + 0.5 + 1
    assert path.stage_seconds(2) == (2, 12)
    assert path.links() == {(0, 1): 1.0}
    assert [leg.what for leg in path.legs] == [
        "forward", "transfer", "forward", "backward", "forward", "backward", "transfer", "backward"
    ]  # fmt: skip
