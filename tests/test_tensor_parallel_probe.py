"""Blocks alone, in a tiny form of the same code: what is right is believed, what is wrong is found and stays whole."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel import OUTSIDE, DerivedBlock, alone, derive
from merak_like.partitioner.tensor_parallel.follow import follow
from merak_like.partitioner.tensor_parallel.placed import places, resized
from merak_like.partitioner.tensor_parallel.probe import EXACT
from merak_like.partitioner.tensor_parallel.prove import Proven, prove
from merak_like.partitioner.tensor_parallel.tiny import elements, tiny
from merak_like.partitioner.tensor_parallel.units import tensors, units
from merak_like.partitioner.tracer.fine import fine_trace, steps
from tests.tensor_parallel_models import Subject, named_case, subject
from tests.zoo.case import mean_square
from tests.zoo.hugging_face import CASES

FAMILIES = "llama t5 falcon phi3 mixtral whisper deberta_v2".split()


def proof(made: Subject) -> Proven:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prove(made.model, made.trace, made.derived, made.batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_distinct_block_is_proven_in_its_tiny_form(name: str) -> None:
    made = named_case(name, 4)
    proven = proof(made)
    assert proven.derived == made.derived
    assert proven.blocks.keys() == set(made.derived.kinds)
    assert proven.worst < EXACT
    assert {found.way for found in proven.blocks.values()} <= {"tiny", "nothing is sharded"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(FAMILIES)))
def test_so_are_those_of_every_named_case(name: str) -> None:
    for tp in (2, 4):
        made = named_case(name, tp)
        proven = proof(made)
        assert proven.derived == made.derived
        assert proven.worst < EXACT


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_so_they_are_at_their_real_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "SMALL", 0)
    proven = proof(named_case(name))
    assert proven.worst < EXACT
    assert {found.way for found in proven.blocks.values()} == {"real size"}


def without(part: str, block: DerivedBlock) -> DerivedBlock:
    """A mistake: a block that forgets something."""
    empty = () if part in ("shared", "partial_gradients") else {}
    return replace(block, groups=tuple(replace(group, **{part: empty}) for group in block.groups))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "part", "told"),
    [
        ("llama", "reduced", "the first step that differs is add "),
        ("llama", "entered", "only gradients differ"),
        ("qwen3", "partial_gradients", "gradient of .*_norm.weight"),
        ("gpt2", "shared", "the first step that differs is addmm"),
        ("olmo2", "forms", "the first step that differs is mean"),
    ],
)
def test_a_mistake_is_found_where_it_is_and_the_block_stays_whole(name: str, part: str, told: str) -> None:
    made = named_case(name)
    first = made.derived.kinds[0]
    wrong = tuple(
        without(part, block) if kind == first else block
        for block, kind in zip(made.derived.blocks, made.derived.kinds, strict=True)
    )
    with pytest.warns(UserWarning, match=f"stays whole over tp = 2: sharded it is not the same.*{told}"):
        proven = prove(made.model, made.trace, replace(made.derived, blocks=wrong), made.batch)
    believed = proven.derived
    assert not believed.blocks[0].weights
    assert "sharded it is not the same" in believed.blocks[0].whole[next(iter(made.derived.blocks[0].weights))]
    assert believed.blocks[-1] == made.derived.blocks[-1]
    assert proven.worst < EXACT
    assert proven.failed.keys() == {made.derived.blocks[0].name}


def test_what_can_be_run_in_no_form_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = named_case("llama")
    monkeypatch.setattr(alone, "SMALL", 0)
    monkeypatch.setattr(alone, "REAL", 0)
    with pytest.warns(UserWarning, match="could not be probed"):
        proven = prove(made.model, made.trace, made.derived, made.batch)
    assert not proven.derived.weights


def giant() -> Subject:
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80,
        vocab_size=128256, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).train()
    return subject(model, {n: torch.zeros(1, 4096, dtype=torch.int64) for n in ("input_ids", "labels")}, 8)


def test_seventy_billion_parameters_are_proven_in_ten_seconds_and_two_gigabytes() -> None:
    made = giant()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    proven = proof(made)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e6  # kB
    assert proven.worst < EXACT
    assert [found.way for found in proven.blocks.values()] == ["tiny", "tiny"]


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "t5"])
def test_the_tiny_form_is_the_block_with_shorter_axes(name: str) -> None:
    made = named_case(name)
    code = steps(made.trace)
    known, unit = tensors(made.trace.graph, code, made.trace.constants), units(made.trace.graph, code)[0]
    block, followed = made.derived.blocks[0], follow(unit, known)
    place = places(followed, block)
    _, same = resized(block, followed, followed.axes, 2)
    assert (same.weights, same.values) == (block.weights, block.values)
    assert [group.sliced for group in same.groups] == [group.sliced for group in block.groups]
    axes = tiny(followed, block, place, 2, {})
    assert elements(followed, axes) < elements(followed, followed.axes)
    _, small = resized(block, followed, axes, 2)
    assert small.weights.keys() == block.weights.keys()
    assert small.groups[0].reduced == block.groups[0].reduced


class Odd(nn.Module):
    """Needs its sizes: a padding, and rows picked from a table by a sum that only the real size allows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.table = nn.Linear(96, 64), nn.Linear(64, 96), nn.Parameter(torch.randn(70, 96))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]) + 50
        x = nn.functional.pad(x + self.table[places], (0, 0, 3, 0))[:, 3:]
        return self.down(self.up(x).relu())


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_an_index_beyond_a_shorter_table_gets_its_table_back() -> None:
    torch.manual_seed(0)
    made = subject(Stack(Odd), {"x": torch.randn(2, 20, 96)}, 2, lambda output, _: mean_square(output))
    proven = proof(made)
    assert made.derived.share > 0.6
    assert proven.worst < EXACT
    assert proven.blocks[0].way == "tiny"


def test_a_weight_that_was_refused_is_not_sharded_and_says_why() -> None:
    made = named_case("llama")
    name = next(iter(made.derived.blocks[0].weights))
    derived = derive(made.trace.graph, steps(made.trace), 2, constants=made.trace.constants, whole={name: "a reason"})
    assert "a reason" in derived.blocks[0].whole[name]
    assert derived.kept == {name: "a reason"}
    assert derived.blocks[1] == made.derived.blocks[1]


def test_a_model_on_the_meta_device_needs_no_weights() -> None:
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, use_cache=False)).train()
    batch = {name: torch.zeros(1, 64, dtype=torch.int64) for name in ("input_ids", "labels")}
    traced = fine_trace(model, batch)
    proven = prove(model, traced, derive(traced.graph, steps(traced), 4, constants=traced.constants), batch)
    assert proven.worst < EXACT
    assert proven.derived.blocks[-1].name == OUTSIDE
