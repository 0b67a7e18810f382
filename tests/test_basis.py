"""A plan file holds what it was made from: the graph and the arguments survive it, and make the same plan again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from merak_like.partitioner.basis import Basis, packed, unpacked
from merak_like.partitioner.explain.again import Again, basis_of, plan_again
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.plan import Plan
from tests.explained import explained
from tests.graphs import encoder_decoder, gpt, skips, two_towers
from tests.plans import make_plan
from tests.test_cuts import random_graphs


@pytest.mark.parametrize("graph", [gpt(2), encoder_decoder(2), skips(3), two_towers(3)], ids=lambda g: g.model)
def test_a_graph_survives_being_packed(graph: ProxyGraph):
    assert unpacked(packed(graph)) == graph


@settings(max_examples=40)
@given(random_graphs())
def test_any_graph_survives_being_packed(graph: ProxyGraph):
    assert unpacked(packed(graph)) == graph


def test_a_plan_file_makes_the_same_plan_again(tmp_path: Path):
    plan = explained(share=0.7)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert basis_of(loaded).graph == basis_of(plan).graph
    assert basis_of(loaded).hardware == basis_of(plan).hardware
    assert plan_again(loaded) == plan
    assert Again.of(loaded).judged.timeline.makespan == plan.pipeline_seconds
    assert Again.of(loaded).judged.rank_bytes == plan.rank_bytes


def test_the_basis_decides_nothing(tmp_path: Path):
    plan = explained()
    bare = replace(plan, basis=None)
    assert bare.digest == plan.digest
    bare.save(tmp_path / "bare.json")
    assert Plan.load(tmp_path / "bare.json").basis is None
    data = json.loads(plan.to_json())
    del data["basis"]  # of an earlier version
    assert Plan.from_json(json.dumps(data)) == plan


def test_a_graph_is_small_in_the_file():
    graph = gpt(80)
    assert len(packed(graph)) < 40 * len(graph.ops)


def test_what_is_damaged_is_told_when_it_is_asked_for():
    plan = explained()
    data = json.loads(plan.to_json())
    data["basis"]["graph"] = data["basis"]["graph"][:-40]
    loaded = Plan.from_json(json.dumps(data))
    with pytest.raises(ValueError, match=r"cannot be read .*: make the plan again"):
        _ = basis_of(loaded).graph
    with pytest.raises(ValueError, match="options, source and graph"):
        Plan.from_json(json.dumps(data | {"basis": {"graph": ""}}))
    with pytest.raises(ValueError, match="does not hold what it was made from"):
        basis_of(make_plan())


@pytest.mark.parametrize("name", ["graph.os", "graph.prod", "..x.Y", "nothing.Op", "judge.Judge"])
def test_only_data_of_plans_is_made_from_a_file(name: str):
    options = Basis({"hardware": {"kind of": name}}, "")
    with pytest.raises((ValueError, ModuleNotFoundError, AttributeError)):
        _ = options.options


def test_options_are_written_for_people():
    data = json.loads(explained().to_json())["basis"]
    assert data["options"]["hardware"]["intra"] == {"kind of": "hardware.Link", "bandwidth": 1e10, "latency": 1e-5}
    assert data["options"]["mesh"] == {"kind of": "mesh.Mesh", "dp": 1, "pp": 3, "tp": 1}
