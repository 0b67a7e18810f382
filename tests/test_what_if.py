"""Two plans compared, a plan under other conditions, and constants corrected by measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from merak_like.partitioner.after import stepped_bytes
from merak_like.partitioner.basis import Basis
from merak_like.partitioner.explain.again import Again, basis_of, plan_again
from merak_like.partitioner.explain.calibration import calibrate
from merak_like.partitioner.explain.conditions import Conditions, trace_again, what_if
from merak_like.partitioner.explain.difference import difference
from merak_like.partitioner.explain.losses import CAUSES, Played
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import costs_of
from merak_like.partitioner.recorded import Record, Recorded, Step
from merak_like.partitioner.report.text import change_text, parse_rate
from merak_like.partitioner.schedules.action import Action
from tests import golden
from tests.commands import refused, run
from tests.explained import explained
from tests.graphs import TOY
from tests.plans import make_plan
from tests.profiles import as_run, profile

# Differences.


def test_a_plan_does_not_differ_from_itself():
    found = difference(explained(), explained())
    assert found.same
    assert not found.decided


def test_what_differs_is_named_and_weighed_alone():
    first, second = explained(), explained(share=0.85)
    found = {one.what: one for one in difference(first, second).decided}
    assert set(found) == {"memory limit", "recompute, stage 0", *({"cuts"} if first.starts != second.starts else ())}
    limit = found["memory limit"].alone
    changed = Again.of(replace(first, memory_limit=second.memory_limit)).judged.timeline.makespan
    assert limit == pytest.approx(changed + sum(first.after.values()))
    assert limit is not None
    assert limit >= second.step_seconds, "the second plan is the best for its limit"


def test_the_causes_of_both_steps_make_the_difference():
    found = difference(explained(), explained(schedule="zb-h1"))
    before, after = found.losses
    change = sum(getattr(after, cause) - getattr(before, cause) for cause in CAUSES)
    assert change == pytest.approx(found.step_seconds[1] - found.step_seconds[0])
    assert found.losses[1].bubble < found.losses[0].bubble


def test_plans_without_what_they_were_made_from_are_compared_by_what_they_say():
    found = difference(make_plan(pp=4), make_plan(pp=2, dp=2))
    assert [one.what for one in found.decided][:1] == ["degrees"]
    assert all(one.alone is None for one in found.decided)


def test_the_words_and_numbers_of_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    explained().save(tmp_path / "a.json")
    explained(share=0.85).save(tmp_path / "b.json")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    golden.same_as("diff.txt", run(capsys, "diff", *files))
    golden.same_numbers("diff.json", json.loads(run(capsys, "diff", *files, "--json")))
    assert "decide the same" in run(capsys, "diff", files[0], files[0])


# Other conditions.


def test_other_conditions_give_the_plan_that_is_made_for_them():
    plan = explained()
    found = what_if(plan, Conditions(memory=int(0.85 * max(plan.rank_bytes))))
    assert found.planned == plan_again(plan, memory_limit=int(0.85 * max(plan.rank_bytes)))
    assert found.kept_seconds is not None
    assert found.kept_seconds >= found.planned.step_seconds
    assert found.planned.basis is not None
    assert plan_again(found.planned) == found.planned, "what was asked is in it, too"


def test_slower_links_take_longer():
    plan = explained()
    found = what_if(plan, Conditions(bandwidth=1e8))
    assert found.difference.losses[1].transfers > 10 * found.difference.losses[0].transfers
    assert basis_of(found.planned).hardware.intra.bandwidth == 1e8
    assert basis_of(found.planned).hardware.intra.latency == TOY.intra.latency
    far = what_if(plan, Conditions(inter_bandwidth=1e3))
    assert far.planned.step_seconds == plan.step_seconds, "all ranks are on one node"


def test_a_larger_batch_keeps_the_size_of_a_micro_batch():
    found = what_if(explained(), Conditions(batch=64))
    assert found.planned.micro_batch == explained().micro_batch
    assert found.planned.micro_batches == 32
    degrees = what_if(explained(), Conditions(pp=2, dp=2))
    assert degrees.planned.mesh == Mesh(2, 2)
    assert degrees.kept_why == "other stages are needed"


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "plan.json"
    plan = explained()
    assert plan.basis is not None
    source = {"model": "gpt2", "dtype": "bfloat16"}
    replace(plan, basis=plan.basis.remembering(source)).save(path)
    told = refused(capsys, "what-if", str(path), "--seq", "4096")
    assert "merak plan gpt2 --dtype bfloat16 --dp 1 --pp 3 --tp 1 --batch 16" in told
    assert told.rstrip().endswith("--hardware toy --seq 4096")
    assert "nothing was to be otherwise" in refused(capsys, "what-if", str(path))
    assert "use batch 15 or 18" in refused(capsys, "what-if", str(path), "--dp", "3", "--batch", "16")
    assert "What fits: " in refused(capsys, "what-if", str(path), "--memory", "100kB")
    assert "in seconds" in refused(capsys, "what-if", str(path), "--latency", "-1")
    assert "25GB/s" in refused(capsys, "what-if", str(path), "--bandwidth", "fast")
    assert "can be cut at" in refused(capsys, "what-if", str(path), "--pp", "500", "--batch", "500")
    make_plan().save(path)
    assert "make it again" in refused(capsys, "what-if", str(path), "--batch", "32")
    with pytest.raises(ValueError, match="make it again"):
        trace_again(make_plan())


@pytest.mark.parametrize(
    ("written", "rate"),
    [("25GB/s", 25e9), ("25GB", 25e9), ("200Gbit/s", 25e9), ("200Gb/s", 25e9), ("200Gbps", 25e9), ("1.5 MB/s", 1.5e6)],
)
def test_rates_are_read_in_bytes_and_in_bits(written: str, rate: float):
    assert parse_rate(written) == rate


def test_changes_are_told_shortly():
    assert [change_text(*pair) for pair in ((1.031, 1), (0.88, 1), (2.4, 1), (1, 1))] == [
        "+3.1 %", "-12.0 %", "2.4 times", "0.0 %"
    ]  # fmt: skip


def test_the_words_and_numbers_of_what_if(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(tmp_path / "plan.json")
    explained().save(path)
    asked = ["what-if", path, "--bandwidth", "1GB/s", "--batch", "32"]
    golden.same_as("what-if.txt", run(capsys, *asked))
    golden.same_numbers("what-if.json", json.loads(run(capsys, *asked, "--json")))
    run(capsys, *asked, "-o", str(tmp_path / "other.json"))
    assert Plan.load(tmp_path / "other.json").micro_batches == 16


# Calibration.

TRUTH = replace(TOY, name="truth", efficiency=0.4, memory_bandwidth=5e11, launch_seconds=2e-6)
CLAIMED = replace(TOY, launch_seconds=1e-6)


def measured(plan: Plan, truth: Hardware, noise: float = 0.0) -> Recorded:
    """What an engine would measure of a plan on another machine than it was made for."""
    assert plan.basis is not None
    real = replace(plan, basis=plan.basis.remembering({}, hardware=truth))
    step = Step.planned(Played.of_judged(Again.of(real).judged).timeline)
    step = Step(step.records, tuple(tail + 1e-4 for tail in step.tails))
    return profile(plan, step, step)


def claimed(plan: Plan) -> Plan:
    return plan_again(plan, hardware=CLAIMED)


def test_calibration_finds_the_machine_that_was_measured():
    plan = claimed(explained())
    found = calibrate([(plan, measured(plan, TRUTH))])
    before, after = found.error
    assert before > 0.3
    assert after < 0.02
    assert found.hardware.name == "toy calibrated"
    assert "fitted to 6 measured times" in found.hardware.source
    last = found.rows[-1]
    assert last.what == "the pipeline"
    assert last.after == pytest.approx(last.measured, rel=0.03)


def test_what_was_right_stays():
    plan = claimed(explained())
    found = calibrate([(plan, measured(plan, CLAIMED))])
    for before, after in found.changed.values():
        assert after == pytest.approx(before, rel=1e-3)


def test_calibration_helps_a_plan_that_was_not_measured():
    first, other = claimed(explained()), claimed(explained(pp=2, batch=32, micro_batches=4))
    fitted = calibrate([(first, measured(first, TRUTH))]).hardware
    assert other.basis is not None

    def step(machine: Hardware) -> float:
        basis: Basis = basis_of(other).remembering({}, hardware=machine)
        return Again.of(replace(other, basis=basis)).judged.timeline.makespan

    assert step(fitted) == pytest.approx(step(TRUTH), rel=0.1)
    assert step(CLAIMED) != pytest.approx(step(TRUTH), rel=0.3)


def test_what_the_host_and_the_optimizer_took_is_read():
    """Before the first action, in calls that start transfers, and after the last action."""
    plan = claimed(explained(pp=1))
    found = calibrate([(plan, profile(plan, *2 * [as_run(plan, late=8e-4, after=2e-3)]))])
    assert found.hardware.micro_batch_seconds == pytest.approx(8e-4 / plan.micro_batches)
    assert found.hardware.message_seconds == 0, "there are none"
    stepped = stepped_bytes(plan.mesh, plan.stages[0].memory, 0)
    assert found.hardware.state_bandwidth == pytest.approx(stepped / 2e-3)
    again = plan_again(plan, hardware=found.hardware)
    assert again.after["optimizer"] == pytest.approx(2e-3)
    assert again.after["host"] == pytest.approx(8e-4)


def test_the_optimizer_is_not_told_from_a_sum_over_replicas():
    plan = claimed(explained(pp=1, dp=2))
    found = calibrate([(plan, profile(plan, *2 * [as_run(plan, after=2e-3)]))])
    assert found.hardware.state_bandwidth == 0


def test_a_message_costs_the_host_around_each_pass():
    plan = claimed(explained())
    slower = replace(plan, basis=basis_of(plan).remembering({}, hardware=replace(CLAIMED, message_seconds=1e-4)))
    costs = [Again.of(p).judged.costs.stages for p in (plan, slower)]
    assert [(b.forward - a.forward, b.backward - a.backward) for a, b in zip(*costs, strict=True)] == [
        pytest.approx((each, each)) for each in (1e-4, 2e-4, 1e-4)
    ], "the stage between has two edges"
    told = [(c.forward, c.backward) for c in costs_of(slower).stages]
    assert told == [pytest.approx((c.forward, c.backward)) for c in costs[1]], "the plan alone tells the same"
    calls = [Record(Action.parse("SEND_F0.0>1"), 0.0, 3e-4, 0.0), Record(Action.parse("RECV_B0.0<1"), 3e-4, 4e-4, 0.0)]
    step = as_run(plan, late=1e-3)
    step = Step(((*calls, *step.records[0]), *step.records[1:]), step.tails)
    assert calibrate([(plan, profile(plan, step))]).hardware.message_seconds == pytest.approx(2e-4)


def test_recompute_inside_a_backward_is_not_taken_for_backward():
    plan = plan_again(explained(share=0.85), hardware=CLAIMED)
    found = calibrate([(plan, measured(plan, CLAIMED))])
    assert found.error[0] < 0.02


def test_the_words_and_numbers_of_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = claimed(explained())
    plan.save(tmp_path / "plan.json")
    measured(plan, TRUTH).save(tmp_path / "profile.json")
    files = [str(tmp_path / name) for name in ("plan.json", "profile.json")]
    out = str(tmp_path / "hardware.json")
    told = run(capsys, "calibrate", *files, "-o", out).replace(str(tmp_path), "FOLDER")
    golden.same_as("calibrate.txt", told)
    golden.same_numbers("calibrate.json", json.loads(run(capsys, "calibrate", *files, "--json")))
    assert Hardware.from_json(Path(out).read_text()).name == "toy calibrated"
    assert "give a plan and its profile" in refused(capsys, "calibrate", files[0])
    assert "there is no profile" in refused(capsys, "calibrate", files[0], str(tmp_path / "none.json"))
    explained().save(tmp_path / "other.json")
    assert "give the plan that was run" in refused(capsys, "calibrate", str(tmp_path / "other.json"), files[1])
