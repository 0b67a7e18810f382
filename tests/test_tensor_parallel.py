"""Sharding derived from the graph alone: what it says of known models, and that the numbers agree.

A probe runs the whole model on every rank's parts in one process, in float64, and compares loss and every gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers

from merak_like.partitioner.tensor_parallel import OUTSIDE, Axis, Derived, DerivedBlock, Segments, derive
from merak_like.partitioner.tensor_parallel.layout import is_sharded
from merak_like.partitioner.tensor_parallel.probe import probe
from merak_like.partitioner.tracer.fine import fine_trace, steps
from merak_like.runtime.tensor_parallel.forms import CrossEntropy, Embedding
from tests.tensor_parallel_models import named_case, sharded
from tests.zoo.hugging_face import CASES

EXACT = 1e-8


# ------------------------------------------------------------------------------------------------------ what it says
def test_a_llama_block_is_sharded_as_megatron_does() -> None:
    made = named_case("llama")
    block, values = made.derived.blocks[1], made.trace.graph.values
    column = "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj".split()
    row = "self_attn.o_proj mlp.down_proj".split()
    assert sharded(block) == {f"{n}.weight": 0 for n in column} | {f"{n}.weight": 1 for n in row}
    (group,) = block.groups
    residual = values["embedding"].nbytes
    assert list(group.reduced.values()) == [residual] * 2
    assert list(group.entered_bytes.values()) == [residual] * 2
    assert sorted(len(uses) for uses in group.entered.values()) == [2, 3]
    assert not group.evened
    assert not group.partial_gradients
    assert set(block.whole) == {f"{block.name}.{n}_layernorm.weight" for n in ("input", "post_attention")}


def test_the_vocabulary_is_sharded_and_the_logits_are_never_gathered() -> None:
    made = named_case("gpt2")
    outside = made.derived.blocks[-1]
    assert outside.name == OUTSIDE
    assert is_sharded(outside.weights["transformer.wte.weight"][0])
    (group,) = outside.groups
    assert set(group.forms.values()) == {"embedding", "cross_entropy"}
    vocabulary = made.model.get_parameter("lm_head.weight").shape[0]
    logits = next(v for v in outside.values if made.trace.graph.values[v].shape[-1] == vocabulary)
    assert logits not in group.reduced
    assert group.inside_bytes[0] < made.trace.graph.values[logits].nbytes


def test_a_fused_projection_shows_its_heads() -> None:
    block = named_case("gpt2").derived.blocks[0]
    layout = block.weights["transformer.h.0.attn.c_attn.weight"]
    assert layout == ((Axis(32),), (Axis(3), Axis(4, 2), Axis(8)))


def test_unequal_parts_show_as_segments() -> None:
    block = named_case("phi3").derived.blocks[0]
    (rows,), _ = block.weights["model.layers.0.self_attn.qkv_proj.weight"]
    assert isinstance(rows, Segments)
    assert rows.parts == ((Axis(2, 2), Axis(16)), (Axis(2, 2), Axis(8)), (Axis(2, 2), Axis(8)))


def test_norms_of_each_head_are_whole_with_gradients_that_add_up() -> None:
    block = named_case("qwen3").derived.blocks[0]
    (group,) = block.groups
    assert {name.rpartition(".self_attn.")[2] for name in group.partial_gradients} == {"q_norm.weight", "k_norm.weight"}


def test_a_norm_over_all_heads_reduces_its_mean() -> None:
    made = named_case("olmo2")
    (group,) = made.derived.blocks[0].groups
    assert list(group.forms.values()).count("mean") == 2
    assert made.derived.share == 1.0


def test_fewer_heads_than_ranks_are_divided_by_two_groups() -> None:
    block = named_case("llama", tp=4).derived.blocks[0]
    assert block.weights["model.layers.0.self_attn.q_proj.weight"][0] == (Axis(2, 2, 2), Axis(2, 2, 1), Axis(8))
    assert block.weights["model.layers.0.self_attn.k_proj.weight"][0] == (Axis(2, 2, 2), Axis(8))
    assert block.weights["model.layers.0.mlp.up_proj.weight"][0] == (Axis(48, 4),)
    assert [(g.degree, g.repeat) for g in block.groups] == [(4, 1), (2, 2), (2, 1)]
    assert len(block.groups[0].reduced) == 2
    assert sum(len(group.reduced) for group in block.groups) == 2


def test_a_router_is_whole_and_its_experts_are_sharded_inside() -> None:
    block = named_case("mixtral").derived.blocks[0]
    assert "model.layers.0.mlp.gate.weight" in block.whole
    assert sharded(block)["mlp.experts.gate_up_proj"] == 1
    assert sharded(block)["mlp.experts.down_proj"] == 2


def test_dropout_of_sharded_values_is_named() -> None:
    made = named_case("bert")
    block = made.derived.blocks[0]
    assert block.random
    assert all(name in block.values for name in block.random)


def test_equal_blocks_are_derived_once() -> None:
    made = named_case("llama")
    assert made.derived.kinds == (0, 0, 0, 0, 4)
    first, last = made.derived.blocks[0], made.derived.blocks[3]
    assert sharded(first) == sharded(last)
    assert not {*first.weights} & {*last.weights}


def test_seventy_billion_parameters_are_derived_in_two_seconds() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80,
        vocab_size=128256, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).train()
    traced = fine_trace(model, {name: torch.zeros(1, 4096, dtype=torch.int64) for name in ("input_ids", "labels")})

    def once() -> tuple[float, Derived]:
        start = time.process_time()
        made = derive(traced.graph, steps(traced), 8)
        return time.process_time() - start, made

    seconds, derived = min((once() for _ in range(2)), key=lambda each: each[0])  # others use the processor too
    assert seconds < 2
    assert derived.share == 1.0
    assert len(set(derived.kinds)) == 2


# ------------------------------------------------------------------------------------------- that the numbers agree
FAMILIES = """llama gpt2 bert opt t5 bloom falcon phi3 gemma2 mixtral qwen3 vit whisper olmo2 mamba gptj deberta_v2 bart
    deepseek_v3 gpt_oss clip swin""".split()


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_equals_whole(name: str, tp: int) -> None:
    found = named_case(name, tp).probe()
    assert found.worst < EXACT, found.where


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(FAMILIES)))
def test_so_it_does_for_every_named_case(name: str, tp: int) -> None:
    found = named_case(name, tp).probe()
    assert found.worst < EXACT, found.where


def without(part: str) -> Callable[[DerivedBlock], DerivedBlock]:
    """A mistake: a block that forgets something."""

    def forget(block: DerivedBlock) -> DerivedBlock:
        empty = () if part in ("shared", "partial_gradients") else {}
        return replace(block, groups=tuple(replace(group, **{part: empty}) for group in block.groups))  # type: ignore[arg-type]

    return forget


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama", "reduced"),
        ("llama", "entered"),
        ("qwen3", "partial_gradients"),
        ("gpt2", "shared"),
        ("olmo2", "forms"),
    ],
)
def test_the_probe_finds_what_is_forgotten(name: str, part: str) -> None:
    made = named_case(name)
    *blocks, outside = made.derived.blocks
    wrong = replace(made.derived, blocks=(*map(without(part), blocks), outside))
    assert probe(made.model, made.trace, wrong, made.batch).worst > 1e-3


# --------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("index", [6, -1])
def test_an_index_that_no_rank_has_is_refused_as_on_one(index: int) -> None:
    """Each rank has some rows or classes; one that lies beyond all of them was a zero, silently."""
    wrong = torch.tensor([1, index])
    with pytest.raises(IndexError):
        Embedding(0, 3, 6)(wrong, torch.zeros(3, 2))
    loss = CrossEntropy(None, "loss", 3, 6, 6)  # type: ignore[arg-type]  # before anything is asked of other ranks
    with pytest.raises(IndexError):
        loss(torch.zeros(2, 3), wrong)
