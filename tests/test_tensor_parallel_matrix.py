"""Every model x layout x schedule x form x recompute in real processes equals plain PyTorch over 5 steps.

A cell compares losses, all gradients, the norm and the weights, dropout on, with micro-batches of two sizes.

Slow: a selection in which every model meets every (layout, schedule) and every (form, recompute), and every (layout,
schedule, form, recompute) is met by two models. Exhaustive: all the others (hours; `pytest -m exhaustive`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from tests.ranks import Call, call, results_of, selected_calls

MODELS = "llama gpt2 bert opt t5 bloom falcon phi3 gemma2 mixtral qwen3 vit whisper".split()
SIZES = {"t5": (19, 16, 12), "whisper": (19, 16, 32, 12), "vit": (32,)}
"""Lengths that 4 ranks divide; the 17 places of a picture they do not, so there samples are divided."""
SCHEDULES = ("1f1b", "scp", "zb-h1")
COLUMNS = [
    (layout, schedule)
    for layout in ((1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 2))
    for schedule in (SCHEDULES if layout[1] > 1 else SCHEDULES[::2])  # without a pipeline, two of them are the same
]
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "rows": {"sequence_parallel": True}, "shares": {"tp_shares": 2}}
WAYS = list(product(FORMS, ("none", "full")))


Cell = tuple[str, tuple[int, int, int], str, str, str]
"""Model, layout, schedule, form, recompute."""


def cells() -> Iterator[tuple[Cell, bool]]:
    """All of them, those of a model one after the other, and whether each is in the selection."""
    for (row, name), (column, pair), (turn, way) in product(enumerate(MODELS), enumerate(COLUMNS), enumerate(WAYS)):
        yield (name, *pair, *way), turn == (row + column) % len(WAYS)


def cases() -> Iterator[Any]:
    """Of each cell what its ranks are to do."""
    for (name, layout, schedule, form, recompute), chosen in cells():
        one = call("sharded", *layout, name=name, schedule=schedule, recompute=recompute, form=form)
        arguments = dict(one.arguments) | FORMS[form] | {"size": SIZES.get(name, (19, 16))}
        del arguments["form"]
        mark = pytest.mark.slow if chosen else pytest.mark.exhaustive
        yield pytest.param(Call(one.name, "tests.sharded:sharded", arguments), id=one.name, marks=mark)


def test_the_selection_covers_what_it_says() -> None:
    chosen = [cell for cell, selected in cells() if selected]
    assert {(cell[0], *cell[1:3]) for cell in chosen} == {(name, *pair) for name, pair in product(MODELS, COLUMNS)}
    assert {(cell[0], *cell[3:]) for cell in chosen} == {(name, *way) for name, way in product(MODELS, WAYS)}
    columns = Counter(cell[1:] for cell in chosen)
    assert columns.keys() == {(*pair, *way) for pair, way in product(COLUMNS, WAYS)}
    assert min(columns.values()) == 2


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    """What a call returned on every rank. The job it is part of runs when its first result is asked for."""
    return results_of(selected_calls(request), timeout=1200, together=40)


@pytest.mark.ranks
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("case", list(cases()))
def test_a_cell_equals_plain_training(case: Call, results: Callable[[Call], list[Any]]) -> None:
    assert max(results(case)) <= 1e-10
