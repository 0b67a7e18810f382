"""A compiled schedule says what the simulator says, to the last bit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.compiled import Compiled
from merak_like.partitioner.planned import named_schedule, recomputing
from merak_like.partitioner.schedules import AS_DATA
from merak_like.partitioner.schedules.action import Action, Kind, Schedule, chain
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.simulator import Costs, StageCosts, Totals, simulate

seconds = st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.7])


@st.composite
def costs_of(draw: st.DrawFn, stages: int) -> Costs:
    made: list[StageCosts] = []
    for _ in range(stages):
        full, waits = draw(st.integers(0, 50)), draw(st.integers(0, 50))
        forward, backward, again, weight = (draw(seconds) for _ in range(4))
        made.append(StageCosts(forward, backward, again, weight, full, draw(st.integers(0, full)), waits))
    hops = {(s, t): draw(seconds) for s in range(stages) for t in range(s + 1, stages)}
    return Costs(tuple(made), hops)


@settings(max_examples=60)
@given(st.sampled_from(sorted(AS_DATA)), st.integers(1, 4), st.integers(1, 9), st.data())
def test_a_compiled_schedule_is_timed_as_it_is_simulated(
    name: str, ranks: int, micro_batches: int, data: st.DataObject
):
    chunks = 2 if name == "interleaved" else 1
    if name == "interleaved":
        micro_batches = ranks * max(micro_batches // ranks, 1)
    schedule = named_schedule(name, ranks, micro_batches, chunks)
    stages = schedule.stages
    schedule = recomputing(schedule, data.draw(st.sets(st.integers(0, stages - 1))))
    further = [(s, t) for s in range(stages) for t in range(s + 2, stages)]
    edges = chain(stages) | (data.draw(st.frozensets(st.sampled_from(further))) if further else frozenset())
    costs = data.draw(costs_of(stages))
    whole = simulate(add_transfers(schedule, edges), costs, edges)
    found = Compiled(schedule, edges)(costs, schedule.recomputes)
    for name in Totals.__dataclass_fields__:
        assert getattr(found, name) == getattr(whole, name), name


def test_a_circle_is_told_as_the_simulator_tells_it():
    f, b = Kind.F, Kind.B
    orders = ((Action(b, 0, 0), Action(f, 0, 0)), (Action(f, 0, 1), Action(b, 0, 1)))
    costs = Costs((StageCosts(1.0, 1.0),) * 2)
    with pytest.raises(ValueError, match=r"B0\.0"):
        Compiled(Schedule(2, 1, orders, (0, 1)), chain(2))(costs, ())
