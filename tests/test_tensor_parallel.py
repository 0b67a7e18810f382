"""Sharding derived from the graph alone: what it says of known models, and that the numbers agree.

A probe runs the whole model on every rank's parts in one process, in float64, and compares loss and every gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel import OUTSIDE, Axis, Derived, DerivedBlock, Segments, derive
from merak_like.partitioner.tensor_parallel.layout import is_sharded
from merak_like.partitioner.tensor_parallel.probe import probe
from merak_like.partitioner.tensor_parallel.rules import RULES
from merak_like.partitioner.tensor_parallel.rules.elementwise import elementwise
from merak_like.partitioner.tracer.fine import fine_trace, steps
from tests.tensor_parallel_models import Subject, named_case, subject
from tests.zoo.case import mean_square
from tests.zoo.hugging_face import CASES

EXACT = 1e-8


def sharded(block: DerivedBlock) -> dict[str, int]:
    """The dimension of every sharded weight of a block, by its name in the block."""
    return {
        name.removeprefix(f"{block.name}."): next(i for i, factors in enumerate(layout) if is_sharded(factors))
        for name, layout in block.weights.items()
    }


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
    vocabulary = made.model.lm_head.out_features
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
    start = time.perf_counter()
    derived = derive(traced.graph, steps(traced), 8)
    assert time.perf_counter() - start < 2
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


# ------------------------------------------------------------------------------------------------------------- toys
class Toy(nn.Module):
    """Two alike blocks of a function over a width of 8."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def toy(block: Callable[[], nn.Module], x: Tensor | None = None, tp: int = 2) -> Subject:
    torch.manual_seed(0)
    batch = {"x": torch.randn(2, 3, 8) if x is None else x}
    return subject(Toy(block), batch, tp, lambda output, _: mean_square(output))


class Mlp(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(8, width), nn.Linear(width, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


def test_an_operation_without_a_rule_is_counted_and_pins() -> None:
    made = toy(lambda: Mlp(torch.sinc))
    assert made.derived.blocks[0].unknown == {"sinc": 1}
    assert made.derived.share == 0.0
    assert "sinc has no rule" in made.derived.blocks[0].whole["blocks.0.up.weight"]
    assert made.probe().worst < EXACT


def test_a_row_more_in_the_table_is_all_it_takes() -> None:
    made = toy(lambda: Mlp(torch.sinc))
    rules = {**RULES, "sinc": elementwise}
    derived = derive(made.trace.graph, steps(made.trace), 2, rules=rules)
    assert derived.share == 1.0
    assert probe(made.model, made.trace, derived, made.batch).worst < EXACT


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Centered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(-1, keepdim=True)


def test_a_custom_function_is_asked_whether_it_works_element_by_element() -> None:
    one, other = toy(lambda: Mlp(lambda x: Cube.apply(x))), toy(lambda: Mlp(lambda x: Centered.apply(x)))
    assert (one.derived.share, one.derived.blocks[0].unknown) == (1.0, {})
    assert (other.derived.share, other.derived.blocks[0].unknown) == (0.0, {"Centered": 1})
    assert max(one.probe().worst, other.probe().worst) < EXACT


def test_a_width_that_does_not_divide_stays_whole_and_says_so() -> None:
    made = toy(lambda: Mlp(torch.relu, width=9))
    assert made.derived.share == 0.0
    assert "9 does not divide by 2" in made.derived.blocks[0].whole["blocks.0.up.weight"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16)
        self.deep, self.down = nn.Conv1d(16, 16, 3, padding=1, groups=16), nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.deep(self.norm(self.up(x)).relu()))


def test_channels_of_convolutions_are_separable() -> None:
    made = toy(Convolutions, torch.randn(2, 8, 5))
    assert sharded(made.derived.blocks[0])["deep.weight"] == 0
    assert made.derived.blocks[0].weights["blocks.0.norm.running_mean"] == ((Axis(16, 2),),)
    assert made.derived.share == 1.0
    assert made.probe().worst < EXACT


class Joined(nn.Module):
    """Half of what is summed over could be sharded, the other half could not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side, self.down = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([self.up(x).relu(), self.side(x).softmax(-1)], -1))


def test_a_sum_over_a_half_sharded_row_is_refused() -> None:
    made = toy(Joined)
    assert made.derived.share == 0.0
    assert made.probe().worst < EXACT


class FewKeys(nn.Module):
    """Multi-query attention: one head of keys and values for four of queries, all in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 12), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([8, 2, 2], -1)
        q = q.view(*x.shape[:2], 4, 2).transpose(1, 2)
        scores = (q @ k.unsqueeze(1).mT).softmax(-1)
        return self.out((scores @ v.unsqueeze(1)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tp", [2, 4])
def test_the_one_head_of_keys_is_on_every_rank(tp: int) -> None:
    made = toy(FewKeys, tp=tp)
    ((rows, *_), _) = made.derived.blocks[0].weights["blocks.0.qkv.weight"]
    assert isinstance(rows, Segments)
    assert [is_sharded(part) for part in rows.parts] == [True, False, False]
    assert made.probe().worst < EXACT


class Written(nn.Module):
    """Results are written into a buffer made in the forward, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        out = torch.zeros_like(y)
        out[:, 1:] = y[:, :-1]
        return self.down(out)


def test_a_buffer_that_is_written_into_has_the_axes_of_what_is_written() -> None:
    made = toy(Written)
    assert made.derived.share == 1.0
    assert made.probe().worst < EXACT


class Shared(nn.Module):
    """One weight used forwards in one block and backwards in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.blocks = nn.Parameter(torch.randn(8, 8)), nn.ModuleList([Mlp(torch.relu), Mlp(torch.relu)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.blocks[0](x), self.weight)
        return self.blocks[1](x @ self.weight)


def test_a_weight_shared_by_units_lies_one_way_or_whole() -> None:
    torch.manual_seed(0)
    made = subject(Shared(), {"x": torch.randn(2, 3, 8)}, 2, lambda output, _: mean_square(output))
    assert made.derived.share == 1.0
    assert made.probe().worst < EXACT


def test_a_group_of_no_ranks_is_refused() -> None:
    made = toy(lambda: Mlp(torch.relu))
    with pytest.raises(ValueError, match="tp = 0 is no number of ranks"):
        derive(made.trace.graph, steps(made.trace), 0)


def test_one_rank_needs_nothing() -> None:
    made = toy(lambda: Mlp(torch.relu), tp=1)
    assert isinstance(made.derived, Derived)
    assert not made.derived.weights
    assert sum(block.forward_bytes + block.backward_bytes for block in made.derived.blocks) == 0
