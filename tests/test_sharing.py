"""Ranks that share cores, as the benchmarks' processes do: between the simulator and one core's work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.planner.profiled import PIPE, joined, mean_step, shortened
from benchmarks.planner.random_rows import ROWS, rows
from benchmarks.planner.sharing import makespan
from merak_like.partitioner.recorded import Record, Recorded
from merak_like.partitioner.schedules import data_builder
from merak_like.partitioner.schedules.action import Action, chain
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from tests.graphs import TOY

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


def test_times_of_processes_that_take_turns_are_averaged():
    """One has its forward in one go and waits for its turn in the backward, the other the other way round."""
    forward, backward = Action.parse("F0.0"), Action.parse("B0.0")
    steps = [
        ((Record(forward, 0.0, 1.0, 0.0), Record(backward, 1.0, 5.0, 0.5)),),
        ((Record(forward, 0.5, 3.5, 0.0), Record(backward, 3.5, 5.5, 1.5)),),
        ((Record(forward, 0.0, 90.0, 0.0), Record(backward, 90.0, 99.0, 0.0)),),
    ]
    made = mean_step(Recorded("p" * 64, tuple(steps), ((5.5,), (6.5,), (100.0,))), [0, 1])
    assert made.steps == (((Record(forward, 0.25, 2.25, 0.0), Record(backward, 2.25, 5.25, 1.0)),),)
    assert made.tails == ((6.0,),)


def test_gradients_are_summed_in_groups_as_large_as_the_rows():
    """Pairs of four ranks, on two cores: each of them would have a core, and half the seconds."""
    slow, quick = [1e-3, 2e-3, 4e-3, 42e-3], [9e-3, 1e-3, 2e-3, 11e-3]
    known = {"2": {"messages": [7e-3, 1e-4, 1e-3, 2e-3], "sums": quick, "pairs": quick},
             "4": {"messages": [1e-4, 1e-4, 1e-3, 2e-3], "sums": slow, "pairs": quick}}  # fmt: skip
    for mesh, spent in (((4, 1, 1), 20e-3), ((2, 2, 1), 5e-3), ((1, 4, 1), 5e-3), ((2, 1, 1), 10e-3)):
        row = replace(PIPE, dp=mesh[0], pp=mesh[1], tp=mesh[2])
        made = joined(TOY, known, row, 2)
        many, large, small = max(*mesh, 2) if mesh[1] < 4 else 2, 2**23, 2**16
        assert made.intra.latency == 1e-4, "the first was not awake"
        found = made.all_reduce_seconds(large, many) - made.all_reduce_seconds(small, many)
        assert found == pytest.approx(spent), mesh
        assert made.step_seconds == pytest.approx(2e-3 * min(2 / row.ranks, 1))
