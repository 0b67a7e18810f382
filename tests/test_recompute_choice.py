"""What is computed again is the least that fits, and what a rank holds is what the simulator says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.held import held
from merak_like.partitioner.job import STAND_IN
from merak_like.partitioner.judge import Judge
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.ordering import in_order
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import costs_of, edges_of, named_schedule, recomputing, schedule_of
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.recompute import COMBINED, Front, Live, choose, front, peak
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V
from merak_like.partitioner.schedules.action import Kind
from merak_like.partitioner.schedules.action import chain as neighbours
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.scp import LADDER
from merak_like.partitioner.search import Found
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from tests.graphs import TOY, GraphBuilder, chain, encoder_decoder, gpt
from tests.test_planner import problem_of

SEEDS = st.integers(0, 2**32 - 1)


def kept(again: Sequence[bool], saved: Sequence[int], near: Sequence[int], far: int, batch: int) -> int:
    """Bytes that a live micro-batch keeps, said directly."""
    if all(again):
        return min(batch, sum(saved))
    enters = [n for i, n in enumerate(near) if again[i] and i and not again[i - 1]]
    return sum(s for s, r in zip(saved, again, strict=True) if not r) + sum(enters) + far * any(again)


@settings(max_examples=100)
@given(SEEDS, st.integers(1, 9), st.booleans(), st.integers(0, 1000))
def test_the_fewest_seconds_for_every_number_of_bytes_equal_brute_force(
    seed: int, units: int, alike: bool, room: int
) -> None:
    random = Random(seed)
    kinds = [
        (random.randint(1, 9), random.randint(0, 100), random.randint(0, 30)) for _ in range(2 if alike else units)
    ]
    rows = [random.choice(kinds) for _ in range(units)]
    seconds, saved, near = [row[0] / 8 for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    near[0], batch = 0, random.randint(0, 20)
    far = batch + random.choice([0, 15])
    found = front(seconds, saved, near, far, batch)
    assert (np.diff(found.kept) > 0).all()
    assert (np.diff(found.seconds) < 0).all()
    for nbytes, spent, chosen in zip(found.kept.tolist(), found.seconds.tolist(), found.units, strict=True):
        again = [unit in chosen for unit in range(units)]
        assert nbytes == kept(again, saved, near, far, batch)
        assert spent == pytest.approx(sum(s for s, r in zip(seconds, again, strict=True) if r))
    ways = [
        sum(s for s, r in zip(seconds, again, strict=True) if r)
        for again in product((False, True), repeat=units)
        if kept(again, saved, near, far, batch) <= room
    ]
    best = min(found.seconds[found.kept <= room].tolist(), default=float("inf"))
    assert best == pytest.approx(min(ways, default=float("inf")))


def test_a_hundred_equal_blocks_are_no_burden() -> None:
    found = front([2.0, 3.0, 1.0] * 100, [7, 12, 5] * 100, [2, 3, 2] * 100, 0, 0)
    half = int(np.searchsorted(found.kept, 1200))
    assert found.seconds[half] < 310, "the units that free most bytes for a second come first"


def random_costs(random: Random, stages: int) -> Costs:
    full = [random.randint(50, 100) for _ in range(stages)]
    return Costs(
        tuple(
            StageCosts(
                1, 1, 1, 1, each, random.randint(0, each), random.choice([0, each, random.randint(0, each), 2 * each])
            )
            for each in full
        )
    )


@settings(max_examples=100)
@given(SEEDS, st.sampled_from(sorted(AS_DATA)), st.integers(1, 4), st.integers(1, 9), st.sampled_from(["all", "some"]))
def test_what_a_rank_holds_is_what_the_simulator_says(
    seed: int, name: str, ranks: int, micro_batches: int, recomputing_: str
) -> None:
    random = Random(seed)
    schedule = named_schedule(name, ranks, micro_batches, 2)
    again = [s for s in range(schedule.stages) if recomputing_ == "all" or random.random() < 0.5]
    costs = random_costs(random, schedule.stages)
    timeline = simulate(recomputing(schedule, again), costs)
    for rank, moments in enumerate(held(schedule)):
        live = [Live(0, costs.stages[s].activation_bytes, costs.stages[s].held_for_weight) for s in moments.stages]
        keeps = [costs.stages[s].kept if s in again else costs.stages[s].activation_bytes for s in moments.stages]
        assert peak(moments, live, keeps) == timeline.rank_peak_bytes[rank]
        for n, stage in enumerate(moments.stages):
            assert peak(moments.of(stage), [live[n]], [keeps[n]]) == timeline.peak_bytes[stage]


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(["1f1b", "scp", "zb-h1", "interleaved", "zb-v"]), st.integers(1, 3), st.integers(1, 6))
def test_the_stages_of_a_rank_share_its_memory_for_the_fewest_seconds(
    seed: int, name: str, ranks: int, micro_batches: int
) -> None:
    random = Random(seed)
    for moments in held(named_schedule(name, ranks, micro_batches, 2)):
        live, fronts = list[Live](), list[Front]()
        for _ in moments.stages:
            saved = [random.randint(10, 60) for _ in range(4)]
            boundary = random.randint(0, 20)
            fronts.append(front([random.randint(1, 5) for _ in saved], saved, [0, 3, 9, 2], 5, 2))
            live.append(Live(boundary, boundary + sum(saved), random.choice([0, 30, 300])))
        room = random.randint(100, 1500)
        ways = [
            (sum(float(f.seconds[w]) for f, w in zip(fronts, way, strict=True)), way)
            for way in product(*(range(len(f.kept)) for f in fronts))
            if peak(moments, live, [s.boundary + int(f.kept[w]) for s, f, w in zip(live, fronts, way, strict=True)])
            <= room
        ]
        chosen = choose(moments, live, fronts, room)
        if not ways:
            assert chosen is None
        else:
            assert chosen is not None
            assert sum(float(f.seconds[w]) for f, w in zip(fronts, chosen, strict=True)) == pytest.approx(min(ways)[0])
            assert any(chosen == way for _, way in ways)


def test_too_many_ways_are_thinned_out_and_still_fit() -> None:
    (moments,) = held(named_schedule("interleaved", 1, 4, 3))
    many = front([1.0 + i / 64 for i in range(40)], [100 + 7 * i for i in range(40)], [0] * 40, 0, 0)
    live = [Live(0, int(many.kept[-1]), 0)] * 3
    assert len(many.kept) ** 3 > COMBINED
    least = peak(moments, live, [0, 0, 0])
    for room in (least, 2 * least):
        chosen = choose(moments, live, [many] * 3, room)
        assert chosen is not None
        assert peak(moments, live, [int(many.kept[way]) for way in chosen]) <= room
    assert choose(moments, live, [many] * 3, least - 1) is None


# Whole plans.


def plan(graph: Any, pp: int, **options: Any) -> Plan:
    return make_plan(graph, Mesh(1, pp), **{"hardware": TOY, "batch": 16, "micro_batches": 8, **options})


@settings(max_examples=20)
@given(
    st.sampled_from([gpt(6, d=32, s=32), encoder_decoder(3, d=16), chain([10**6] * 20, width=32, samples=8)]),
    st.integers(1, 4),
    st.sampled_from([*AS_DATA, AUTO, AUTO_V]),
    st.floats(0.3, 1.1),
    st.sampled_from(["auto", "none", "full"]),
)
def test_a_plan_is_what_the_simulator_says(graph: Any, pp: int, schedule: str, share: float, recompute: str) -> None:
    roomy = plan(graph, pp, schedule=schedule)
    try:
        made = plan(graph, pp, schedule=schedule, recompute=recompute, memory_limit=int(share * max(roomy.rank_bytes)))
    except ValueError as refused:
        with pytest.raises(ValueError, match="fits the memory"):
            raise refused
        return
    assert max(made.rank_bytes) <= made.memory_limit
    again = [stage.index for stage in made.stages if stage.recompute]
    assert schedule_of(made).recomputes == frozenset(again)
    assert schedule_of(made).peak_live() == tuple(stage.live_micro_batches for stage in made.stages)
    units = {unit.name: unit for unit in made.units}
    for stage in made.stages:
        assert all(units[name].stage == stage.index for name in stage.recompute)
        assert (stage.recompute_seconds > 0) == bool(stage.recompute)
        assert 0 < stage.recompute_seconds <= stage.forward_seconds * (1 + 1e-9) or not stage.recompute
        assert 0 <= stage.weight_seconds <= stage.backward_seconds
    if recompute == "none":
        assert again == []
    elif recompute == "full":
        spared = {len(made.stages) - 1} if schedule in set(LADDER) - {"hidden-recompute"} else set()
        assert set(again) == set(range(len(made.stages))) - spared
        assert all(
            stage.recompute == tuple(u.name for u in made.units if u.stage == stage.index)
            for stage in made.stages
            if stage.recompute
        )
    elif share > 1.01:
        assert again == []


def test_only_what_the_memory_asks_for_is_computed_again() -> None:
    """The first stage holds most micro-batches, and so computes most again; the last one nothing."""
    graph = gpt(16, d=64, s=128)
    roomy = plan(graph, 4)
    tight = plan(graph, 4, memory_limit=int(0.6 * max(roomy.rank_bytes)))
    counts = [len(stage.recompute) for stage in tight.stages]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0 == counts[-1]
    assert tight.step_seconds > roomy.step_seconds
    assert any("stage 0 computes" in note and "to keep everything would take" in note for note in tight.notes)
    asked = plan(graph, 4, recompute="full")
    assert asked.step_seconds > tight.step_seconds
    assert any("as was asked" in note for note in asked.notes)
    with pytest.raises(ValueError, match=r"What fits: recompute='auto'"):
        plan(graph, 4, memory_limit=tight.memory_limit, recompute="none")


@pytest.mark.parametrize("schedule", [AUTO, AUTO_V])
def test_an_order_that_is_built_is_in_the_plan_and_no_slower(schedule: str) -> None:
    graph = gpt(8, d=64, s=64)
    made, usual = (plan(graph, 2, schedule=name) for name in (schedule, STAND_IN[schedule][0]))
    assert made.starts == usual.starts
    assert len(made.orders) == 2
    assert made.step_seconds < usual.step_seconds
    assert not usual.orders
    assert any("the order is built for these stages" in note for note in made.notes)
    assert plan(graph, 2, schedule=schedule) == made, "the same every time"
    limit = max(usual.rank_bytes)
    tight = plan(graph, 2, schedule=schedule, memory_limit=limit)
    assert max(tight.rank_bytes) <= limit
    assert made.step_seconds <= tight.step_seconds <= usual.step_seconds


@pytest.mark.parametrize("layers", [8, 9])
def test_stages_are_cut_for_each_schedule_that_stands_in(layers: int) -> None:
    graph = gpt(layers, d=64, s=64)
    made = plan(graph, 4, schedule=AUTO)
    of = {name: plan(graph, 4, schedule=name) for name in STAND_IN[AUTO]}
    assert made.step_seconds <= min(each.step_seconds for each in of.values())
    best = "1f1b" if layers == 8 else "zb-h1"
    assert made.starts == of[best].starts
    assert (of["1f1b"].starts == of["zb-h1"].starts) == (layers == 8)
    assert any(f" times for {best}, " in note for note in made.notes)


def test_an_order_that_is_built_lets_a_stage_that_reads_nothing_before_it_wait_all_the_same() -> None:
    """As the engine does: its neighbour's turn comes first, though no value crosses."""
    made = GraphBuilder()
    labels = made.input("labels", (512, 64), "float32")
    x = made.input("x", (512, 64), "float32")
    for layer, work in enumerate((4, 3, 2, 5)):
        weight = made.weight(f"{layer}", 64, 64)
        x = made.op(f"{layer}", x, kind="module", params=(weight,), shape=(512, 64), flops=work * 10**9)
    aside = made.op("aside", labels, shape=(512, 64), flops=10**5)
    made.op("loss", x, aside, shape=(1,), flops=10**5)
    problem = problem_of(made.graph(), 6, 8, AUTO)
    judged = Judge(problem)((0, 3, 4, 5, 6, 7, 8))
    assert judged is not None
    assert (3, 4) not in problem.traffic.edges((0, 3, 4, 5, 6, 7, 8))
    assert neighbours(6) <= judged.edges
    built, _ = in_order(problem, Found((0, 3, 4, 5, 6, 7, 8), judged, proven=False, simulated=1, bound=0.0))
    add_transfers(built.schedule, neighbours(6))  # a ValueError says where ranks wait for one another


def test_an_order_without_halves_is_built_where_what_waits_is_too_much() -> None:
    """These layers save nothing, so that their inputs and output gradients are all that could wait."""
    made = GraphBuilder()
    x = made.input("x", (512, 64), "float32")
    for layer in range(8):
        weight = made.weight(f"{layer}", 64, 64)
        x = made.op(f"{layer}", x, kind="module", params=(weight,), shape=(512, 64), flops=10**9, saved=64)
    graph = made.graph()
    usual = make_plan(graph, Mesh(1, 2), hardware=TOY, batch=2048, micro_batches=4)
    roomy, tight = (
        make_plan(graph, Mesh(1, 2), hardware=TOY, batch=2048, micro_batches=4, schedule=AUTO, memory_limit=limit)
        for limit in (10**9, max(usual.rank_bytes))
    )
    assert schedule_of(roomy).apart(Kind.W)
    assert not schedule_of(tight).apart(Kind.W)
    assert max(tight.rank_bytes) <= tight.memory_limit
    assert roomy.step_seconds < tight.step_seconds <= usual.step_seconds


def test_stages_of_one_rank_send_nothing() -> None:
    made = plan(gpt(8, d=64, s=64), 2, schedule="zb-v")
    assert made.stage_rank == (0, 1, 1, 0)
    slow = plan(gpt(8, d=64, s=64), 1, schedule="interleaved", chunks=4)
    assert slow.stage_rank == (0, 0, 0, 0)
    assert slow.pipeline_seconds == pytest.approx(8 * sum(s.forward_seconds + s.backward_seconds for s in slow.stages))
    assert slow.bubble == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("schedule", [*AS_DATA, AUTO, AUTO_V])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_step_of_a_plan_is_its_schedule_simulated_with_its_costs(schedule: str, recompute: str) -> None:
    made = plan(gpt(6, d=64, s=64), 3, schedule=schedule, recompute=recompute, hardware="a100-80gb", micro_batches=8)
    order, edges = schedule_of(made), edges_of(made)
    timeline = simulate(add_transfers(order, edges), costs_of(made), edges)
    assert timeline.makespan == pytest.approx(made.pipeline_seconds, rel=1e-9)
    assert timeline.bubble == pytest.approx(made.bubble, abs=1e-9)
    halves = {AUTO, AUTO_V, "zb-h1", "zb-h2", "zb-v", "dualpipe-v"}
    assert bool(order.apart(Kind.W)) == (schedule in halves)
    again = Plan.from_json(made.to_json())
    assert schedule_of(again) == order
