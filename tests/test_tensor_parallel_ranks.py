"""Tensor parallelism in real processes equals plain PyTorch: losses, all gradients, norm, weights after 5 steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import Call, call, results_of, selected_calls

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

MODELS = "llama gpt2 bert opt t5 bloom falcon phi3 gemma2 mixtral qwen3 vit whisper".split()
LAYOUTS = ((1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 2))
SCHEDULES = ("1f1b", "scp", "zb-h1")


def sharded(*layout: int, **more: Any) -> Call:
    return call("sharded", *layout, **more)._replace(function="tests.sharded:sharded")


def cells() -> Iterator[Any]:
    """Every model, layout and schedule; by default every model once, layouts and schedules taking turns."""
    for row, name in enumerate(MODELS):
        for column, layout in enumerate(LAYOUTS):
            for turn, schedule in enumerate(SCHEDULES if layout[1] > 1 else SCHEDULES[::2]):
                first = column == row % len(LAYOUTS) and turn == row % 2
                one = sharded(*layout, name=name, schedule=schedule)
                yield pytest.param(one, id=one.name, marks=() if first else pytest.mark.slow)


FLOAT32 = [sharded(1, 1, 2, name=name, dtype="float32") for name in ("llama", "gpt2")]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank. The job it is part of runs when its first result is asked for."""
    return results_of(selected_calls(request))


@pytest.mark.parametrize("case", list(cells()))
def test_sharded_training_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_float32_agrees_to_its_own_precision(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-5
