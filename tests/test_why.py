"""Why a plan is as it is: every number is what simulating or planning that choice gives."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from merak_like.partitioner.explain.again import Again, plan_again
from merak_like.partitioner.explain.losses import CAUSES, Played, losses_of
from merak_like.partitioner.explain.runners_up import runners_up
from merak_like.partitioner.explain.why import Why, next_cut, why
from merak_like.partitioner.hardware import Link
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.report.reasons import says
from tests import golden
from tests.commands import refused, run
from tests.explained import explained
from tests.plans import make_plan

ROOT = Path(__file__).resolve().parents[1]
SLOW = Link(1e7, 1e-3)
SCHEDULES = ("1f1b", "gpipe", "zb-h1", "zb-v", "interleaved", "auto")


@pytest.fixture(scope="module")
def tight() -> Why:
    return why(explained(share=0.85))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_causes_add_up_to_the_step(schedule: str):
    plan = explained(schedule=schedule)
    judged = Again.of(plan).judged
    assert judged.timeline.makespan == pytest.approx(plan.pipeline_seconds, rel=1e-12)
    losses = losses_of(plan)
    assert losses.outside == pytest.approx(sum(plan.after.values()))
    assert losses.step == pytest.approx(plan.step_seconds)
    assert losses.work > 0
    assert losses.bubble > 0


def test_each_cause_is_there_where_it_is_made():
    """An ideal pipeline loses only its bubble; each cause appears when it is brought in."""
    plan = explained()
    assert Played.of_judged(Again.of(explained(share=0.85)).judged).losses.recompute > 0
    assert Played.of_judged(Again.of(explained(link=SLOW)).judged).losses.largest == "transfers"
    assert Played.of_judged(Again.of(plan).judged).losses.recompute == 0
    late = replace(plan, after={"optimizer": 1.0}, basis=None)
    assert why(late).losses.outside == pytest.approx(1.0, abs=plan.pipeline_seconds)
    assert why(late).resource == "outside"


def test_the_stages_of_the_path_make_the_step(tight: Why):
    path = sum(one.seconds for one in tight.path) + sum(seconds for *_, seconds in tight.links)
    assert path == pytest.approx(tight.step_seconds - tight.losses.outside)
    assert tight.path[tight.binding_stage].seconds == max(one.seconds for one in tight.path)


@pytest.mark.parametrize("share", [1.0, 0.85])
@pytest.mark.parametrize("border", [1, 2])
def test_the_next_best_cut_is_the_best_of_all_others(border: int, share: float):
    again = Again.of(explained(share=share))
    starts = again.starts
    steps: dict[int, float] = {}
    for place in range(starts[border - 1] + 1, starts[border + 1]):
        judged = again.judge((*starts[:border], place, *starts[border + 1 :]))
        if place != starts[border] and judged is not None:
            steps[place] = judged.timeline.makespan + sum(again.plan.after.values())
    found = next_cut(again, border)
    assert found.step_seconds == pytest.approx(min(steps.values()))
    assert steps[starts[border] + found.moved] == pytest.approx(min(steps.values()))
    assert found.tried <= len(range(starts[border - 1] + 1, starts[border + 1]))


def test_a_hand_made_cut_is_told_what_it_costs():
    plan = explained()
    again = Again.of(plan)
    other = again.starts[1] + 1
    moved = int(again.problem.positions[other]) - 1  # an op in the middle of something
    stages = (replace(plan.stages[0], stop=moved), replace(plan.stages[1], start=moved), *plan.stages[2:])
    edited = Again.of(replace(plan, stages=stages))
    assert edited.judged.timeline.makespan >= plan.pipeline_seconds
    assert next_cut(edited, 1).step_seconds is not None


def test_other_choices_are_what_planning_them_gives(tight: Why):
    plan = explained(share=0.85)
    choices = {one.what: one for one in tight.choices}
    none = choices["nothing computed again"]
    assert not none.fits
    assert none.rank_bytes > plan.memory_limit
    assert none.step_seconds is not None
    assert none.step_seconds < plan.step_seconds
    for schedule in ("gpipe", "zb-v", "interleaved"):
        try:
            best = plan_again(plan, schedule=schedule).step_seconds
        except ValueError:
            assert choices[f"schedule {schedule}"].step_seconds is None
            continue
        found = choices[f"schedule {schedule}"].step_seconds
        assert found is None or found >= best * (1 - 1e-9), "searched quickly, never better than the best"
    more = choices["9 micro-batches of 2"]
    assert more.samples == 18
    assert more.step_seconds == pytest.approx(plan_again(plan, batch=18, micro_batches=9).step_seconds, rel=0.02)


def test_other_degrees_are_tried_where_the_plan_has_none():
    found = {(one.dp, one.pp): one for one in runners_up(explained(pp=2, dp=2), Again.of(explained(pp=2, dp=2)))}
    assert set(found) == {(1, 4), (4, 1)}
    plan = plan_again(explained(pp=2, dp=2), mesh=Mesh(1, 4), micro_batches=16)
    assert found[1, 4].step_seconds == pytest.approx(plan.step_seconds, rel=0.25)
    assert found[1, 4].why


def test_alternatives_that_a_plan_carries_are_read_however_they_are_written():
    @dataclass(frozen=True)
    class Row:
        mesh: Mesh
        step_seconds: float
        reason: str

    class Carrying:
        mesh = Mesh(1, 3)
        alternatives: Any = (
            Row(Mesh(2, 2), 0.5, "waits more"),
            {"dp": 4, "pp": 1, "step_seconds": None, "why": "no room"},
            Row(Mesh(1, 3), 0.4, "itself"),
            "nonsense",
        )

    found = runners_up(Carrying(), None)  # pyright: ignore[reportArgumentType]
    assert [(one.dp, one.pp, one.step_seconds, one.why) for one in found] == [
        (2, 2, 0.5, "waits more"),
        (4, 1, None, "no room"),
    ]


def test_what_binds_is_said():
    told = " ".join(says(why(explained(link=SLOW))))
    assert "waiting for the links takes most" in told
    assert "binds" in told


def test_a_plan_that_does_not_hold_what_it_was_made_from_tells_what_its_stages_do():
    found = why(make_plan())
    assert not found.next_cuts
    assert "does not hold" in found.untold
    assert {one.what for one in found.choices} == {"7 micro-batches of 8", "9 micro-batches of 8"}


def test_why_needs_no_torch(tmp_path: Path):
    explained(share=0.85).save(tmp_path / "plan.json")
    commands = [["why", "plan.json"], ["what-if", "plan.json", "--batch", "32"], ["diff", "plan.json", "plan.json"]]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from merak_like.cli import main\n"
        f"for command in {commands!r}:\n"
        "    try: main(command)\n"
        "    except SystemExit as end: assert not end.code\n"
        "    assert 'torch' not in sys.modules, command\n"
        "    print('ran', command[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert all(f"\nran {command}\n" in done.stdout for command, *_ in commands)


def test_the_words_and_numbers_of_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    explained(share=0.85).save(tmp_path / "plan.json")
    golden.same_as("why.txt", run(capsys, "why", str(tmp_path / "plan.json")))
    golden.same_numbers("why.json", json.loads(run(capsys, "why", str(tmp_path / "plan.json"), "--json")))


def test_an_edited_plan_is_refused_unless_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "plan.json"
    path.write_text(explained().to_json().replace('"micro_batches": 8', '"micro_batches": 7', 1))
    assert "--edited" in refused(capsys, "why", str(path))
    assert "7" in run(capsys, "why", str(path), "--edited")


def test_causes_are_told_in_the_order_of_the_words():
    assert CAUSES == ("work", "bubble", "imbalance", "recompute", "transfers", "outside")
