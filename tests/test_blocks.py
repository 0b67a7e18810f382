"""Blocks are found by structure; pieces cover every op once, whatever the model and the number of stages."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.blocks import LARGEST, Piece, units
from merak_like.partitioner.candidates import candidates
from merak_like.partitioner.cost import op_costs
from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.graph import ProxyGraph
from tests.graphs import TOY, GraphBuilder, chain, encoder_decoder, gpt, skips, two_towers
from tests.test_cuts import random_graphs

MODELS = [gpt(3), encoder_decoder(3), skips(4), two_towers(4), chain([1] * 9), chain([10**6] * 9, calls=False)]


def pieces_of(graph: ProxyGraph, stages: int) -> tuple[Piece, ...]:
    return units(graph, op_costs(graph, TOY), stages)


def check_cover(graph: ProxyGraph, pieces: tuple[Piece, ...]) -> None:
    assert pieces[0].first == 0
    assert pieces[-1].stop == len(graph.ops)
    assert all(a.stop == b.first for a, b in pairwise(pieces))
    assert all(p.first < p.stop for p in pieces)
    assert len({p.name for p in pieces}) == len(pieces)
    legal = find_cuts(graph).legal
    assert all(legal[p.first] for p in pieces[1:])


@pytest.mark.parametrize("graph", MODELS, ids=lambda g: g.model)
@pytest.mark.parametrize("stages", [1, 2, 5, 40])
def test_pieces_cover_every_op_once(graph: ProxyGraph, stages: int):
    check_cover(graph, pieces_of(graph, stages))


@given(random_graphs(), st.integers(1, 5))
def test_pieces_cover_any_graph(graph: ProxyGraph, stages: int):
    check_cover(graph, pieces_of(graph, stages))


@settings(max_examples=20)
@given(st.integers(2, 6), st.integers(1, 12))
def test_no_layer_is_lost_or_doubled(layers: int, stages: int):
    graph = gpt(layers)
    pieces = pieces_of(graph, stages)
    check_cover(graph, pieces)
    assert [b for b in dict.fromkeys(p.block for p in pieces) if b.startswith("h.")] == [
        f"h.{i}" for i in range(layers)
    ]


def test_a_gpt_as_people_see_it():
    names = [(p.name, p.type) for p in pieces_of(gpt(12), 1)]
    blocks = [(f"h.{i}", "Block") for i in range(12)]
    tail = [("lm_head", "Linear"), ("cross_entropy_147", "cross_entropy")]
    assert names == [("inputs", "inputs"), ("wte", "Embedding"), *blocks, *tail]


def test_dear_blocks_are_divided_where_the_cut_is_cheap():
    graph = gpt(4, d=64, s=64, vocabulary=8)
    pieces = pieces_of(graph, 2)
    inside = [p.name for p in pieces if p.block == "h.1"]
    assert inside[0] == "h.1.attn"
    assert "h.1.mlp.fc" in inside
    border = next(p.first for p in pieces if p.name == "h.1.mlp.fc")
    assert graph.ops[border - 1].target == "add", "after the residual addition"
    assert graph.ops[border].target == "h.1.ln_2"


def test_pieces_are_small_enough_to_balance():
    graph = gpt(4, d=64, s=64, vocabulary=8)
    costs = op_costs(graph, TOY)
    for stages in (1, 2, 4):
        share = sum(cost.seconds for cost in costs) / stages
        for piece in pieces_of(graph, stages):
            largest = max(cost.seconds for cost in costs[piece.first : piece.stop])
            cost = sum(cost.seconds for cost in costs[piece.first : piece.stop])
            assert cost <= max(LARGEST * share, 1.5 * largest)


def test_an_encoder_decoder_has_two_families():
    blocks = [p.block for p in pieces_of(encoder_decoder(8), 1)]
    families = {b.rpartition(".")[0] for b in blocks if ".block." in b}
    assert families == {"encoder.block", "decoder.block"}


def test_the_first_of_a_family_may_differ():
    made = GraphBuilder("Odd")
    x = made.input("x", (2, 4), "float32")
    for index in range(8):
        with made.module(f"block.{index}", "Block"):
            x = made.op("f", x)
            x = made.op("g", x)
            if index == 0:
                x = made.op("position_bias", x)
    assert [p.name for p in pieces_of(made.graph(), 1)] == ["inputs", *(f"block.{i}" for i in range(8))]


def test_without_repeats_each_child_is_a_piece():
    made = GraphBuilder("Plain")
    with made.module("", "Plain"):
        x = made.input("x", (2, 4), "float32")
        for name, ops in (("stem", 1), ("body", 3), ("head", 2)):
            with made.module(name, name.title()):
                for index in range(ops):
                    x = made.op(f"{name}_{index}", x)
    assert [p.name for p in pieces_of(made.graph(), 1)][:2] == ["inputs", "stem"]
    assert {p.block for p in pieces_of(made.graph(), 1)} == {"inputs", "stem", "body", "head"}


def test_a_module_called_again_gets_a_number():
    made = GraphBuilder("Shared")
    x = made.input("x", (2, 4), "float32")
    for _ in range(3):
        with made.module("layer", "Layer"):
            x = made.op("f", made.op("e", x, params=(made.weight("w", 4),)))
    names = [p.name for p in pieces_of(made.graph(), 1)]
    assert {"layer", "layer#2", "layer#3"} <= set(names) or len(names) > 4


@pytest.mark.parametrize("graph", MODELS, ids=lambda g: g.model)
def test_candidates_are_legal_and_between_two_something_is_computed(graph: ProxyGraph):
    costs, cuts = op_costs(graph, TOY), find_cuts(graph)
    tried = candidates(graph, costs, cuts, units(graph, costs, 4, cuts)).tolist()
    assert tried == sorted(set(tried))
    assert all(cuts.legal[tried])
    for a, b in pairwise([0, *tried, len(graph.ops)]):
        assert any(op.kind not in ("input", "attribute") for op in graph.ops[a:b])


def test_too_many_candidates_are_thinned_to_cheap_cuts_all_along():
    graph = gpt(60)
    costs, cuts = op_costs(graph, TOY), find_cuts(graph)
    pieces = units(graph, costs, 60, cuts)
    everything, thin = (candidates(graph, costs, cuts, pieces, cap=cap) for cap in (2000, 40))
    assert set(thin) <= set(everything)
    assert 20 <= len(thin) <= 40
    assert max(b - a for a, b in pairwise([0, *thin.tolist(), len(graph.ops)])) < len(graph.ops) / 8
    assert cuts.live_bytes[thin].mean() <= cuts.live_bytes[everything].mean()
