"""`merak simulate` and `merak timeline`: their numbers, the picture, the trace, and how they say no."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from merak_like.cli.pipelines import parse_costs
from merak_like.partitioner.report.timeline import to_chrome, to_svg
from merak_like.partitioner.schedules import AS_DATA
from merak_like.partitioner.schedules.action import Action, chain
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.scp import scp
from merak_like.partitioner.schedules.zb_v import zb_v
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from merak_like.partitioner.trial import NAMES, Pipeline, pipeline_of, try_out
from tests.commands import refused, run
from tests.plans import make_plan

SCP = "simulate --schedule scp --stages 4 --micro-batches 8 --costs F=1,R=1,B=2".split()


# The command line.


def test_one_schedule_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, *SCP, "--json"))
    assert sorted(data) == ["bubble", "makespan", "orders", "peak"]
    assert (data["makespan"], data["peak"]) == (38, [4, 3, 3, 1])
    orders = tuple(tuple(Action.parse(word) for word in order) for order in data["orders"])
    assert orders == scp(4, 8).orders
    said = run(capsys, *SCP)
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["makespan", "bubble", "peak", "orders"]
    assert "makespan  38\n" in said


@pytest.mark.parametrize(
    ("schedule", "makespan"),
    [("1f1b", 44), ("hidden-recompute", 41), ("last-keeps", 40), ("early-recompute", 39), ("scp", 38), ("auto", 38)],
)
def test_the_ladder_from_the_command_line(schedule: str, makespan: float, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SCP[:2], schedule, *SCP[3:], "--memory", "4", "--json"]
    assert json.loads(run(capsys, *arguments))["makespan"] == makespan


def test_all_schedules_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--stages", "4", "--micro-batches", "8", "--costs", "F=1,B=1,W=1,C=0.1", "--memory", "4")
    said = run(capsys, "simulate", *few)
    assert [line.split()[0] for line in said.splitlines()[1 : len(NAMES) + 1]] == list(NAMES)
    assert "rank 0 is too full" in said
    assert re.search(r"auto .* (no order of these stages is faster|at most [\d.]+ % above the fastest order)", said)
    data = json.loads(run(capsys, "simulate", *few, "--json"))
    assert list(data) == list(NAMES)
    assert data["auto"]["makespan"] <= min(data[name]["makespan"] for name in ("1f1b", "zb-h1"))


def test_a_plan_is_compared_under_all_schedules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, "simulate", "plan.json", "--json"))
    pipeline = pipeline_of(make_plan())
    assert data["1f1b"]["makespan"] == try_out("1f1b", pipeline).timeline.makespan
    assert data["auto"]["makespan"] <= data["zb-h1"]["makespan"] <= data["1f1b"]["makespan"]
    assert " ms " in run(capsys, "simulate", "plan.json", "--schedule", "1f1b,zb-h1")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--stages", "4"), "without a plan, --micro-batches must be given"),
        (("--stages", "0", "--micro-batches", "1"), "got 0 and 1"),
        (("--stages", "4", "--micro-batches", "8", "--schedule", "spc"), "unknown schedule 'spc': did you mean 'scp'"),
        (("--stages", "2", "--micro-batches", "8", "--costs", "F=1,X=2"), "unknown cost 'X'"),
        (("--stages", "2", "--micro-batches", "8", "--costs", "F=one"), "'F=one' is no cost"),
        (("--stages", "2", "--micro-batches", "8", "--costs", "F=-1"), "finite and not negative"),
        (("--stages", "2", "--micro-batches", "8", "--costs", "F=1/2/3"), "F has 3 numbers for 2 stages"),
        (("--stages", "2", "--micro-batches", "8", "--recompute", "0,7"), "'7' is none of the stages 0 to 1"),
        (("--stages", "2", "--micro-batches", "8", "--memory", "0"), "at least one micro-batch"),
        (("plan.json", "--stages", "2"), "--stages 2 has no meaning for a plan"),
        (
            ("--stages", "4", "--micro-batches", "8", "--schedule", "zb-h2", "--memory", "4"),
            "zb-h2 holds 7 micro-batches on rank 0, more than the 4 that fit",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    arguments: tuple[str, ...], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refused(capsys, "simulate", *arguments)


def test_no_picture_needs_torch() -> None:
    for module in ("cli.simulate", "cli.timeline", "partitioner.report.compare"):
        probe = f"import sys, merak_like.{module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


# Trials.


def test_costs_may_differ_between_ranks() -> None:
    costs = parse_costs("F=1/2, B=4,R=0.5,C=0.25", 2)
    assert costs == Costs((StageCosts(1, 4, 0.5), StageCosts(2, 4, 0.5)), {(0, 1): 0.25})


@pytest.mark.parametrize("name", AS_DATA)
def test_several_stages_of_a_rank_share_its_work(name: str) -> None:
    costs = Costs(
        (StageCosts(1, 2, 0.5, 1), StageCosts(2, 3, 0, 1), StageCosts(1, 1, 0.5, 1)), {(0, 1): 0.1, (1, 2): 0.3}
    )
    trial = try_out(name, Pipeline(costs, 6, chain(3), live=(6, 6, 6)))
    spare = {"last-keeps": 0.5, "early-recompute": 0.5, "scp": 0.5}.get(name, 0)
    for rank, work in enumerate((4.5, 6, 3.5 - spare)):
        busy = trial.timeline.makespan * (1 - trial.timeline.rank_bubble[rank])
        assert busy == pytest.approx(6 * work)
    for (a, b), seconds in trial.costs.transfer.items():
        pair = sorted((trial.schedule.stage_rank[a], trial.schedule.stage_rank[b]))
        assert seconds == {(0, 1): 0.1, (1, 2): 0.3}.get((pair[0], pair[1]), 0.3)
    assert max(trial.peak_live) <= 6


def test_which_stages_recompute_can_be_said() -> None:
    pipeline = Pipeline(parse_costs("F=1,R=1,B=2", 4), 8, chain(4), recomputes=frozenset({0}))
    for name in NAMES:
        schedule = try_out(name, pipeline).schedule
        recomputing = schedule.recomputes | {stage for _, stage in schedule.apart(Action.parse("R0.0").kind)}
        assert {schedule.stage_rank[stage] for stage in recomputing} == {0}


# The picture and the trace.


def test_the_picture_has_a_box_for_each_action_and_stands_alone() -> None:
    schedule = zb_v(4, 12)
    cost = StageCosts(0.5, 0.5, weight=0.5)
    timeline = simulate(schedule, Costs((cost,) * 8))
    svg = to_svg(schedule, timeline, title="zb-v <4 & 12>")
    root = ElementTree.fromstring(svg)
    boxes = [box for box in root.findall(".//{*}rect") if box.get("class") == "step"]
    assert len(boxes) == sum(len(order) for order in schedule.orders)
    assert sum(float(box.get("width", 0)) for box in boxes) == pytest.approx(
        sum(end - start for row in timeline.entries for _, start, end in row) * 1230 / timeline.makespan, rel=1e-3
    )
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|href|url\(|@import|<script", svg)
    assert "forward of micro-batch 0 on stage 7: 3.5 to 4" in svg
    assert "8 alive" in svg
    assert "37.5 a step" in svg


def test_a_backward_with_its_recompute_says_so() -> None:
    timeline = simulate(scp(4, 8), Costs((StageCosts(1, 2, 1),) * 4))
    svg = to_svg(scp(4, 8), timeline, title="scp")
    assert "recompute and backward of micro-batch 0 on stage 0: 10 to 13" in svg
    assert ">backward of micro-batch 0 on stage 1: 8 to 10" in svg


def test_the_trace_says_what_the_timeline_says() -> None:
    schedule = one_f_one_b(3, 4)
    timeline = simulate(schedule, Costs((StageCosts(0.001, 0.002),) * 3))
    events = json.loads(to_chrome(schedule, timeline))["traceEvents"]
    drawn = [(e["tid"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
    said = [
        (rank, str(action), pytest.approx(1e6 * start), pytest.approx(1e6 * end))
        for rank, row in enumerate(timeline.entries)
        for action, start, end in row
    ]
    assert drawn == said
    counted = [max(e["args"]["micro-batches"] for e in events if e["name"] == f"live on rank {r}") for r in range(3)]
    assert counted == [3, 2, 1]
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"][1] == "rank 1 (stage 1)"


def test_a_timeline_is_written_for_a_plan_and_without_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "timeline", "plan.json", "-o", "plan.svg")
    assert "GPT2LMHeadModel, 1f1b" in Path("plan.svg").read_text(encoding="utf-8")
    run(capsys, "timeline", "plan.json", "--schedule", "zb-v", "-o", "new/t.json")
    assert json.loads(Path("new/t.json").read_text(encoding="utf-8"))["traceEvents"]
    run(capsys, "timeline", "--stages", "2", "--micro-batches", "3", "--memory", "2")
    assert ">auto<" in Path("timeline.svg").read_text(encoding="utf-8")
    assert "ends in .svg or .json" in refused(capsys, "timeline", "plan.json", "-o", "t.png")
    assert "one schedule, not 'all'" in refused(capsys, "timeline", "plan.json", "--schedule", "all")
