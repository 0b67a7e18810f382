"""Bytes of a stage: by hand for a small one, and in bands for all ranges at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.memory import ADAMW, STATES, MemoryModel
from merak_like.partitioner.plan import StageMemory
from tests.graphs import GraphBuilder, encoder_decoder, gpt, skips, two_towers
from tests.test_cuts import draw_starts, random_graphs


def small() -> ProxyGraph:
    made = GraphBuilder("Small")
    x = made.input("x", (2, 4), "float32")
    x = made.op("a", x, params=(made.weight("w", 3, tied=("v",)),), saved=100, shape=(2, 8))
    x = made.op("b", x, params=(made.weight("frozen", 5, trainable=False),), saved=10, shape=(2, 2))
    made.op("c", x, params=("v",), saved=1, shape=())
    return made.graph()


def test_a_stage_by_hand():
    model = MemoryModel(small())
    assert model.stage(0, 2, 3) == StageMemory(
        weights=12, gradients=12, optimizer=24, activations=300, boundary=4 * 64, workspace=128
    ), "what is sent is held for 3 micro-batches, its gradient for one"
    assert model.stage(2, 4, 1) == StageMemory(
        weights=20 + 12, gradients=12, optimizer=24, activations=11, boundary=2 * 64, workspace=32
    ), "the tied weight counts here again, the frozen one without gradient and states"
    assert model.stage(0, 4, 1).weights == 32, "within a stage a tied weight counts once"


@pytest.mark.parametrize(("name", "bytes_per_element"), [("adamw", 16), ("sgd", 8), ("momentum", 12)])
def test_bytes_per_element_of_a_float32_parameter(name: str, bytes_per_element: int):
    memory = MemoryModel(small(), STATES[name]).stage(0, 2, 1)
    assert memory.weights + memory.gradients + memory.optimizer == 3 * bytes_per_element


def check_bands(graph: ProxyGraph, positions: tuple[int, ...], scale: float, width: int | None = None) -> None:
    model = MemoryModel(graph, ADAMW, scale=scale)
    size = len(positions) - 1
    width = width or size
    bands = model.bands(np.array(positions), width)
    for i in range(size):
        for j in range(i + 1, min(i + width, size) + 1):
            for live in (1, 3):
                expected = model.stage(positions[i], positions[j], live).total
                assert bands.total(live)[i, j - i - 1] == expected, (i, j, live)


@given(random_graphs(), st.data(), st.sampled_from([0.5, 1.0, 3.0]))
def test_bands_equal_the_direct_sum(graph: ProxyGraph, data: st.DataObject, scale: float):
    check_bands(graph, draw_starts(data, graph), scale)


@pytest.mark.parametrize("graph", [gpt(2), encoder_decoder(2), skips(4), two_towers(3)], ids=lambda g: g.model)
@pytest.mark.parametrize("width", [1, 4, None])
def test_bands_of_models_equal_the_direct_sum(graph: ProxyGraph, width: int | None):
    check_bands(graph, (*range(0, len(graph.ops), 3), len(graph.ops)), 1.0, width)


def test_earlier_stages_hold_more():
    graph = gpt(4)
    model, starts = MemoryModel(graph), (0, 16, 28, len(graph.ops))
    activations = [model.stage(a, b, 1).activations for a, b in pairwise(starts)]
    held = [model.stage(a, b, 3 - s).activations for s, (a, b) in enumerate(pairwise(starts))]
    assert held == [3 * activations[0], 2 * activations[1], activations[2]]
