"""A measured step below its plan: the picture, the trace, the table, and which profiles are refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.recorded import Record, Step, shares
from merak_like.partitioner.report.compare import compare, planned_step, table, to_chrome, to_svg
from merak_like.partitioner.report.lanes import AFTER, TRANSFER, WAIT, WIDTH
from merak_like.partitioner.schedules.action import Action
from tests.commands import refused, run
from tests.plans import make_plan
from tests.profiles import as_run, profile


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
