"""The planner's seconds, of the processor and not of the clock, for the largest jobs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from merak_like.hf import from_config
from merak_like.partitioner.degrees import choose
from merak_like.partitioner.hardware import PRESETS, hardware_named
from merak_like.partitioner.layouts import Wanted
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import STATES
from tests.graphs import gpt

LLAMA = {"70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}
"""Layers, hidden and inner width, heads of Llama 3.1."""


def sources(name: str, folder: Path) -> Sources:
    layers, hidden, inner, heads = LLAMA[name]
    (folder / "config.json").write_text(
        json.dumps({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
            "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": 8,
            "vocab_size": 128256, "max_position_embeddings": 131072,
            "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
        })
    )  # fmt: skip
    made = from_config(folder, batch=1, seq=4096, dtype="bfloat16")
    return Sources.of(*made)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "world", "bar"), [("70B", 1024, 5.0), ("405B", 16384, 15.0)])
def test_a_full_search_takes_seconds(name: str, world: int, bar: float, tmp_path: Path):
    made, hardware = sources(name, tmp_path), hardware_named("h100")
    begin = time.process_time()
    ranked = choose(
        made, Wanted(world, 2 * world), hardware, Software("fused", "flash"), states=STATES["adamw-megatron"]
    )
    spent = time.process_time() - begin
    assert ranked[0].plan is not None
    assert ranked[0].plan.mesh.size == world
    assert spent <= bar


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("limit", [None, 8 * 10**9])
def test_a_thousand_layers_on_64_stages_take_few_seconds(limit: int | None):
    graph, hardware = gpt(1000, d=1024, s=512, vocabulary=30000, samples=1), PRESETS["a100-80gb"]
    begin = time.process_time()
    made = make_plan(
        graph, Mesh(1, 64), hardware=replace(hardware, devices_per_node=64), batch=64, micro_batches=64,
        memory_limit=limit,
    )  # fmt: skip
    spent = time.process_time() - begin
    assert any(stage.recompute for stage in made.stages) is (limit is not None)
    assert limit is not None or made.bubble < 0.55
    assert spent <= 2.0
