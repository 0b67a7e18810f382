"""The chain partition is exact: nothing brute force finds is better."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations, pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merak_like.partitioner.balance import balance, beyond, bottleneck, suffixes

costs_strategy = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 7.0]) | st.floats(0, 10), min_size=1, max_size=8)


def partitions(size: int, stages: int) -> Iterator[tuple[int, ...]]:
    return ((0, *inner, size) for inner in combinations(range(1, size), stages - 1))


@given(costs_strategy, st.data())
def test_balance_is_as_good_as_brute_force(costs: list[float], data: st.DataObject):
    stages = data.draw(st.integers(1, len(costs)))
    starts = balance(costs, stages)
    assert len(starts) == stages + 1
    assert starts[0] == 0
    assert starts[-1] == len(costs)
    assert all(a < b for a, b in pairwise(starts)), "no stage is empty, none is lost or doubled"

    def worst(starts: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in pairwise(starts))

    assert worst(starts) == pytest.approx(min(map(worst, partitions(len(costs), stages))), rel=1e-12, abs=1e-12)


@given(st.integers(1, 7), st.data(), st.integers(0, 2**32))
def test_bottleneck_is_exact_for_any_cost_that_counts_stages_from_the_end(size: int, data: st.DataObject, seed: int):
    stages = data.draw(st.integers(1, size))
    rng = np.random.default_rng(seed)
    tables = rng.integers(1, 9, (stages, size, size)).astype(float)
    tables[rng.random(tables.shape) < 0.3] = np.inf
    tables[:, beyond(size, size)] = np.inf

    def worst(starts: tuple[int, ...]) -> float:
        return max(float(tables[stages - 1 - s][i, j - i - 1]) for s, (i, j) in enumerate(pairwise(starts)))

    best = min(map(worst, partitions(size, stages)))
    found = bottleneck(size, stages, lambda k: tables[k])
    assert suffixes(size, stages, lambda k: tables[k])[stages - 1, 0] == best
    if best == np.inf:
        assert found is None
    else:
        assert found is not None
        assert found[0] == best == worst(found[1])


@pytest.mark.parametrize("layers", [7, 12, 30, 52])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 7])
def test_equal_layers_are_shared_as_evenly_as_can_be(layers: int, stages: int):
    sizes = [b - a for a, b in pairwise(balance([1.0] * layers, stages))]
    assert sum(sizes) == layers
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("size", "stages"), [(1000, 64), (2000, 64), (1000, 8)])
def test_a_thousand_layers_take_no_time(size: int, stages: int):
    costs = [Random(0).random() for _ in range(size)]
    begin = time.process_time()
    balance(costs, stages)
    assert time.process_time() - begin < 0.5


def test_refusals_say_what_would_do():
    with pytest.raises(ValueError, match="3 costs cannot fill 4 stages: use 1 to 3 stages"):
        balance([1, 2, 3], 4)
    with pytest.raises(ValueError, match="negative"):
        balance([1, -2], 1)
