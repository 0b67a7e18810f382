"""Tensor parallelism in real processes equals plain PyTorch: losses, all gradients, norm, weights after 5 steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import Call, call, results_of, selected_calls

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

MODELS = "llama gpt2 bert opt t5 bloom falcon phi3 gemma2 mixtral qwen3 vit whisper".split()
USUAL = "llama gpt2 bert t5 falcon mixtral vit".split()
"""Run by default."""
LAYOUTS = ((1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 2))
SCHEDULES = ("1f1b", "scp", "zb-h1")


def sharded(*layout: int, **more: Any) -> Call:
    return call("sharded", *layout, **more)._replace(function="tests.sharded:sharded")


def cells() -> Iterator[Any]:
    """Some models once, layouts and schedules taking turns; test_tensor_parallel_matrix.py has the others."""
    for row, name in enumerate(MODELS):
        if name in USUAL:
            layout = LAYOUTS[row % len(LAYOUTS)]
            schedules = SCHEDULES if layout[1] > 1 else SCHEDULES[::2]
            one = sharded(*layout, name=name, schedule=schedules[row % 2])
            yield pytest.param(one, id=one.name)


def in_shares() -> Iterator[Any]:
    """Micro-batches of two and three samples in two shares, and in as many as there are."""
    for row, name in enumerate(MODELS):
        layout = ((1, 1, 2), (1, 2, 2), (2, 1, 2))[row % 3]
        schedules = SCHEDULES if layout[1] > 1 else SCHEDULES[::2]
        turn = (row + 1) % 2
        more = {"recompute": "full"} if (row + turn) % 2 else {}
        one = sharded(*layout, name=name, schedule=schedules[turn], tp_shares=2 + turn, **more)
        yield pytest.param(one, id=one.name, marks=() if row < 3 else pytest.mark.slow)


EIGHT = [
    sharded(2, 2, 2, name=name, schedule=schedule, steps=2, **more)
    for name, schedule in (("llama", "scp"), ("gpt2", "zb-h1"), ("t5", "1f1b"))
    for more in ({}, {"tp_shares": 2}, {"recompute": "full"})
]
FLOAT32 = [sharded(1, 1, 2, name=name, dtype="float32") for name in ("llama", "gpt2")]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank. The job it is part of runs when its first result is asked for."""
    return results_of(selected_calls(request), together=24)  # more than there are by default


@pytest.mark.parametrize("case", list(cells()))
def test_sharded_training_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.parametrize("case", list(in_shares()))
def test_training_in_shares_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_three_axes_equal_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_float32_agrees_to_its_own_precision(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-5
