"""What goes wrong ends a job soon, on every rank, with one message that names the rank to blame and what to do."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest

from merak_like.runtime.watch import ACTION
from tests.ranks import Bare, Call, Job, bare, torchrun

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

SOON = 30.0
"""Seconds within which the others end."""


def call(function: str, dp: int = 2, pp: int = 2, **more: Any) -> Call:
    """A function of tests.faults on four ranks."""
    return Call(
        "-".join([function, *map(str, more.values())]), f"tests.faults:{function}", {"dp": dp, "pp": pp, **more}
    )


REFUSED = {
    "world": r"dp \* pp \* tp = 3 \* 2 \* 1 = 6, but torchrun started 4 ranks: use torchrun --nproc-per-node 6",
    "stages": r"pp = 4 stages, but Small can be cut at \d places only .*: use pp = \d or fewer",
    "batch": r"a batch of 3 samples cannot be cut into 4 micro-batches \(dp x micro_batches\): use a batch of at",
    "seed": r"the ranks do not agree: seed: rank 2 has 4, the others 3",
    "schedule": r"the ranks do not agree: plan: rank 2 has \w{12}, the others \w{12}\. If all run",
    "clipping": r"the ranks do not agree: max_grad_norm: rank 2 has 2.0, the others 1.0",
    "model": r"the ranks do not agree: plan: rank 2 has",
    "weights": r"do not start from the same weights: rank 2 has its own layers.0.weight \(\d+ differ\): call",
}
NOT_FINITE = {"loss": r"step 1: the loss is nan", "gradient": r"step 1: .* the gradient norm (inf|nan)"}


@pytest.fixture(scope="module")
def job() -> Job:
    """All that leaves the ranks alive, in one job of four."""
    calls = [call("refused", what=what) for what in REFUSED]
    calls += [call("not_a_number", where=where) for where in NOT_FINITE]
    return torchrun([*calls, call("nothing_to_learn"), call("come_apart"), call("all_is_well")], 4)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_on_every_rank(what: str, job: Job) -> None:
    for message in job.results(f"refused-{what}"):
        assert re.search(REFUSED[what], message), message


@pytest.mark.parametrize("where", NOT_FINITE)
def test_number_that_is_not_finite_is_refused_on_every_rank_before_the_weights_change(where: str, job: Job) -> None:
    for (message,) in job.results(f"not_a_number-{where}"):
        assert re.search(NOT_FINITE[where], message), message
        assert message.endswith("the weights are as they were before the step")


def test_rank_whose_weights_are_no_longer_the_others_is_named(job: Job) -> None:
    for said in job.results("come_apart"):
        assert len(said) == 1, "and none before"
        assert re.match(r"after step 2 the ranks do not hold the same weights: rank \d has its own layers", said[0]), (
            said
        )


def test_batch_without_anything_to_learn_is_refused_on_every_rank(job: Job) -> None:
    for batch, share in job.results("nothing_to_learn"):
        assert batch.startswith("the batch has no item to learn from")
        assert share.startswith("a replica has no item to learn from")


def test_ranks_work_on_after_all_these_refusals(job: Job) -> None:
    losses = job.results("all_is_well")
    assert losses == [losses[0]] * 4


def others_end(job: Bare, victim: int, blamed: str) -> None:
    """All but one end within SOON, not with 0, and each with one message that blames and says what to do."""
    others = [rank for rank in range(4) if rank != victim]
    job.wait(others, SOON)
    for rank in others:
        left = job.read(rank)
        assert left.code not in (0, None), rank
        lines = [line for line in left.stderr.splitlines() if "PeerError: " in line]
        assert len(lines) == 1, f"rank {rank} said {left.stderr[-2000:]}"
        assert re.search(rf"PeerError: rank {rank} gave up waiting for .+: {blamed}", lines[0]), lines[0]
        assert lines[0].endswith(ACTION)


@pytest.mark.parametrize(
    ("dp", "pp", "victim", "more"),
    [
        (2, 2, 3, {}), (1, 4, 2, {}), pytest.param(4, 1, 1, {}, marks=pytest.mark.slow),
        pytest.param(4, 1, 2, {"zero": 3}, marks=pytest.mark.slow),  # torch's fully_shard waits inside of the model
    ],
)  # fmt: skip
def test_killed_rank_is_named_by_all_others(dp: int, pp: int, victim: int, more: dict[str, Any]) -> None:
    with bare([call("train_on", dp, pp, **more)], 4) as job:
        job.until("training")
        job.kill(victim, signal.SIGKILL)
        others_end(job, victim, f"rank {victim} gives no sign of life: it was killed, is frozen or cut off")


def test_killed_rank_0_takes_the_store_with_it_and_is_named() -> None:
    with bare([call("train_on", 1, 4)], 4) as job:
        job.until("training")
        job.kill(0, signal.SIGKILL)
        others_end(job, 0, "the job's store is gone, and rank 0")


def test_frozen_rank_is_waited_for_loudly_and_then_named() -> None:
    with bare([call("train_on", 2, 2, timeout=6.0)], 4) as job:
        job.until("training")
        job.kill(1, signal.SIGSTOP)
        others_end(job, 1, "rank 1 gives no sign of life")
        for rank in (0, 2, 3):
            waits = re.findall(
                rf"\[merak\] rank {rank} has been waiting \d+ s for (.+); it will give up", job.read(rank).stderr
            )
            assert waits, job.read(rank).stderr
        assert job.code(1) is None


def test_rank_that_pauses_for_less_than_the_limit_is_waited_for() -> None:
    with bare([call("train_on", 2, 2, steps=300)], 4) as job:
        job.until("training")
        job.kill(2, signal.SIGSTOP)
        time.sleep(3)
        job.kill(2, signal.SIGCONT)
        job.wait(range(4), 60)
        assert [job.read(rank).code for rank in range(4)] == [0, 0, 0, 0]


FAILING: dict[str, tuple[Call, str]] = {
    "forward": (call("raise_on_one", victim=1), r"rank 1 failed with KeyError: 'a bug of the model'"),
    "pipeline": (call("raise_on_one", 1, 4, victim=2), r"rank 2 failed with KeyError: 'a bug of the model'"),
    "planning": (call("plan_on_all_but_one", victim=3), r"rank 3 failed with ValueError: a batch of 1 samples cannot"),
}


@pytest.mark.parametrize("case", ["planning", "pipeline", pytest.param("forward", marks=pytest.mark.slow)])
def test_error_on_one_rank_is_told_by_all_others(case: str) -> None:
    started, blamed = FAILING[case]
    victim = started.arguments["victim"]
    with bare([started], 4) as job:
        job.wait([victim], 120)  # with the start-up
        others_end(job, victim, blamed)
        own = job.read(victim)
        assert own.code not in (0, None)
        assert "PeerError" not in own.stderr


def test_rank_that_makes_fewer_steps_is_named() -> None:
    with bare([call("stop_early", victim=1)], 4) as job:
        job.wait([1], 120)  # with the start-up
        others_end(job, 1, "rank 1 gives no sign of life")


def test_script_may_end_without_close() -> None:
    """It aborted now and then: the interpreter's end caught the watch's thread inside the store."""
    with bare([call("leave_it_open")], 4) as job:
        job.wait(range(4), 120)
        assert [job.code(rank) for rank in range(4)] == [0] * 4, [job.read(rank).stderr[-500:] for rank in range(4)]


def test_torchrun_ends_when_a_rank_is_killed() -> None:
    begin = time.monotonic()
    job = torchrun([call("kill_itself", victim=1)], 4, timeout=120)
    assert job.code != 0
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", job.output), job.output[-2000:]
    assert time.monotonic() - begin < 90


def test_harness_finds_what_a_job_leaves_behind() -> None:
    import os
    import subprocess
    import sys

    from tests.ranks import MARK, nobody_left

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | {MARK: "left"},
                             start_new_session=True)  # fmt: skip
    time.sleep(0.2)
    with pytest.raises(AssertionError, match="left processes behind"):
        nobody_left("left", patience=0.3)
    assert child.wait(5) == -signal.SIGKILL


def test_harness_tells_which_rank_failed_where() -> None:
    job = torchrun([Call("bad", "tests.faults:no_such_function")], 2, timeout=60)
    assert job.code != 0
    with pytest.raises(AssertionError, match=r"(?s)bad.*rank [01].*no_such_function"):
        job.results("bad")
    with pytest.raises(AssertionError, match=r"(?s)later.*rank 0 never got there"):
        job.results("later")
