"""A run that is stopped and goes on is the run that was never stopped: weights, losses, looks, the best, the log."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from merak_like.runtime.checkpoint.folder import CheckpointError, candidates
from merak_like.trainer.journal import up_to
from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import Checkpoints, Optimizer, Training
from tests.ranks import Call, Node, bare, free_port, torchrun
from tests.trainer_lives import SAMPLES, STEPS, At, asked, left, loss, model, trainer


class Killed(Exception):
    """In place of a process's end."""


def killed() -> None:
    """End without a word."""
    raise Killed


def told() -> None:
    """As a scheduler does it."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run leaves that nobody stopped."""
    one = trainer(tmp_path_factory.mktemp("undisturbed"))
    one.train()
    found = left(one)
    one.close()
    assert [line["step"] for line in found[2]] == [4, 5, 8, 10, 12, 12]
    return found


@pytest.mark.parametrize(
    ("at", "background"),
    [(7, True), *(pytest.param(at, b, marks=pytest.mark.slow) for at in (1, 4, 7, 11) for b in (False, True))],
)
def test_a_killed_run_goes_on_from_its_newest_checkpoint(
    at: int, background: bool, tmp_path: Path, undisturbed: Any
) -> None:
    more: dict[str, Any] = {"checkpoints": Checkpoints.model_validate({"every": 3, "best": True, "async": background})}
    first = trainer(tmp_path, At(at, killed), **more)
    with pytest.raises(Killed):
        first.train()
    first.engine.saved()
    second = trainer(tmp_path, **more)
    second.train(resume="auto")
    assert left(second) == undisturbed
    assert second.state.history[0]["step"] == 4
    second.close()


@pytest.mark.parametrize(("moment", "at"), [("step", 6), ("look", 8), ("last look", 12)])
def test_a_run_that_is_told_to_end_saves_and_goes_on(moment: str, at: int, tmp_path: Path, undisturbed: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    first = trainer(tmp_path, *([] if "look" in moment else [At(at, told)]))
    if "look" in moment:  # the step knows nothing yet: it is told in the midst of the evaluation
        evaluate, seen = first.engine.evaluate, iter(range(100))

        def interrupted(*batch: Any, **more: Any) -> Any:
            if next(seen) == 2 * (at // 4 - 1):
                told()
            return evaluate(*batch, **more)

        first.engine.evaluate = interrupted  # type: ignore[method-assign]
    first.train()
    assert first.interrupted
    assert first.state.owed == ("look" in moment)
    # A callback runs when the step has asked the others: it is the next step that knows.
    assert first.state.step == (at if "look" in moment else at + 1)
    assert signal.getsignal(signal.SIGTERM) == before  # whoever forgets to close can be ended
    first.close()
    second = trainer(tmp_path)
    second.train(resume=True)
    assert not second.interrupted
    assert left(second) == undisturbed
    second.close()


def test_a_signal_before_the_first_step_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merak_like.trainer import assembly

    make = assembly.auto_parallel
    monkeypatch.setattr(assembly, "auto_parallel", lambda *a, **k: (told(), make(*a, **k))[1])
    one = trainer(tmp_path)
    one.train()
    assert (one.interrupted, one.state.step) == (True, 1)
    one.close()


def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, undisturbed: Any) -> None:
    first = trainer(tmp_path, At(10, killed))
    with pytest.raises(Killed):
        first.train()
    (tmp_path / "checkpoints/step-00000009/job.pt").write_bytes(b"")
    second = trainer(tmp_path)
    second.train(resume=True)
    assert left(second) == undisturbed
    assert [path.name for path in (tmp_path / "checkpoints-1").iterdir()] == ["step-00000009"]
    for path in (tmp_path / "checkpoints").glob("step-*/job.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        trainer(tmp_path).train(resume="auto")


def test_going_back_sets_the_later_ones_aside_and_another_run_is_left_alone(tmp_path: Path, undisturbed: Any) -> None:
    one = trainer(tmp_path / "one", checkpoints=Checkpoints(every=3, best=True, keep=None))
    one.train()
    made = sorted(path.name for path in (tmp_path / "one/checkpoints").iterdir())
    assert made == [f"step-{n:08d}" for n in sorted({3, 4, 6, 8, 9, 12} & {3, 6, 9, 12, *best_steps(one)})]
    for resume, folder in ((tmp_path / "one/checkpoints/step-00000006", "one"), (tmp_path / "one", "two")):
        again = trainer(tmp_path / folder)
        again.train(resume=resume)
        weights, state, lines = left(again)
        assert (weights, state) == undisturbed[:2]
        assert lines == (undisturbed[2] if folder == "one" else [])  # the other run has them all
        again.close()
    assert (tmp_path / "one/checkpoints-1/step-00000009").is_dir()


def best_steps(one: Trainer) -> set[int]:
    """Steps after which the evaluation was better than ever."""
    seen = [(line["step"], line["eval_loss"]) for line in one.state.history if "eval_loss" in line]
    return {int(step) for i, (step, value) in enumerate(seen) if value == min(v for _, v in seen[: i + 1])}


def test_what_cannot_be_gone_on_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*checkpoints to resume from: say checkpoints"):
        trainer(tmp_path).train(resume=True)
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*nowhere"):
        trainer(tmp_path, checkpoints=Checkpoints(resume=tmp_path / "nowhere")).train()
    trainer(tmp_path, training=Training(steps=3, batch=4)).train()
    fewer = Trainer(model(), asked(tmp_path), SAMPLES[:20], SAMPLES[24:], loss_fn=loss)
    with pytest.raises(ValueError, match="was trained on 24 samples, now there are 20"):
        fewer.train(resume=True)
    other = trainer(tmp_path, training=Training(steps=3, batch=4, seed=1))
    with pytest.raises(ValueError, match="pass seed=0 to go on exactly"):
        other.train(resume=True)


def test_more_steps_and_another_optimizer_setting_are_honoured(tmp_path: Path) -> None:
    trainer(tmp_path, training=Training(steps=3, batch=4)).train()
    longer = trainer(tmp_path, optimizer=Optimizer(lr=0.01, weight_decay=0.5))
    longer.train(resume=True)
    assert longer.state.step == STEPS
    assert longer.engine.optimizer is not None
    assert longer.engine.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_lines_of_steps_that_are_done_again_are_taken_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 3}\n{"step": 2, "skipped": 1}\n{"step": 2, "lo')
    up_to(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2, "skipped": 1}\n'


# ---------------------------------------------------------------------------------------------------- in many processes


def call(function: str, dp: int | str, pp: int, folder: Path, **more: Any) -> Call:
    """A function of tests.trainer_lives."""
    words = [function, folder.name, f"{dp}x{pp}"]
    return Call("-".join(words), f"tests.trainer_lives:{function}", {"dp": dp, "pp": pp, "folder": str(folder), **more})


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference of any number; AssertionError where what was left differs in kind."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        return max((apart(ours[key], theirs[key]) for key in theirs), default=0.0)
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        return max((apart(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    return abs(ours - theirs) if isinstance(theirs, float) else float(ours != theirs)


@pytest.mark.ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("dp", "pp"), [pytest.param(*degrees, marks=pytest.mark.slow) for degrees in ((2, 1), (1, 2), (2, 2))]
)
def test_another_layout_goes_on_replays_nothing_and_skips_nothing(
    dp: int, pp: int, tmp_path: Path, undisturbed: Any
) -> None:
    first = trainer(tmp_path / "one", At(8, killed))
    with pytest.raises(Killed):
        first.train()
    one = call("go_on", dp, pp, tmp_path, resume=str(tmp_path / "one"))
    weights, state, lines = torchrun([one], dp * pp).results(one.name)[0]
    assert state["position"] == undisturbed[1]["position"] == 4 * STEPS
    assert apart([weights, state], undisturbed[:2]) <= 1e-10
    assert apart(lines, undisturbed[2][2:]) <= 1e-10  # a folder of its own


@pytest.mark.ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize("told", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_rank_that_is_told_to_end_lets_all_save_the_same_step(told: int, tmp_path: Path) -> None:
    with bare([call("until_told", 1, 2, tmp_path)], 2) as running:
        running.until("working")
        running.kill(told, signal.SIGTERM)
        running.wait(range(2), 60)
        assert [running.code(rank) for rank in range(2)] == [0, 0], running.read(0).stderr[-2000:]
        said = {path.suffix for path in running.folder.glob("*.step-*")}
    newest = candidates(tmp_path / "checkpoints")[0]
    assert said == {f".step-{int(newest.name.removeprefix('step-'))}"}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_second_run_of_a_script_that_is_started_again_goes_on(tmp_path: Path) -> None:
    """It began anew: the first run had told the job that these processes had begun."""
    node = Node(options=(*Node().options, "--max-restarts=1"))
    one = call("two_runs", 1, 2, tmp_path)
    assert torchrun([one], 2, nodes=[node], timeout=200).results(one.name)[0] == [STEPS, STEPS]
    for name in "ab":
        last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["train_steps"] < STEPS, f"{name} began anew"
        assert not list((tmp_path / name).glob("metrics-*"))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_every_way_to_spread_is_the_same_run(tmp_path: Path) -> None:
    calm = trainer(tmp_path / "calm", drop=0.0)
    calm.train()
    ways: list[dict[str, Any]] = [{"zero": 3}, {"zero": 2, "fuse": False}]
    calls = [call("spread", 2, 1, tmp_path / str(n), **way) for n, way in enumerate(ways)]
    job = torchrun(calls, 2, timeout=200)
    for one in calls:
        assert apart(job.results(one.name)[0], list(left(calm))) <= 1e-10, one


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(500)
@pytest.mark.parametrize("deaths", [1, 3])
def test_a_run_killed_again_and_again_ends_as_if_undisturbed(deaths: int, tmp_path: Path) -> None:
    """SIGKILL of a random rank at a random moment; torchrun starts all again, and nobody has to say resume."""
    node = Node(options=(*Node().options, f"--max-restarts={deaths}"))
    one = call("survivor", 1, 2, tmp_path / "disturbed", steps=60, deaths=deaths)
    disturbed = torchrun([one], 2, nodes=[node], timeout=240).results(one.name)[0]
    two = call("survivor", 1, 2, tmp_path / "calm", steps=60, deaths=0)
    assert disturbed == torchrun([two], 2).results(two.name)[0]
    assert not [path for path in (tmp_path / "disturbed").iterdir() if path.name.startswith("metrics-")]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(500)
def test_a_job_that_loses_a_node_goes_on_with_other_degrees(tmp_path: Path) -> None:
    calm = trainer(tmp_path / "calm", drop=0.0)
    calm.train()
    conf = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    both = ("--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--max-restarts=3")
    nodes = [
        Node(options=(*both, f"--rdzv-conf=is_host=true,{conf}")),
        Node(options=(*both, f"--rdzv-conf=is_host=false,{conf}"), environment={"LOST": "1"}),
    ]
    one = call("fewer", "auto", 1, tmp_path / "lost")
    job = torchrun([one], 4, nodes=nodes, timeout=230)
    said = job.ranks[0].said
    assert one.name in said, job.output[-3000:] + job.ranks[0].stderr[-3000:]
    assert not said[one.name].error
    found, replicas = said[one.name].value
    assert replicas == 2
    last = json.loads((tmp_path / "lost/metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_steps"] < STEPS, "it began anew"
    assert apart(found, list(left(calm))) <= 1e-10


def test_a_run_with_an_optimizer_of_its_own_goes_on(tmp_path: Path) -> None:
    def own(*callbacks: Any) -> Trainer:
        return Trainer(
            model(0.2), asked(tmp_path, checkpoints=Checkpoints(every=3)), SAMPLES[:24], SAMPLES[24:], loss_fn=loss,
            optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), callbacks=callbacks,
        )  # fmt: skip

    first = own(At(7, killed))
    with pytest.raises(Killed):
        first.train()
    first.engine.saved()
    second = own()
    second.train(resume="auto")
    assert second.state.step == STEPS
    second.close()
