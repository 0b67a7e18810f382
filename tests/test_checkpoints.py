"""A job that was saved goes on as if nothing had been: bit for bit in its layout, and in every other one.

float64; the model has dropout and tied weights, the optimizer two groups and a schedule.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from merak_like.runtime.checkpoint import folder as files
from tests import lasting
from tests.ranks import Call, Node, bare, results_of, selected_calls, torchrun

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]


def call(function: str, dp: int, pp: int, folder: str, **more: Any) -> Call:
    """A function of tests.lasting."""
    words = [function, *(str(v) for v in more.values()), folder, f"{dp}x{pp}"]
    arguments = {"dp": dp, "pp": pp, "folder": folder, **more}
    return Call("-".join(words), f"tests.lasting:{function}", arguments)


SAVING = [
    call("unbroken", 2, 2, "square", name="gpt2"),
    call("unbroken", 2, 2, "norms", name="unet"),
    call("unbroken", 1, 2, "sharded", name="gpt2", tp=2),
]
GOING_ON = [
    call("go_on", 2, 2, "square", name="gpt2", exact=True),
    call("go_on", 2, 2, "norms", name="unet", exact=True),
    call("go_on", 1, 4, "square", name="gpt2", exact=False),
    call("go_on", 4, 1, "square", name="gpt2", exact=False),
    call("go_on", 2, 2, "alone", name="gpt2", exact=False),
    call("go_on", 1, 2, "sharded", name="gpt2", exact=True, tp=2),
    call("go_on", 4, 1, "sharded", name="gpt2", exact=False),
    call("go_on", 2, 1, "square", name="gpt2", exact=False, tp=2),
]
USUAL = (SAVING[0], SAVING[2], GOING_ON[0], GOING_ON[4], GOING_ON[5])
"""Run by default."""


def marked(cases: list[Call]) -> list[Any]:
    """A test for each, most of them slow."""
    return [pytest.param(one, id=one.name, marks=() if one in USUAL else pytest.mark.slow) for one in cases]


REFUSED = call("refusals", 2, 2, "square")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints are; one was written by a single process."""
    path = tmp_path_factory.mktemp("checkpoints")
    lasting.unbroken("gpt2", 1, 1, str(path / "alone"))
    return path


@pytest.fixture(scope="module")
def results(root: Path, request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank, in one job of four."""
    going_on = [one for one in selected_calls(request) if one in GOING_ON]
    read = {"square", *(one.arguments["folder"] for one in going_on)}
    chosen = [*(one for one in SAVING if one.arguments["folder"] in read), *going_on, REFUSED]
    found = results_of([here(one, root) for one in chosen])
    return lambda one: found(here(one, root))


def here(one: Call, root: Path) -> Call:
    """A call with its folder below this one."""
    return one._replace(arguments={**one.arguments, "folder": str(root / one.arguments["folder"])})


@pytest.mark.parametrize("case", marked(SAVING))
def test_saving_does_not_disturb_and_all_ranks_wait_for_it(case: Call, results: Callable[[Call], list[Any]]) -> None:
    losses = [one[::2] for one in results(case)]
    assert losses == [losses[0]] * 4


@pytest.mark.parametrize("case", marked(GOING_ON))
def test_job_goes_on_in_any_layout(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


def test_four_ranks_checkpoint_goes_on_in_one_process(results: Callable[[Call], list[Any]], root: Path) -> None:
    results(SAVING[0])
    assert lasting.go_on("gpt2", 1, 1, str(root / "square"), exact=False) <= 1e-10
    assert lasting.go_on("gpt2", 1, 1, str(root / "alone"), exact=True) == 0


def test_what_is_not_of_this_job_is_refused_on_every_rank(results: Callable[[Call], list[Any]]) -> None:
    expected = (
        r"the checkpoint is not of this Small: it lacks \['layers.0.bias', .* and has .*transformer",
        r"the checkpoint has the state of AdamW, this job trains with SGD: use the same",
        r"are in one group of the optimizer, in the checkpoint in groups with different options",
        r"the checkpoint has no state 'sampler', it has \['position', 'schedule'\]",
        r"state\['odd'\] cannot be kept in a checkpoint",
    )
    for said in results(REFUSED):
        assert len(said) == len(expected)
        for pattern, text in zip(expected, said, strict=True):
            assert re.search(pattern, text), text


def test_checkpoint_is_read_by_torch_itself(results: Callable[[Call], list[Any]], root: Path, tmp_path: Path) -> None:
    results(SAVING[0])
    dcp_to_torch_save(root / "square" / f"step-{lasting.SAVED:08d}", tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert (
        found["model"]["transformer.wte.weight"].shape == found["optimizer"]["transformer.wte.weight"]["exp_avg"].shape
    )


@pytest.mark.parametrize(("phase", "number"), [("training", signal.SIGTERM), ("evaluating", signal.SIGUSR1)])
def test_one_rank_that_is_told_to_end_lets_all_save_the_same_step(
    phase: str, number: signal.Signals, tmp_path: Path
) -> None:
    with bare([call("until_told", 2, 2, str(tmp_path), phase=phase)], 4) as running:
        running.until("working")
        running.kill(3, number)
        running.wait(range(4), 60)
        assert [running.code(rank) for rank in range(4)] == [0] * 4, running.read(0).stderr[-2000:]
        said = {path.suffix for path in running.folder.glob("*.step-*")}
    (made,) = files.candidates(tmp_path)
    assert said == {f".{made.name}"}


@pytest.mark.parametrize("deaths", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_job_killed_again_and_again_ends_as_if_undisturbed(deaths: int, tmp_path: Path) -> None:
    """SIGKILL of a random rank at a random moment; torchrun starts all again, and they find the newest checkpoint."""
    node = Node(options=(*Node().options, f"--max-restarts={deaths}"))
    one = call("survivor", 1, 2, str(tmp_path / "disturbed"), steps=60, deaths=deaths)
    disturbed = torchrun([one], 2, nodes=[node], timeout=250).results(one.name)
    two = call("survivor", 1, 2, str(tmp_path / "calm"), steps=60, deaths=0)
    calm = torchrun([two], 2).results(two.name)
    assert int(disturbed[0].pop("from")) > 0, "it began anew"
    assert calm[0].pop("from") == "0"
    assert disturbed[0] == calm[0]
