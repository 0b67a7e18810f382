"""Profiles: what was measured survives its file, adds up, is drawn below its plan, and is refused by any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import astuple, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from merak_like.partitioner import planner
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.recorded import Record, Recorded, Step, shares
from merak_like.partitioner.report.compare import compare, planned_step, table, to_chrome, to_svg
from merak_like.partitioner.report.lanes import AFTER, TRANSFER, WAIT, WIDTH
from merak_like.partitioner.schedules.action import Action, Schedule, chain
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.scp import scp
from merak_like.partitioner.schedules.zb_v import zb_v
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from tests.commands import refused, run
from tests.graphs import gpt
from tests.plans import make_plan

# rank 0  .FFs~~~~~~~BBBBa       ~ is a wait, s the call of a send, a what comes after, . anything else
# rank 1  ~~~~FF..RBBaaaaa
TWO_RANKS = Step(
    (
        (
            Record(Action.parse("F0.0"), 1, 3, 0),
            Record(Action.parse("SEND_F0.0>1"), 3, 4, 0),
            Record(Action.parse("B0.0"), 4, 15, 7),
        ),
        (
            Record(Action.parse("F0.1"), 0, 6, 4),
            Record(Action.parse("R0.1"), 8, 9, 0),
            Record(Action.parse("B0.1"), 9, 11, 0),
        ),
    ),
    (16.0, 16.0),
)


def as_run(plan: Plan, *, slower: float = 1.0, late: float = 0.0, after: float = 0.0) -> Step:
    """A step that went as planned on every replica, but slower, begun late, and with an end of its own."""
    planned = planned_step(plan, schedule_of(plan))
    ranks = tuple(
        tuple(Record(r.action, slower * r.start + late, slower * r.end + late, slower * r.waited) for r in records)
        for records in planned.records
    )
    return Step(ranks * plan.mesh.dp, (slower * planned.makespan + late + after,) * plan.mesh.size)


def profile(plan: Plan, *steps: Step) -> Recorded:
    return Recorded(plan.digest, tuple(step.records for step in steps), tuple(step.tails for step in steps))


# Shares.


def test_the_shares_of_a_step_by_hand() -> None:
    first, second = shares(TWO_RANKS)
    #                                  F  R  B  W send wait other after
    assert astuple(first) == (2, 0, 4, 0, 1, 7, 1, 1)
    assert astuple(second) == (2, 1, 2, 0, 0, 4, 2, 5)
    assert TWO_RANKS.makespan == 15
    assert TWO_RANKS.seconds == 16
    assert TWO_RANKS.rank_bubble == pytest.approx((9 / 15, 10 / 15))
    assert [entry.start for entry in TWO_RANKS.entries[0]] == [1, 3, 11]


@pytest.mark.parametrize("build", [one_f_one_b, scp, zb_v])
@pytest.mark.parametrize("transfers", [False, True])
def test_a_simulated_step_keeps_its_bubble_and_waits_for_all_of_it(
    build: Callable[[int, int], Schedule], transfers: bool
) -> None:
    schedule = build(4, 7)
    costs = Costs(
        tuple(StageCosts(1 + 0.1 * s, 2, 0.5, 0.7) for s in range(schedule.stages)),
        dict.fromkeys(chain(schedule.stages), 0.2),
    )
    timeline = simulate(add_transfers(schedule, chain(schedule.stages)) if transfers else schedule, costs)
    step = Step.planned(timeline)
    assert step.makespan == step.seconds == timeline.makespan
    assert step.rank_bubble == pytest.approx(timeline.rank_bubble)
    for parts, tail, drawn, entries in zip(shares(step), step.tails, step.entries, timeline.entries, strict=True):
        assert sum(astuple(parts)) == pytest.approx(tail)
        assert (parts.transfer, parts.other, parts.after) == (0, pytest.approx(0), 0)
        assert parts.wait == pytest.approx(tail - parts.computing)
        assert [astuple_of(entry) for entry in drawn] == [astuple_of(e) for e in entries if e.action.peer < 0]


def astuple_of(entry: Any) -> tuple[str, Any, Any]:
    return str(entry.action), pytest.approx(entry.start), pytest.approx(entry.end)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_planned_step_takes_what_the_plan_says(schedule: str) -> None:
    made = planner.make_plan(
        gpt(6), Mesh(1, 3), hardware="a100-80gb", batch=12, micro_batches=6, schedule=schedule
    )  # fmt: skip
    assert planned_step(made, schedule_of(made)).makespan == pytest.approx(made.step_seconds)


# The file.


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    made = Recorded("d1", (TWO_RANKS.records, TWO_RANKS.records), (TWO_RANKS.tails, (20.5, 1 / 3 + 16)))
    made.save(tmp_path / "profile.json")
    assert Recorded.load(tmp_path / "profile.json") == made
    assert made.step(1).seconds == 20.5


def test_the_median_step_is_the_one_whose_makespan_is_in_the_middle() -> None:
    plan = make_plan()
    steps = [as_run(plan, slower=slower, after=1 / slower) for slower in (9.0, 1.2, 1.3, 1.1)]
    assert profile(plan, *steps).median == 1
    assert profile(plan, *steps[:3]).median == 2


GOOD: dict[str, Any] = {"version": 1, "plan": "d1", "steps": [[[["F0.0", 1, 2, 0.5]]]], "tails": [[3]]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "this is not a profile"),
        ([], "a profile is a JSON object with"),
        ({"version": 1, "stages": []}, "a profile is a JSON object with"),
        (GOOD | {"version": 2}, "profile version 2 cannot be read, only 1"),
        (GOOD | {"extra": 1}, "missing or unknown here is extra"),
        (GOOD | {"plan": 7}, "a digest, not 7"),
        (GOOD | {"steps": {}}, "steps must be a list, not dict"),
        (GOOD | {"steps": [[["F0.0"]]]}, r"steps\[0\]\[0\]\[0\] is 'F0.0', but a record is"),
        (GOOD | {"steps": [[[["F0.0", 1, 2]]]]}, "but a record is"),
        (GOOD | {"steps": [[[["F0", 1, 2, 0]]]]}, "'F0' is no action"),
        (GOOD | {"steps": [[[["F0.0", 1, "2", 0]]]]}, "'2' is no number of seconds"),
        (GOOD | {"steps": [[[["F0.0", 2, 1, 0]]]]}, "step 0, rank 0: F0.0 from 2.0 to 1.0 s"),
        (GOOD | {"steps": [[[["F0.0", 1, 2, 1.5]]]]}, "1.5 s of it waiting"),
        (GOOD | {"steps": [[[["F0.0", 1, float("nan"), 0]]]]}, "the profile is damaged"),
        (GOOD | {"steps": [[[["F0.0", 1, 2, 0], ["B0.0", 1.5, 3, 0]]]]}, "cannot follow what ended at 2.0 s"),
        (GOOD | {"tails": [[1.5]]}, "the step ends at 1.5 s, before its last action at 2.0 s"),
        (GOOD | {"tails": []}, "the same ranks in each"),
        (GOOD | {"tails": [[3, 3]]}, r"steps of \[1\] ranks and tails of \[2\]"),
        (GOOD | {"steps": [], "tails": []}, "a profile needs a step"),
    ],
)
def test_a_damaged_profile_is_refused(data: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError, match=f"profile.json: .*{reason}"):
        Recorded.load(file)
    file.write_text(json.dumps(GOOD))
    assert Recorded.load(file).step(0).tails == (3,)


def test_what_is_no_text_is_no_profile(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is not text"):
        Recorded.load(tmp_path / "profile.json")


# One above the other.


def boxes(svg: str, style: str, *fills: str) -> list[ElementTree.Element]:
    found = [box for box in ElementTree.fromstring(svg).findall(".//{*}rect") if box.get("class") == style]
    return [box for box in found if not fills or box.get("fill") in fills]


def wide(found: list[ElementTree.Element]) -> float:
    return sum(float(box.attrib["width"]) for box in found)


def test_a_step_as_planned_is_drawn_twice_alike_on_one_scale() -> None:
    plan = make_plan(schedule="zb-h1")
    svg = to_svg(compare(plan, profile(plan, as_run(plan, late=0.001, after=0.002))))
    steps = boxes(svg, "step")
    assert len(steps) == 2 * sum(map(len, schedule_of(plan).orders))
    above, below = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    planned, pairs = planned_step(plan, schedule_of(plan)).makespan, list(zip(above, below, strict=True))
    shifted = [float(b.attrib["x"]) - float(a.attrib["x"]) for a, b in pairs]
    assert shifted == pytest.approx([1230 * 0.001 / (planned + 0.003)] * len(pairs), abs=0.02)
    assert len({float(b.attrib["y"]) - float(a.attrib["y"]) for a, b in pairs}) == 1
    assert wide(above) == pytest.approx(wide(below), abs=0.5)
    assert len(boxes(svg, "mark", AFTER[1])) == plan.mesh.pp
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|href|url\(|@import|<script", svg)
    assert "1.02 times the plan" in svg
    assert "own scale" not in svg


def test_steps_too_far_apart_have_a_scale_each() -> None:
    plan = make_plan()
    svg = to_svg(compare(plan, profile(plan, as_run(plan, slower=50))))
    steps = boxes(svg, "step")
    assert wide(steps[: len(steps) // 2]) == pytest.approx(wide(steps[len(steps) // 2 :]), abs=0.5)
    assert "50.00 times the plan" in svg
    assert "each on its own scale" in svg
    assert max(float(box.attrib["x"]) + float(box.attrib["width"]) for box in steps) <= WIDTH


def test_waits_are_drawn_where_they_are() -> None:
    plan = make_plan()
    comparison = compare(plan, profile(plan, as_run(plan)))
    waits = boxes(to_svg(comparison), "mark", WAIT[1])
    seconds = sum(each.wait for each in shares(comparison.planned))
    assert wide(waits) == pytest.approx(2 * 1230 * seconds / comparison.planned.makespan, rel=1e-3)


def test_transfer_calls_are_drawn_and_traced_where_they_took_time() -> None:
    plan = make_plan(pp=2, micro_batches=1)
    words = (("F0.0", "SEND_F0.0>1", "RECV_B0.0<1", "B0.0"), ("RECV_F0.1<0", "F0.1", "B0.1", "SEND_B0.1>0"))
    ranks = tuple(tuple(Record(Action.parse(w), t, t + 1, 0.25) for t, w in enumerate(rank)) for rank in words)
    comparison = compare(plan, profile(plan, Step(ranks, (5.0, 4.0))))
    calls = boxes(to_svg(comparison), "mark", TRANSFER[1])
    assert [box[0].text for box in calls] == [
        "call of SEND_F0.0>1: 1.25 s to 2.00 s",
        "call of RECV_B0.0<1: 2.25 s to 3.00 s",
        "call of RECV_F0.1<0: 250 ms to 1.00 s",
        "call of SEND_B0.1>0: 3.25 s to 4.00 s",
    ]
    assert wide(calls) == pytest.approx(1230 * 4 * 0.75 / 5, abs=0.1)
    events = json.loads(to_chrome(comparison))["traceEvents"]
    assert [e["dur"] for e in events if e.get("cat") == TRANSFER[0]] == pytest.approx([0.75e6] * 4)


def test_of_several_replicas_the_slowest_is_drawn_and_all_are_in_the_trace_and_the_table() -> None:
    plan = make_plan(dp=2)
    fast, slow = as_run(plan), as_run(plan, slower=1.5)
    both = Step(fast.records[:4] + slow.records[4:], slow.tails)
    comparison = compare(plan, profile(plan, both))
    svg = to_svg(comparison)
    assert "pipeline 1 of 2, the slowest" in svg
    assert [rank for rank in range(8) if f">rank {rank}<" in svg.split(">measured<")[1]] == [4, 5, 6, 7]
    events = json.loads(to_chrome(comparison))["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X" and event["pid"] == 1} == set(range(8))
    assert all(f"rank {rank} plan" in " ".join(said(table(comparison)).split()) for rank in range(8))


def test_the_trace_has_two_processes_and_nothing_overlaps() -> None:
    plan = make_plan(schedule="zb-h1")
    made = to_chrome(compare(plan, profile(plan, as_run(plan, slower=2, late=0.01, after=0.5))))
    events = json.loads(made)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "planned step", 1: "measured step"}
    for pid in names:
        for rank in range(4):
            lasting = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, rank)]
            lasting.sort(key=lambda e: e["ts"])
            assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(lasting))
            assert [Action.parse(e["name"]) for e in lasting if e["cat"] not in ("wait", "optimizer")] == list(
                schedule_of(plan).orders[rank]
            )
            assert {e["cat"] for e in lasting} >= {"wait"} | ({"optimizer"} if pid else set())


def said(renderable: Any) -> str:
    out = StringIO()
    Console(file=out, width=120).print(renderable)
    return out.getvalue()


def test_the_table_adds_up() -> None:
    plan = make_plan(schedule="zb-h1")
    lines = said(table(compare(plan, profile(plan, as_run(plan, slower=1.1, late=0.01, after=0.02))))).splitlines()
    names = next(line.split() for line in lines if "forward" in line)
    assert names == "forward recompute backward weights wait transfer other bubble after".split()
    for step in ("plan", "real"):
        cells = [line.split(f" {step} ")[1].split() for line in lines if f" {step} " in line[:14]]
        assert len(cells) == 5  # four ranks and their mean
        for row in cells:
            parts = dict(zip(names, (0.0 if cell == "-" else float(cell) for cell in row), strict=True))
            computing = sum(parts[name] for name in ("forward", "recompute", "backward", "weights"))
            assert computing + parts["bubble"] == pytest.approx(100, abs=0.3)
            assert (parts["other"] > 0) == (parts["after"] > 0) == (step == "real")


# From the command line.


def test_a_profile_is_drawn_below_its_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan()
    profile(plan, as_run(plan, slower=1.2, after=0.003)).save("profile.json")
    out = run(capsys, "timeline", "plan.json", "--measured", "profile.json", "-o", "t.svg")
    for part in ("1.20 times the plan", "bubble", "recompute", "transfer", "wait", "wrote t.svg"):
        assert part in out
    assert "measured" in Path("t.svg").read_text(encoding="utf-8")
    run(capsys, "timeline", "plan.json", "--measured", "profile.json", "-o", "t.json")
    assert json.loads(Path("t.json").read_text(encoding="utf-8"))["traceEvents"]


def test_a_profile_that_is_not_the_plans_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan()
    good = profile(plan, as_run(plan))
    good.save("good.json")
    profile(other := make_plan(micro_batches=4), as_run(other)).save("other.json")
    replace(good, steps=tuple(step[:2] for step in good.steps), tails=((9.0, 9.0),)).save("few.json")
    swapped = (good.steps[0][1], good.steps[0][0], *good.steps[0][2:])
    replace(good, steps=(swapped,)).save("swapped.json")
    asked = ("timeline", "plan.json", "--measured")
    told = refused(capsys, *asked, "other.json")
    assert f"the profile is of plan {other.digest[:12]}, but this plan is {plan.digest[:12]}" in told
    assert "the profile has 2 ranks, but dp=1 x pp=4 x tp=1 has 4" in refused(capsys, *asked, "few.json")
    assert "rank 0 did F0.1 where the plan says F0.0" in refused(capsys, *asked, "swapped.json")
    assert "there is no profile 'nowhere.json'" in refused(capsys, *asked, "nowhere.json")
    assert "plan.json: this is not a profile" in refused(capsys, *asked, "plan.json")
    assert "--chunks has no meaning beside --measured" in refused(capsys, *asked, "good.json", "--chunks", "2")
    assert "name the plan file" in refused(capsys, "timeline", "--measured", "good.json")
    assert not Path("timeline.svg").exists()
