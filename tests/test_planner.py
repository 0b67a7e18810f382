"""The planner's choice is the best there is, and what cannot be is refused with something that can."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from merak_like.partitioner.cost import CostTable, op_costs
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.feasible import cut_fits, least_memory
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Link
from merak_like.partitioner.job import Job
from merak_like.partitioner.judge import Judge
from merak_like.partitioner.memory import MemoryModel
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V
from merak_like.partitioner.search import search
from merak_like.partitioner.traffic import Traffic
from tests.graphs import TOY, chain, encoder_decoder, gpt, skips, two_towers
from tests.test_cuts import random_graphs


def problem_of(
    graph: ProxyGraph,
    ranks: int,
    micro_batches: int,
    schedule: str,
    *,
    limit: int = 10**15,
    link: Link = TOY.intra,
    recompute: str = "none",
) -> Problem:
    """All legal cuts, not only those the planner would try; every segment is a unit."""
    positions = np.array([0, *find_cuts(graph).positions.tolist(), len(graph.ops)])
    chunks = 2 if schedule == "interleaved" else 1
    job = Job(Mesh(1, ranks), replace(TOY, intra=link), schedule, micro_batches, limit, chunks, recompute)
    costs = CostTable.of(op_costs(graph, TOY))
    return Problem(job, positions, costs, MemoryModel(graph), Traffic(graph, positions), positions)


def every_partition(problem: Problem) -> Iterator[tuple[int, ...]]:
    inner = range(1, problem.size)
    return ((0, *cut, problem.size) for cut in combinations(inner, problem.job.stages - 1))


def exhaustive(problem: Problem) -> float:
    """Seconds of the fastest partition that fits; infinite if none does."""
    judge = Judge(problem)
    found = [judge(starts) for starts in every_partition(problem)]
    return min((judged.timeline.makespan for judged in found if judged is not None), default=float("inf"))


def totals_of(problem: Problem) -> list[int]:
    """Bytes of the fullest rank of every partition, recomputed as far as may be."""
    judge = Judge(problem)
    return [judge.over(starts) + problem.job.memory_limit for starts in every_partition(problem)]


flops_strategy = st.lists(st.sampled_from([0, 10**6, 2 * 10**6, 3 * 10**6, 10**7]), min_size=3, max_size=8)
schedules_strategy = st.sampled_from(sorted(AS_DATA))
ALONE = sorted(set(AS_DATA) - {"interleaved", "zb-v", "dualpipe-v"})
"""Schedules of one stage per rank."""
links_strategy = st.sampled_from([Link(1e12, 0.0), Link(1e7, 0.0), Link(1e9, 1e-6), Link(1e6, 1e-5)])


@settings(max_examples=80)
@given(
    flops_strategy,
    st.integers(2, 4),
    st.integers(1, 9),
    st.sampled_from(ALONE),
    links_strategy,
    st.sampled_from(["none", "full", "auto"]),
    st.data(),
)
def test_the_choice_equals_exhaustive_simulation(
    flops: list[int], stages: int, micro_batches: int, schedule: str, link: Link, recompute: str, data: st.DataObject
):
    widths = data.draw(st.lists(st.sampled_from([1, 8, 40]), min_size=len(flops), max_size=len(flops)))
    graph = chain(flops, widths=widths)
    problem = problem_of(graph, stages, micro_batches, schedule, link=link, recompute=recompute)
    assume(problem.size >= stages)
    totals = totals_of(problem)
    limit = data.draw(st.sampled_from([10**15, *sorted(set(totals))[:4], min(totals) - 1]))
    problem = problem_of(graph, stages, micro_batches, schedule, link=link, limit=limit, recompute=recompute)
    best = exhaustive(problem)
    found = search(problem)
    if best == float("inf"):
        assert found is None
    else:
        assert found is not None
        assert max(found.judged.rank_bytes) <= limit
        assert found.judged.timeline.makespan == pytest.approx(best, rel=1e-8)
        assert found.proven


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("piece", range(10))
def test_the_choice_equals_exhaustive_simulation_on_a_thousand_instances(piece: int):
    every = test_the_choice_equals_exhaustive_simulation.hypothesis.inner_test
    seed(piece)(
        settings(max_examples=100, derandomize=False, database=None)(
            given(
                st.lists(st.sampled_from([0, 10**6, 2 * 10**6, 3 * 10**6, 10**7]), min_size=8, max_size=14),
                st.integers(2, 4), st.integers(1, 9), st.sampled_from(ALONE), links_strategy,
                st.sampled_from(["full", "auto"]), st.data(),
            )(every)
        )
    )()  # fmt: skip


@settings(max_examples=40)
@given(
    flops_strategy, st.integers(1, 2), st.integers(1, 6), st.sampled_from(["interleaved", "zb-v", "dualpipe-v"]),
    st.sampled_from(["none", "auto"]), st.data(),
)  # fmt: skip
def test_the_choice_equals_exhaustive_simulation_with_two_stages_per_rank(
    flops: list[int], ranks: int, micro_batches: int, schedule: str, recompute: str, data: st.DataObject
):
    graph = chain(flops)
    problem = problem_of(graph, ranks, micro_batches, schedule, recompute=recompute)
    assume(problem.size >= problem.job.stages)
    totals = totals_of(problem)
    limit = data.draw(st.sampled_from([10**15, *sorted(set(totals))[:3], min(totals) - 1]))
    problem = problem_of(graph, ranks, micro_batches, schedule, limit=limit, recompute=recompute)
    best = exhaustive(problem)
    found = search(problem)
    if found is None:
        assert best == float("inf"), "of few segments a partition that fits is found"
    else:
        assert max(found.judged.rank_bytes) <= limit
        assert found.judged.timeline.makespan == pytest.approx(best, rel=1e-8)


@settings(max_examples=40)
@given(
    random_graphs(), st.integers(1, 4), st.integers(1, 5), st.sampled_from(ALONE),
    st.sampled_from(["none", "auto", "full"]),
)  # fmt: skip
def test_the_least_memory_equals_brute_force(
    graph: ProxyGraph, stages: int, micro_batches: int, schedule: str, recompute: str
):
    problem = problem_of(graph, stages, micro_batches, schedule, recompute=recompute)
    assume(problem.size >= stages)
    needed, starts = least_memory(problem)
    assert needed == min(totals_of(problem)) == Judge(problem).over(starts) + problem.job.memory_limit
    for limit, room in ((needed, True), (needed - 1, False)):
        tight = problem_of(graph, stages, micro_batches, schedule, limit=limit, recompute=recompute)
        assert cut_fits(tight) is room
        assert (Judge(tight)(starts) is not None) is room


GRAPHS = {
    "skips": skips(4, width=64),
    "towers": two_towers(4, width=64),
    "gpt": gpt(1, d=32),
    "t5": encoder_decoder(1, d=8),
    "chain": chain([10**6, 3 * 10**6, 0, 10**6, 2 * 10**6]),
}


@pytest.mark.parametrize("schedule", sorted(AS_DATA))
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_the_bound_is_never_above_the_simulated_step(name: str, schedule: str, micro_batches: int):
    ranks = 3 if schedule in ALONE else 2
    for link in (Link(1e12, 0.0), Link(1e9, 1e-7), Link(1e8, 1e-5)):
        for recompute in ("none", "full"):
            problem = problem_of(GRAPHS[name], ranks, micro_batches, schedule, link=link, recompute=recompute)
            judge, every = Judge(problem), list(every_partition(problem))
            some = every[:: len(every) // 40 + 1]
            steps = list[float]()
            for starts in some:
                judged = judge(starts)
                assert judged is not None
                steps.append(judged.timeline.makespan)
            for s, (i, j) in enumerate(pairwise(np.array(some).T)):
                over = problem.bound(problem.job.stages - 1 - s, i, j) > np.array(steps) * (1 + 1e-9)
                assert not over.any(), (some[over.argmax()], s)


@pytest.mark.parametrize("name", ["skips", "towers"])
def test_graphs_that_are_no_chains_are_planned_as_well(name: str):
    problem = problem_of(GRAPHS[name], 3, 4, "1f1b", link=Link(1e10, 1e-9))
    found = search(problem)
    assert found is not None
    best = exhaustive(problem)
    assert found.judged.timeline.makespan >= found.bound * (1 - 1e-9)
    if found.proven:
        assert found.judged.timeline.makespan == pytest.approx(best, rel=1e-8)
    else:
        assert found.bound <= best * (1 + 1e-9)
        assert found.judged.timeline.makespan <= best * 1.1


def plan(graph: ProxyGraph, pp: int = 1, *, dp: int = 1, batch: int = 8, **options: Any) -> Plan:
    return make_plan(graph, Mesh(dp, pp), **{"hardware": TOY, "batch": batch, **options})


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(4, 6), st.integers(1, 5), st.integers(1, 4), st.sampled_from([*AS_DATA, AUTO, AUTO_V]),
    st.sampled_from(["auto", "full"]),
)  # fmt: skip
def test_no_layer_is_lost_or_doubled(layers: int, ranks: int, micro_batches: int, schedule: str, recompute: str):
    graph = gpt(layers)
    options: dict[str, Any] = {"micro_batches": micro_batches, "schedule": schedule, "recompute": recompute}
    made = plan(graph, ranks, batch=2 * micro_batches, **options)
    assert made.starts[0] == 0
    assert made.starts[-1] == len(graph.ops)
    assert all(a < b for a, b in pairwise(made.starts))
    assert [i for u in made.units for i in range(u.first, u.stop)] == list(range(len(graph.ops)))
    assert all(made.stages[u.stage].start <= u.first < u.stop <= made.stages[u.stage].stop for u in made.units)
    placed = [name for stage in made.stages for name in stage.params]
    assert {p.name for p in graph.parameters} == set(placed)
    assert {name for name in placed if placed.count(name) > 1} == set(made.shared) <= {"wte.weight"}
    assert sum(s.flops for s in made.stages) == sum(u.flops for u in made.units) == sum(op.flops for op in graph.ops)
    assert (
        made.pipeline_seconds
        >= max(s.forward_seconds + s.backward_seconds for s in made.stages) * micro_batches * 0.999
    )
    if schedule in ("gpipe", "1f1b"):
        assert [s.live_micro_batches for s in made.stages] == [
            micro_batches if schedule == "gpipe" else min(micro_batches, ranks - s) for s in range(ranks)
        ]


@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2])
def test_any_dp_and_pp(pp: int, dp: int):
    made = plan(encoder_decoder(2), pp, dp=dp, batch=16)
    assert made.mesh == Mesh(dp, pp)
    assert dp * made.micro_batches * made.micro_batch == 16
    assert made.memory_limit == TOY.memory_limit
    assert all(stage.memory.total <= made.memory_limit for stage in made.stages)
    assert made.notes


def test_more_micro_batches_are_chosen_for_more_stages_and_fewer_where_launches_cost():
    graph = gpt(4, d=64, s=64)
    assert plan(graph, 1, batch=64).micro_batches <= plan(graph, 4, batch=64).micro_batches
    slow = plan(graph, 4, batch=64, hardware=replace(TOY, launch_seconds=1.0))
    assert slow.micro_batches <= plan(graph, 4, batch=64).micro_batches
    assert any("numbers of micro-batches compared" in note for note in slow.notes)


def test_notes_say_what_was_compared_and_assumed():
    text = "\n".join(plan(gpt(6, d=64, s=64), 3, batch=16, micro_batches=8).notes)
    for part in ("estimated", "no op was timed", "binds", "fullest", "simulated", "same number of blocks", "balance"):
        assert part in text
    assert "proven" in text


REFUSED: list[tuple[Callable[[], Plan], str]] = [
    (lambda: plan(gpt(1), schedule="1f2b"), "unknown schedule '1f2b': did you mean '1f1b'"),
    (lambda: plan(gpt(1), recompute="ful"), "unknown recompute 'ful': did you mean 'full'"),
    (lambda: plan(gpt(1), chunks=3), "chunks = 3 has no meaning for schedule '1f1b': only 'interleaved'"),
    (lambda: plan(gpt(1), schedule="interleaved", chunks=0), "chunks = 0: a rank needs at least one stage"),
    (
        lambda: plan(chain([9] * 3), 2, schedule="interleaved", chunks=3),
        "pp = 2 with 3 stages per rank, but .*: use pp = 1 or",
    ),
    (lambda: plan(gpt(1), dp=3), "batch = 8 samples cannot be shared evenly by dp = 3 .* use batch 6 or 9, or dp 4"),
    (lambda: plan(gpt(1), dp=2, micro_batches=3), r"dp \* micro_batches = 2 \* 3 = 6: use batch 6 or 12, or .* 4"),
    (lambda: plan(gpt(1), micro_batch=16), "use batch 16, or micro_batch 8"),
    (lambda: plan(gpt(1), micro_batches=4, micro_batch=4), "= 16, but batch is 8: leave one of them out"),
    (lambda: plan(gpt(1), batch=0), "batch = 0 is not a number of samples"),
    (lambda: plan(ProxyGraph((), ())), "no ops"),
]


@pytest.mark.parametrize(("make", "says"), REFUSED)
def test_what_cannot_be_is_refused_with_the_nearest_thing_that_can(make: Callable[[], Plan], says: str):
    with pytest.raises(ValueError, match=says):
        make()


def test_too_many_stages_name_a_number_that_works():
    graph = chain([10**6] * 5)
    with pytest.raises(ValueError, match=r"pp = 9 stages, but Chain can be cut at 4 places only") as refused:
        plan(graph, 9)
    found = re.search(r"use pp = (\d+) or fewer", str(refused.value))
    assert found is not None
    assert len(plan(graph, int(found[1])).stages) == int(found[1]) == 5
