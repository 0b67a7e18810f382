"""Bytes of a stage: by hand for a small one, and in bands for all ranges at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merak_like.partitioner.cuts import live_values
from merak_like.partitioner.gathering import gathered_bytes
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.memory import MemoryModel, Parts
from merak_like.partitioner.states import ADAMW, STATES
from tests.graphs import GraphBuilder, encoder_decoder, gpt, norm, skips, two_towers
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
    assert model.parts(0, 2) == Parts(
        weights=12,
        gradients=12,
        optimizer=24,
        workspace=128 + 64,
        saved=100,
        boundary=64,
        bare=64,
        inputs=32,
        put_off=0,
        received_saved=0,
        sent_saved=0,
        sent=64,
    ), "what is sent comes back as a gradient, one at a time"
    assert model.parts(2, 4) == Parts(
        weights=20 + 12,
        gradients=12,
        optimizer=24,
        workspace=32 + 64,
        saved=11,
        boundary=64,
        bare=64,
        inputs=0,
        put_off=0,
        received_saved=0,
        sent_saved=0,
    ), "the tied weight counts here again, the frozen one without gradient and states"
    assert model.parts(0, 4).weights == 32, "within a stage a tied weight counts once"


def test_boundary_value_that_an_op_saves_is_found_on_the_side_of_that_op():
    """The op after the cut saves what it receives; then the op before it, what it makes."""
    for saver, here, there in ((2, "received_saved", "sent_saved"), (1, "sent_saved", "received_saved")):
        graph = small()
        (value,) = live_values(graph, 2)
        ops = tuple(replace(op, keeps=(value.name,)) if i == saver else op for i, op in enumerate(graph.ops))
        model = MemoryModel(replace(graph, ops=ops))
        first, last = model.parts(0, 2), model.parts(2, 4)
        side, other = (last, first) if saver == 2 else (first, last)
        assert (getattr(side, here), getattr(side, there)) == (64, 0)
        assert (other.received_saved, other.sent_saved) == (0, 0)
        assert (first.boundary, first.bare, last.boundary, last.bare) == (64, 0, 64, 0)


def test_what_waits_for_its_weight_gradient():
    """The input of three layers once, and the gradients of their outputs; not a norm's."""
    made = GraphBuilder()
    x = norm(made, "ln", made.input("x", (2, 4), "float32"), 4)
    for name in "qkv":
        made.linear(name, x, 8, 4)
    graph = made.graph()
    assert MemoryModel(graph).parts(0, len(graph.ops)).put_off == 2 * 4 * 4 + 3 * 2 * 8 * 4
    assert MemoryModel(graph).parts(0, 2).put_off == 0
    assert MemoryModel(graph, scale=2).parts(0, len(graph.ops)).put_off == 2 * (32 + 192)


def test_what_units_save_and_read_of_each_other():
    """a and b are read by the unit after them only, the skip further on, the batch by whoever."""
    made = GraphBuilder()
    ids = made.input("ids", (2, 4))
    a = made.op("a", ids, params=(made.weight("w", 3),), shape=(2, 1), saved=10)
    b = made.op("b", a, shape=(2, 2), saved=20)
    made.op("c", b, a, shape=(2, 4), saved=30)
    d = made.op("d", b, shape=(2, 8), saved=40)
    made.op("e", d, shape=(2, 16), saved=50)
    graph = made.graph()
    saved, near, far = MemoryModel(graph).kept_by((0, 2, 3, 4, 5, 6))
    assert saved == [10, 20, 30, 40, 50]
    assert near == [0, 0, 0, 0, 64]
    assert far == 8 + 16 + 2 * 4 * 8, "a and b are read twice; the batch"
    assert MemoryModel(graph).kept_by((2, 3, 5)) == ([20, 70], [0, 16], 0), "what comes from before is no unit's"
    assert MemoryModel(graph).kept_by((0, 2, 5)) == ([10, 90], [0, 8], 64), "d is sent, and so held anyway"


@pytest.mark.parametrize(("name", "bytes_per_element"), [("adamw", 16), ("sgd", 8), ("momentum", 12)])
def test_bytes_per_element_of_a_float32_parameter(name: str, bytes_per_element: int):
    parts = MemoryModel(small(), STATES[name]).parts(0, 2)
    assert parts.weights + parts.gradients + parts.optimizer == 3 * bytes_per_element


def check_bands(graph: ProxyGraph, positions: tuple[int, ...], scale: float, width: int | None = None) -> None:
    model = MemoryModel(graph, ADAMW, scale=scale)
    size = len(positions) - 1
    width = width or size
    bands = model.bands(np.array(positions), width)
    for i in range(size):
        for j in range(i + 1, min(i + width, size) + 1):
            parts = model.parts(positions[i], positions[j])
            for name in ("fixed", "saved", "boundary", "bare", "inputs", "put_off"):
                assert getattr(bands, name)[i, j - i - 1] == getattr(parts, name), (i, j, name)


@given(random_graphs(), st.data(), st.sampled_from([0.5, 1.0, 3.0]))
def test_bands_equal_the_direct_sum(graph: ProxyGraph, data: st.DataObject, scale: float):
    check_bands(graph, draw_starts(data, graph), scale)


@pytest.mark.parametrize("graph", [gpt(2), encoder_decoder(2), skips(4), two_towers(3)], ids=lambda g: g.model)
@pytest.mark.parametrize("width", [1, 4, None])
def test_bands_of_models_equal_the_direct_sum(graph: ProxyGraph, width: int | None):
    check_bands(graph, (*range(0, len(graph.ops), 3), len(graph.ops)), 1.0, width)


def test_what_replicas_gather_by_hand():
    """Embedding, two blocks and a head in one stage, then as stages; tied, the embedding waits for its gradient."""
    made = GraphBuilder()
    x = made.op("x", params=(made.weight("e", 100),), shape=(1,))
    x = made.op("one", x, params=(made.weight("a", 10),), shape=(1,), saved=7)
    x = made.op("two", x, params=(made.weight("b", 20), made.weight("f", 30, trainable=False)), shape=(1,), saved=7)
    made.op("head", x, params=(made.weight("h", 5),), shape=(1,), saved=30)
    graph, names = made.graph(), (400, 40, 80, 20)
    assert [p.nbytes for p in graph.parameters if p.trainable] == list(names)
    rest = 400 + 20
    assert gathered_bytes(graph, (1, 2, 3), ADAMW) == [
        2 * rest, rest + 20 + 3 * 40 - 30, rest + 20 + 3 * 80 - 30, rest + 80
    ], "the head's gradient waits, what it kept is gone"  # fmt: skip
    assert gathered_bytes(graph, (1, 2, 3), ADAMW, stages=2)[1:3] == [3 * 40, 3 * 80]
    assert gathered_bytes(graph, (), ADAMW) == [2 * sum(names)] * 4
    most = MemoryModel(graph, ADAMW.sharded(3, 2), gathered=gathered_bytes(graph, (1, 2, 3), ADAMW))
    assert most.parts(0, 4).workspace == MemoryModel(graph).parts(0, 4).workspace + 2 * rest
