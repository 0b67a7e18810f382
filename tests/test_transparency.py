"""Parallel training equals plain PyTorch in one process: losses, every gradient, the norm, the weights after 5 steps.

The ranks are real processes under torchrun, one job for two and one for four of them. A job makes the calls of all
selected tests one after the other, each with an engine of its own; a test reads what became of its call.

float64 must agree to 1e-10: with the same order of sums it would be bitwise, and ranks add in another order. float32
must agree to 1e-5 (``FLOAT32``), where the same noise is 1e-7 and AdamW, dividing by its size, passes it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merak_like.runtime.batches import split
from tests import scenarios
from tests.ranks import Call, call, results_of, selected_calls
from tests.training import DENSE, MODELS, subject

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

LAYOUTS = ((2, 1), (1, 2), (2, 2), (1, 4), (4, 1))
SCHEDULES = ("1f1b", "gpipe")
USUAL = ("gpt2", "t5")
"""Models with ties, on all layouts but pure data parallelism of 4 ranks by default."""


def cells() -> Iterator[Any]:
    """Every model, layout, schedule and dropout; by default every model on 3 layouts, the rest taking turns."""
    for row, name in enumerate(MODELS):
        for column, layout in enumerate(LAYOUTS):
            for schedule in SCHEDULES:
                for dropout in (True, False) if name in DENSE else (True,):
                    turn = (SCHEDULES[(row + column) % 2], column != row % 5 or name not in DENSE)
                    usual = column < 2 or (row + column) % len(LAYOUTS) == 2 or (name in USUAL and column < 4)
                    marks = () if usual and (schedule, dropout) == turn else (pytest.mark.slow,)
                    one = call("train", *layout, name=name, schedule=schedule, dropout=dropout)
                    yield pytest.param(one, id=one.name, marks=marks)


FLOAT32 = [call("train", 2, 2, name=name, schedule="1f1b", dropout=True, dtype="float32") for name in ("llama", "unet")]
OTHERS = [
    call("other_shapes", 1, 4, name="gpt2"),
    call("other_shapes", 2, 1, name="llama"),
    call("own_shares", 2, 1, name="gpt2"),
    call("own_shares", 2, 2, name="bert"),
    call("evaluated", 1, 2, name="gpt2", schedule="gpipe"),
    call("evaluated", 1, 2, name="unet", schedule="1f1b"),
    call("evaluated", 2, 2, name="vit", schedule="1f1b"),
    *(call("partly_trained", *layout) for layout in ((2, 1), (2, 2), (1, 4))),
    call("leaves_no_threads", 2, 1),
    call("leaves_no_threads", 1, 2),
    call("leaves_random_numbers_alone", 2, 1),
    call("leaves_random_numbers_alone", 1, 4),
    call("readable_gradients", 2, 2),
    call("readable_gradients", 1, 2),
    call("own_code_runs", 1, 4),
    call("own_code_runs", 2, 1),
    call("under_autocast", 1, 2, name="llama"),
]
META = [call("from_meta", *layout, name=name) for name in ("llama", "gpt2") for layout in ((2, 1), (1, 2), (1, 4))]
META.append(call("from_meta", 1, 1, 2, name="gpt2"))
SAVED = ("gpt2", 1, 4), ("llama", 2, 2), ("t5", 1, 2), ("patchy", 1, 2), ("bert", 1, 1, 2)
READ = *((name, *layout) for name in ("llama", "gpt2") for layout in ((1, 4), (2, 1))), ("gpt2", 1, 1, 2)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, folder: Path) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank. The job it is part of runs when its first result is asked for."""
    return results_of([with_folder(one, folder) for one in selected_calls(request)])


def with_folder(one: Call, folder: Path) -> Call:
    """A call that names its folder gets it below this one."""
    if "folder" not in one.arguments:
        return one
    return one._replace(arguments={**one.arguments, "folder": str(folder / one.arguments["folder"])})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, with those of transformers already there."""
    path = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "gpt2"):
        model: Any = subject(name, dtype=torch.float32).model
        model.save_pretrained(path / name, max_shard_size="20KB")
    assert len(list((path / "llama").glob("*.safetensors"))) > 2
    return path


@pytest.mark.parametrize("case", list(cells()))
def test_training_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_float32_agrees_to_its_own_precision(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-5


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_scenario(case: Call, results: Callable[[Call], list[Any]]) -> None:
    results(case)


@pytest.mark.parametrize("case", META, ids=lambda case: case.name)
def test_model_on_meta_starts_from_the_same_weights_in_every_layout(
    case: Call, results: Callable[[Call], list[Any]]
) -> None:
    name = case.arguments["name"]
    assert results(case)[0] == alone("from_meta", name=name)


@pytest.mark.parametrize(
    "case",
    [call("read", *layout, name=name, folder=name) for name, *layout in READ],
    ids=lambda case: case.name,
)
def test_weights_are_read_from_a_sharded_checkpoint(case: Call, results: Callable[[Call], list[Any]]) -> None:
    found = results(case)[0]
    one = subject(case.arguments["name"], dtype=torch.float32)
    state = one.model.state_dict()
    loss = scenarios.plain_loss(one, state, split(one.batch(scenarios.SAMPLES), scenarios.PARTS))
    assert found == {"loss": f"{loss:.5f}"} | {k: scenarios.digest(v) for k, v in state.items()}


@pytest.mark.parametrize(
    "case",
    [call("write", *layout, name=name, folder=f"{name}-saved") for name, *layout in SAVED],
    ids=lambda case: case.name,
)
def test_saved_model_loads_as_the_one_that_was_trained(
    case: Call, results: Callable[[Call], list[Any]], folder: Path
) -> None:
    name, saved = case.arguments["name"], folder / case.arguments["folder"]
    losses = results(case)
    assert all(one == losses[0] for one in losses)
    one = scenarios.patchy() if name == "patchy" else subject(name, dtype=torch.float32)
    plain = scenarios.plainly(one, [one.batch(scenarios.SAMPLES)] * 2, scenarios.PARTS).weights
    if name == "patchy":
        from safetensors.torch import load_file

        loaded = load_file(saved / "model.safetensors")
    else:
        again = type(one.model).from_pretrained(saved, output_loading_info=True)  # type: ignore[attr-defined]
        assert not again[1]["missing_keys"]
        assert not again[1]["unexpected_keys"]
        loaded = again[0].state_dict()
    assert loaded.keys() == plain.keys()
    assert scenarios.training.worst(loaded, plain)[0] < (1e-10 if name == "patchy" else 1e-5)


def alone(scenario: str, **arguments: Any) -> Any:
    """A scenario in this process, without torchrun."""
    return getattr(scenarios, scenario)(dp=1, pp=1, **arguments)
