"""Ranks that share cores, as the benchmarks' processes do: between the simulator and one core's work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.planner.profiled import PIPE, shortened
from benchmarks.planner.random_rows import ROWS, rows
from benchmarks.planner.sharing import makespan
from merak_like.partitioner.schedules import data_builder
from merak_like.partitioner.schedules.action import chain
from merak_like.partitioner.simulator import Costs, StageCosts, simulate

RANKS, MICRO_BATCHES = 4, 6


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"])
def test_a_step_on_few_cores_lies_between_the_simulated_one_and_all_work_on_them(name: str):
    schedule = data_builder(name)(RANKS, MICRO_BATCHES)
    stages = tuple(StageCosts(1.0 + s / 8, 1.25, 0.0, 0.75) for s in range(schedule.stages))
    costs, edges = Costs(stages), chain(schedule.stages)
    work = MICRO_BATCHES * sum(s.forward + s.backward + s.weight for s in stages)
    simulated = simulate(schedule, costs, edges).makespan

    def shared(cores: int, alike: int = 1) -> float:
        return makespan(schedule, costs, edges, alike=alike, cores=cores)

    assert shared(1) == pytest.approx(work)
    assert max(work / 2, simulated) < shared(2) < work
    assert shared(RANKS) == pytest.approx(simulated)
    assert shared(2, alike=2) == pytest.approx(shared(1)), "two processes for each rank, at the same place"
    assert shared(8, alike=2) == pytest.approx(simulated)
    slow = replace(costs, transfer=dict.fromkeys(edges, 0.5))
    assert makespan(schedule, slow, edges, alike=1, cores=RANKS) == pytest.approx(
        simulate(schedule, slow, edges).makespan
    )


def test_a_row_is_profiled_by_few_of_its_blocks_on_one_stage():
    every = rows()
    assert len({row.name for row in every}) == ROWS
    for row in every:
        one, three, *parted = shortened(row)
        assert (one.layers, one.ranks, one.width, one.micro_batch) == (1, 1, row.width, row.micro_batch)
        assert three == replace(one, layers=3)
        assert [(p.layers, p.pp, p.tp, p.ranks) for p in parted] == [(2, 1, row.tp, row.ranks)] * (row.tp > 1)
    assert PIPE not in every
