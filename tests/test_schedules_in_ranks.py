"""Every schedule with no, some and full recompute, in real processes, equals plain PyTorch in one process.

Losses, the gradient norm, every gradient and the weights after two steps, in float64, to 1e-10. Dropout is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import Call, call, results_of, selected_calls
from tests.rich import RECOMPUTE, SCHEDULES

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(1500)]

NAMES = ("llama", "gpt2", "t5", "unet")


def cells() -> Iterator[Any]:
    """Every schedule, recompute, replicas and model; by default every schedule twice, the rest taking turns."""
    for row, schedule in enumerate(SCHEDULES):
        for column, recompute in enumerate(RECOMPUTE):
            for turn, name in enumerate(NAMES):
                for dp in (1, 2):
                    one = call("rich", dp, 2, name=name, schedule=schedule, recompute=recompute)
                    default = turn == (row + column) % len(NAMES) and dp == 1 + row % 2 and column != row % 3
                    yield pytest.param(one, id=one.name, marks=() if default else (pytest.mark.slow,))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank."""
    return results_of(selected_calls(request), timeout=1400.0)


@pytest.mark.parametrize("case", list(cells()))
def test_schedule_trains_as_one_process(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10
