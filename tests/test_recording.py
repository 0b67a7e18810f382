"""``engine.profile()``: every action is recorded, in order, with its wait; evaluation and other steps are not."""

from __future__ import annotations

from pathlib import Path

from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.recorded import Recorded, shares
from tests.rich import rich_plan
from tests.scenarios import PARTS, SAMPLES
from tests.training import engine, subject


def test_profile_holds_the_steps_inside_and_trains_as_ever(tmp_path: Path) -> None:
    one = subject("gpt2")
    batch = one.batch(SAMPLES)
    plan = rich_plan(one, batch, 1, 1, PARTS, "zb-v", "part")
    plain, ours = (engine(one, batch, 1, 1, PARTS, plan=plan) for _ in range(2))
    losses = [plain.step(batch).loss for _ in range(4)]
    found = [ours.step(batch).loss]
    with ours.profile() as profile:
        found.append(ours.step(batch).loss)
        ours.evaluate(batch)
        found.append(ours.step(batch).loss)
    found.append(ours.step(batch).loss)
    assert found == losses
    plain.close()
    ours.close()
    assert profile.recorded is not None
    assert len(profile.recorded.steps) == 2
    assert profile.recorded.plan == plan.digest
    for index in range(2):
        step = profile.recorded.step(index)
        assert [tuple(r.action for r in rank) for rank in step.records] == list(schedule_of(plan).orders)
        (parts,) = shares(step)
        assert min(parts.forward, parts.backward, parts.weight, parts.after) > 0 == parts.wait
        assert parts.computing > 0.5 * step.makespan
    profile.save(str(tmp_path / "profile.json"))
    assert Recorded.load(tmp_path / "profile.json") == profile.recorded
