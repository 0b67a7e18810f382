"""A plan is a file: exact to the last bit, named by its digest, refused when it is not what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from merak_like.partitioner.assemble import check_plan
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from tests.graphs import TOY, encoder_decoder, gpt

GRAPH = encoder_decoder(2)
PLAN = make_plan(GRAPH, Mesh(2, 3), hardware=TOY, batch=16, micro_batches=4, signature={"input_ids": "int64[2, 8]"})


def test_round_trip_is_exact(tmp_path: Path):
    PLAN.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == PLAN
    assert again.digest == PLAN.digest
    assert again.to_json() == PLAN.to_json()


def test_the_digest_names_the_content():
    assert (
        make_plan(
            GRAPH, Mesh(2, 3), hardware=TOY, batch=16, micro_batches=4, signature={"input_ids": "int64[2, 8]"}
        ).digest
        == PLAN.digest
    ), "planning is deterministic"
    others = [
        replace(PLAN, micro_batches=5),
        replace(PLAN, pipeline_seconds=PLAN.pipeline_seconds * (1 + 1e-15)),
        PLAN.with_notes(["why not"]),
        replace(PLAN, stages=(replace(PLAN.stages[0], flops=1), *PLAN.stages[1:])),
        replace(PLAN, signature={}),
    ]
    assert len({plan.digest for plan in (PLAN, *others)}) == 1 + len(others)


def edited(**changes: object) -> str:
    data = json.loads(PLAN.to_json())
    for name, value in changes.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    return json.dumps(data)


def test_tampering_is_refused_unless_meant():
    text = edited(micro_batches=7)
    with pytest.raises(ValueError, match="edited or damaged"):
        Plan.from_json(text)
    assert Plan.from_json(text, edited=True).micro_batches == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (edited(version=99), "plan version 99 cannot be read"),
        (edited(colour="red"), r"plan has unknown fields \['colour'\]"),
        (edited(schedule=None), r"plan lacks the fields \['schedule'\]"),
        (edited(mesh={"dp": 1, "pp": 1}), r"plan.mesh lacks the fields \['tp'\]"),
        (edited(stages=[{"index": 0}]), r"plan.stages\[0\] lacks the fields"),
        (edited(digest="0" * 64), "the file says 000000000000"),
        (edited(digest=None), "the file says None"),
        ("{", "not a plan"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        Plan.from_json(text)


def test_a_plan_fits_its_graph_and_no_other():
    check_plan(PLAN, GRAPH)
    with pytest.raises(ValueError):  # noqa: PT011 - which of the many differences is named first does not matter
        check_plan(PLAN, gpt(3))


def test_a_lost_parameter_and_a_shifted_cut_are_found():
    first = PLAN.stages[0]
    with pytest.raises(ValueError, match=r"stage 0 needs .* that the plan does not put there"):
        check_plan(replace(PLAN, stages=(replace(first, params=first.params[1:]), *PLAN.stages[1:])), GRAPH)
    with pytest.raises(ValueError, match="holds intruder that it does not need"):
        check_plan(replace(PLAN, stages=(replace(first, params=(*first.params, "intruder")), *PLAN.stages[1:])), GRAPH)
    with pytest.raises(ValueError, match="stage 0 ends at op"):
        check_plan(replace(PLAN, stages=(replace(first, stop=first.stop + 1), *PLAN.stages[1:])), GRAPH)
    with pytest.raises(ValueError, match="crossings"):
        check_plan(replace(PLAN, crossings=PLAN.crossings[1:]), GRAPH)
    with pytest.raises(ValueError, match="parameters on several stages"):
        check_plan(replace(PLAN, shared={}), GRAPH)


def test_the_tied_table_stands_where_it_is_read():
    assert set(PLAN.shared) <= {"shared.weight"}
    readers = tuple(s.index for s in PLAN.stages if "shared.weight" in s.params)
    assert PLAN.shared.get("shared.weight", readers) == readers
    assert PLAN.ties == (("shared.weight", "decoder.embed.weight", "lm_head.weight"),)
