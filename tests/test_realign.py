"""What a plan says about ops holds on another trace of the model: borders stay where their ops are, or go to a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.realign import moved, realign, recomputed_ranges
from tests.graphs import TOY, gpt


def recomputing(plan: Plan, chosen: Sequence[str]) -> Plan:
    stages = [
        replace(stage, recompute=tuple(u.name for u in plan.units if u.stage == stage.index and u.name in chosen))
        for stage in plan.stages
    ]
    return replace(plan, stages=tuple(stages))


def without(graph: ProxyGraph, gone: frozenset[int]) -> ProxyGraph:
    """The trace of inputs for which some additions are not made: their readers read the first input instead."""
    instead = {graph.ops[i].outputs[0].name: graph.ops[i].inputs[0] for i in gone}

    def reads(name: str) -> str:
        return reads(instead[name]) if name in instead else name

    ops = [replace(op, inputs=tuple(map(reads, op.inputs))) for i, op in enumerate(graph.ops) if i not in gone]
    return replace(graph, ops=tuple(ops), calls=())


GRAPH = gpt(4, d=64)
PLAN = make_plan(GRAPH, Mesh(1, 2), hardware=TOY, batch=4, micro_batches=2)
NAMES = [unit.name for unit in PLAN.units]
ADDITIONS = [i for i, op in enumerate(GRAPH.ops) if op.target == "add"]


def test_units_next_to_each_other_are_one_piece_and_a_stage_ends_it() -> None:
    for stage in PLAN.stages:
        own = [(u.first, u.stop) for u in PLAN.units if u.stage == stage.index]
        assert len(own) > 3
        everything = recomputing(PLAN, NAMES)
        assert recomputed_ranges(everything, stage.index, GRAPH, GRAPH) == ((stage.start, stage.stop),)
        assert recomputed_ranges(PLAN, stage.index, GRAPH, GRAPH) == ()
        names = [u.name for u in PLAN.units if u.stage == stage.index]
        some = recomputing(PLAN, [names[0], names[1], names[3]])
        assert recomputed_ranges(some, stage.index, GRAPH, GRAPH) == ((own[0][0], own[1][1]), own[3])


def test_a_unit_of_another_stage_is_refused() -> None:
    wrong = replace(PLAN, stages=(replace(PLAN.stages[0], recompute=(NAMES[-1],)), PLAN.stages[1]))
    with pytest.raises(ValueError, match=r"stage 0 has no units \['.*'\] to recompute: it has inputs, wte"):
        recomputed_ranges(wrong, 0, GRAPH, GRAPH)


@given(st.sets(st.sampled_from(NAMES)), st.frozensets(st.sampled_from(ADDITIONS)), st.booleans())
def test_on_another_trace_the_pieces_run_the_same_weights(
    chosen: set[str], gone: frozenset[int], backwards: bool
) -> None:
    plan, other = recomputing(PLAN, sorted(chosen)), without(GRAPH, gone)
    planned, traced = (other, GRAPH) if backwards else (GRAPH, other)
    if backwards:  # the plan of the shorter trace, on the longer one
        plan = recomputing(make_plan(other, Mesh(1, 2), hardware=TOY, batch=4, micro_batches=2), sorted(chosen))
    starts = realign(plan, planned, traced)
    legal = {0, len(traced.ops), *find_cuts(traced).positions.tolist()}
    for stage in plan.stages:
        ranges = recomputed_ranges(plan, stage.index, planned, traced)
        flat = [border for piece in ranges for border in piece]
        assert set(flat) <= legal
        assert flat == sorted(set(flat)), "in order, apart, none empty"
        assert all(starts[stage.index] <= border <= starts[stage.index + 1] for border in flat)
        units = [u for u in plan.units if u.name in stage.recompute]
        wanted = {name for u in units for name in planned.params_of(planned.ops[u.first : u.stop])}
        assert {name for first, stop in ranges for name in traced.params_of(traced.ops[first:stop])} == wanted


def test_borders_move_to_legal_cuts_in_order() -> None:
    traced = replace(without(GRAPH, frozenset(ADDITIONS[:3])), pinned=((3, 9), (20, 24)))
    positions = tuple(range(len(GRAPH.ops) + 1))
    found = moved(positions, GRAPH, traced)
    assert set(found) <= {0, len(traced.ops), *find_cuts(traced).positions.tolist()}
    assert all(a <= b for a, b in pairwise(found))
    assert (found[0], found[-1]) == (0, len(traced.ops))
    assert moved(positions, GRAPH, GRAPH) == positions
