"""One tensor-parallel rank of a traced model: its bytes are those that Korthikanti et al. 2022 derive by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from merak_like.hf import from_config
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import STATES

HIDDEN, TOKENS, HEADS = 256, 128, 8
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 3, "n_embd": HIDDEN, "n_head": HEADS,
    "vocab_size": 512, "n_positions": TOKENS, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "hidden_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 512,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@cache
def sources(name: str) -> Sources:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"gpt2": GPT2, "llama": LLAMA}[name]))
        made = from_config(folder, batch=1, seq=TOKENS, dtype="bfloat16")
    return Sources.of(*made)


def saved(tp: int, software: Software, sequence_parallel: bool) -> float:
    """Bytes that the second block keeps, in multiples of tokens times hidden size."""
    graph = sources("gpt2").rank(tp, software, sequence_parallel=sequence_parallel)
    block = next(call for call in graph.calls if call.path == "transformer.h.1")
    return sum(op.saved_bytes for op in graph.ops[block.first : block.stop]) / (TOKENS * HIDDEN)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_block_keeps_the_bytes_of_the_paper(tp: int):
    """Korthikanti et al. 2022, equations 1 to 4 and sec. 5; the statistics of two norms come on top."""
    scores, norms = 5 * HEADS * TOKENS / HIDDEN, 16 * 2 / HIDDEN
    math, again = Software("fused", "math"), Software("fused", "math", selective=True)
    assert saved(tp, math, False) == pytest.approx(10 + 24 / tp + scores / tp, abs=norms)
    assert saved(tp, again, False) == pytest.approx(10 + 24 / tp, abs=norms)
    if tp > 1:
        assert saved(tp, math, True) == pytest.approx((34 + scores) / tp, abs=norms)
        assert saved(tp, again, True) == pytest.approx(34 / tp, abs=norms)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_ranks_together_do_the_work_of_one(name: str, kernels: str):
    software = Software(kernels)
    alone = sources(name).rank(1, software)  # two key-value heads on four ranks are there twice
    for tp in (2, 4):
        graph = sources(name).rank(tp, software)
        matmuls = [sum(op.flops for op in g.ops if op.flops > op.moved_bytes) for g in (alone, graph)]
        assert matmuls[0] * 0.99 <= matmuls[1] * tp <= matmuls[0] * 1.12
        whole = sum(p.numel for p in alone.parameters if len(p.shape) > 1 and not p.buffer)
        part = sum(p.numel for p in graph.parameters if len(p.shape) > 1 and not p.buffer)
        assert whole / tp <= part <= whole / tp * 1.12


def test_a_block_sums_twice_each_way():
    """Shoeybi et al. 2019, sec. 3: two all-reduces forward and two backward, of one activation each."""
    graph = sources("gpt2").rank(4, Software("fused"))
    block = next(call for call in graph.calls if call.path == "transformer.h.1")
    sums = [sum_ for op in graph.ops[block.first : block.stop] for sum_ in op.collectives]
    assert [(s.degree, s.nbytes, s.backward) for s in sums if not s.backward] == [(4, 2 * TOKENS * HIDDEN, False)] * 2
    assert [(s.degree, s.nbytes, s.backward) for s in sums if s.backward] == [(4, 2 * TOKENS * HIDDEN, True)] * 2
    products = [
        2 * TOKENS * HIDDEN * width * HIDDEN // 4 for width in (3, 4)
    ]  # queries, keys, values; the first of two
    assert [s.beside for s in sums] == [products[0], 0, products[1], 0]


def test_a_degree_that_does_not_divide_the_model_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"tp = 3: 3 ranks divide 0% of the weights.*use tp = 2"):
        sources("gpt2").rank(3, Software())


def plan(mesh: Mesh, **options: Any) -> Plan:
    made = sources("gpt2")
    given = {
        "hardware": "a100-80gb",
        "batch": 16,
        "micro_batch": 2,
        "sources": made,
        "states": STATES["adamw-megatron"],
    }
    return make_plan(made.graph, mesh, **{**given, "software": Software("fused", "math"), **options})


def test_a_plan_counts_what_comes_after_the_pipeline():
    made = plan(Mesh(4, 2, 2))
    assert set(made.after) == {"reduction", "ties", "optimizer", "host"}
    assert made.step_seconds == made.pipeline_seconds + sum(made.after.values()) > made.pipeline_seconds
    assert 0 < made.mfu < 1
    assert Plan.from_json(made.to_json()) == made
    assert [sum(v for k, v in rank.items() if k != "total") for rank in made.memory_bytes] == list(made.rank_bytes)


def test_zero_divides_states_and_the_sequence_form_activations():
    whole, shared = (plan(Mesh(4, 1, 2), zero=zero).memory_bytes[0] for zero in (0, 1))
    assert shared["optimizer"] == pytest.approx(whole["optimizer"] / 4, rel=1e-3)
    assert shared["gradients"] == whole["gradients"]
    all_shared = plan(Mesh(4, 1, 2), zero=3).memory_bytes[0]
    assert all_shared["weights"] == pytest.approx(whole["weights"] / 4, rel=1e-3)
    parted = plan(Mesh(4, 1, 2), sequence_parallel=True).memory_bytes[0]
    assert parted["activations"] < whole["activations"]
    with pytest.raises(ValueError, match="tp is 1"):
        plan(Mesh(4, 1, 1), sequence_parallel=True)
    with pytest.raises(ValueError, match="zero = 4"):
        plan(Mesh(4, 1, 1), zero=4)


def test_recompute_by_blocks_keeps_what_enters_a_block():
    """Korthikanti et al. 2022: 2 bytes for each token, hidden element and layer; one block is open at a time."""
    made = plan(Mesh(8, 1, 2), recompute="blocks", micro_batch=2)
    kept = made.memory_bytes[0]["activations"]
    assert kept == pytest.approx(2 * 2 * TOKENS * HIDDEN * (GPT2["n_layer"] + 1), rel=0.2)
    assert made.pipeline_seconds > plan(Mesh(8, 1, 2), recompute="none").pipeline_seconds


def test_faster_links_and_fewer_ranks_cost_less_talk():
    fast = plan(Mesh(1, 1, 4)).pipeline_seconds
    from merak_like.partitioner.hardware import Link, hardware_named

    slow = replace(hardware_named("a100-80gb"), intra=Link(1e9, 1e-5))
    assert plan(Mesh(1, 1, 4), hardware=slow).pipeline_seconds > fast
    alone = [plan(Mesh(1, 1, 1), hardware=h).pipeline_seconds for h in (slow, "a100-80gb")]
    assert alone[0] == alone[1]


def test_recompute_by_blocks_leaves_the_head_alone():
    """Megatron-LM computes transformer layers again; embeddings and the output layer never."""
    made = plan(Mesh(8, 1, 1), recompute="blocks", micro_batch=2)
    again = {unit.block for unit in made.units if unit.name in made.stages[0].recompute}
    assert again == {f"transformer.h.{layer}" for layer in range(GPT2["n_layer"])}
    assert 0 < made.stages[0].recompute_seconds < made.stages[0].forward_seconds
