"""Where a graph may be cut and what crosses there, against a naive computation with sets."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merak_like.partitioner.cuts import check_starts, crossings, find_cuts, live_values
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import held_by, residents, unused
from merak_like.partitioner.traffic import Traffic
from tests.graphs import GraphBuilder, chain, encoder_decoder, gpt, skips


@st.composite
def random_graphs(draw: st.DrawFn) -> ProxyGraph:
    """Any DAG: each op reads some values made before it; some are inputs, some read an attribute."""
    made = GraphBuilder("Random")
    names: list[str] = []
    for index in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["function", "function", "function", "input", "attribute"]))
        inputs = draw(st.lists(st.sampled_from(names), max_size=3)) if names and kind == "function" else []
        shape = (draw(st.integers(0, 5)), 2)
        params = [made.weight(f"w{index % 4}", 2)] if kind == "attribute" or draw(st.booleans()) else []
        names.append(made.op("f", *inputs, kind=kind, shape=shape, params=params if kind != "input" else []))
    size = len(made.ops)
    if draw(st.booleans()):
        first = draw(st.integers(0, size - 1))
        made.pinned.append((first, draw(st.integers(first, size - 1))))
    return made.graph()


def naive_live(graph: ProxyGraph, position: int) -> set[str]:
    before, after = graph.ops[:position], graph.ops[position:]
    made = {v.name for op in before if op.kind not in ("input", "attribute") for v in op.outputs}
    return made & {name for op in after for name in op.inputs}


@given(random_graphs())
def test_live_values_equal_a_naive_set_computation(graph: ProxyGraph):
    cuts = find_cuts(graph)
    for position in range(len(graph.ops) + 1):
        naive = naive_live(graph, position)
        assert {value.name for value in live_values(graph, position)} == naive
        assert cuts.live_count[position] == len(naive)
        assert cuts.live_bytes[position] == sum(graph.values[name].nbytes for name in naive)
        pinned = any(first < position <= last for first, last in graph.pinned)
        assert cuts.legal[position] == (0 < position < len(graph.ops) and not pinned)


def draw_starts(data: st.DataObject, graph: ProxyGraph) -> tuple[int, ...]:
    legal = find_cuts(graph).positions.tolist()
    inner = data.draw(st.sets(st.sampled_from(legal))) if legal else set[int]()
    return (0, *sorted(inner), len(graph.ops))


@given(random_graphs(), st.data())
def test_crossings_go_straight_from_maker_to_readers(graph: ProxyGraph, data: st.DataObject):
    starts = draw_starts(data, graph)
    stage_of = {i: s for s, (a, b) in enumerate(pairwise(starts)) for i in range(a, b)}
    expected: dict[str, tuple[int, list[int]]] = {}
    for index, op in enumerate(graph.ops):
        for value in op.outputs if op.kind not in ("input", "attribute") else ():
            source = stage_of[index]
            readers = {stage_of[i] for i, other in enumerate(graph.ops) if value.name in other.inputs} - {source}
            if readers:
                expected[value.name] = source, sorted(readers)
    found = crossings(graph, starts)
    assert {c.value: (c.source, list(c.targets)) for c in found} == expected
    assert all(c.nbytes == graph.values[c.value].nbytes for c in found)


@given(random_graphs(), st.data())
def test_traffic_sums_up_the_crossings(graph: ProxyGraph, data: st.DataObject):
    positions = draw_starts(data, graph)
    chosen = data.draw(st.sets(st.sampled_from(range(1, len(positions) - 1)))) if len(positions) > 2 else set[int]()
    segments = (0, *sorted(chosen), len(positions) - 1)
    expected: dict[tuple[int, int], int] = {}
    for crossing in crossings(graph, tuple(positions[s] for s in segments)):
        for target in crossing.targets:
            key = crossing.source, target
            expected[key] = expected.get(key, 0) + crossing.nbytes
    assert Traffic(graph, np.array(positions)).edges(segments) == expected


def test_the_batch_and_the_parameters_do_not_cross():
    graph = encoder_decoder(1)
    for position in range(1, len(graph.ops)):
        kinds = {graph.ops[graph.producer[v.name]].kind for v in live_values(graph, position)}
        assert not kinds & {"input", "attribute"}
    first_block = next(call.first for call in graph.calls if call.path == "decoder.block.0")
    live = [graph.ops[graph.producer[v.name]].scope for v in live_values(graph, first_block)]
    assert live == ["encoder.block.0", "decoder"], "the encoder's output and the decoder's embedding"


def test_a_skip_is_sent_once_and_not_relayed():
    graph = skips(2)  # x, down 0, down 1, up 1, add, up 0, add
    found = crossings(graph, (0, 2, 4, 7))
    first = graph.ops[1].outputs[0].name
    assert [(c.source, c.targets) for c in found if c.value == first] == [(0, (1, 2))]


def test_starts_that_cannot_be_say_why():
    graph = chain([1, 1, 1])
    with pytest.raises(ValueError, match="must begin with 0 and end with 4"):
        check_starts(graph, (0, 2))
    with pytest.raises(ValueError, match="leave a stage empty"):
        check_starts(graph, (0, 2, 2, 4))
    pinned = ProxyGraph(graph.ops, graph.parameters, pinned=((1, 2),))
    with pytest.raises(ValueError, match=r"a cut at op 2 \(.*\) splits ops 1 to 2"):
        check_starts(pinned, (0, 2, 4))
    with pytest.raises(ValueError, match="not among the 4 ops"):
        find_cuts(ProxyGraph(graph.ops, graph.parameters, pinned=((1, 9),)))
    with pytest.raises(ValueError, match="outside the graph"):
        live_values(graph, 9)


def test_an_attribute_is_held_where_it_is_used():
    made = GraphBuilder()
    x = made.input("x", (2, 4), "float32")
    weight = made.op("bias", kind="attribute", params=(made.weight("bias", 4),), saved=0)
    made.weight("never", 4)
    x = made.op("relu", x, params=(made.weight("w", 4),))
    x = made.op("add", x, weight)
    graph = made.graph()
    assert held_by(residents(graph), 0, 3) == ("w",)
    assert held_by(residents(graph), 3, 4) == ("bias", "never"), "what nothing reads stays with its neighbour"
    assert unused(graph) == ("never",)


def test_thirty_thousand_ops_take_no_time():
    graph = gpt(2500)
    assert len(graph.ops) > 30_000
    _ = graph.values
    begin = time.process_time()
    find_cuts(graph)
    assert time.process_time() - begin < 0.3
