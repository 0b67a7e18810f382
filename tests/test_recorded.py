"""Profiles: what was measured adds up, survives its file, and is refused where it was damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from merak_like.partitioner import planner
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.recorded import Record, Recorded, Step, shares
from merak_like.partitioner.report.compare import planned_step
from merak_like.partitioner.schedules.action import Action, Schedule, chain
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.scp import scp
from merak_like.partitioner.schedules.zb_v import zb_v
from merak_like.partitioner.simulator import Costs, StageCosts, simulate
from tests.graphs import gpt
from tests.plans import make_plan
from tests.profiles import as_run, profile

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
    assert planned_step(made, schedule_of(made)).makespan == pytest.approx(made.pipeline_seconds)


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
