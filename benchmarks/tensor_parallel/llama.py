"""Step of a small Llama over 2 ranks: ours, DTensor's ``parallelize_module`` and transformers' own ``tp_plan``.

One process of a job. All train the same weights on the same batch with AdamW, and take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from merak_like import auto_parallel

LAYERS, HIDDEN, HEADS, SEQ, SAMPLES, LR = 6, 384, 6, 128, 8, 1e-4
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")
Step = Callable[[], float]


def model() -> LlamaForCausalLM:
    """The same weights for everybody."""
    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=1000, max_position_embeddings=SEQ, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def batch() -> dict[str, torch.Tensor]:
    """Random tokens, always the same."""
    ids = torch.randint(0, 1000, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def ours(shares: int) -> Step:
    """The engine; with shares, one's sums run under another's compute."""
    engine = auto_parallel(
        model(), 1, 1, dist.get_world_size(), example=batch(), micro_batches=1, tp_shares=shares, device="cpu",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR), hardware="a100-80gb",
    )  # fmt: skip
    return lambda: engine.step(batch()).loss


def loop(sharded: Any) -> Step:
    """What one writes around a model that is sharded already."""
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=LR, foreach=False)

    def step() -> float:
        loss = sharded(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def dtensor() -> Step:
    """Column and row halves of every layer, by hand."""
    whole = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in whole.model.layers:
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in COLUMNS}
        plan |= {name: RowwiseParallel() for name in ROWS}
        parallelize_module(layer, mesh, plan)
    return loop(whole)


def tp_plan() -> Step:
    """transformers' table for Llama, applied while it loads. Only rank 0 writes files."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        model().save_pretrained(shared[0])
        dist.barrier()
        sharded = LlamaForCausalLM.from_pretrained(shared[0], distributed_config=DistributedConfig(tp_plan="auto"))
        dist.barrier()
        sharded.config.use_cache = False
        return loop(sharded.train())


CONTENDERS: dict[str, Callable[[], Step]] = {
    "ours": lambda: ours(1), "ours, 2 shares": lambda: ours(2), "DTensor parallelize_module": dtensor,
    "transformers tp_plan": tp_plan,
}  # fmt: skip


def main() -> None:
    """Medians over rounds of the slower rank's wall time and of the busier one's CPU time, and of ratios in a round."""
    out, rounds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = {name: make() for name, make in CONTENDERS.items()}
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    names, first = list(steps), losses["ours"]
    assert all(abs(a - b) < 1e-3 for own in losses.values() for a, b in zip(own, first, strict=True)), losses
    seconds, busy = ({name: list[float]() for name in names} for _ in range(2))
    for turn in range(rounds):
        for name in (names[turn % len(names) :] + names)[: len(names)]:
            dist.barrier()
            begin, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            found = torch.tensor([time.perf_counter() - begin, time.process_time() - cpu], dtype=torch.float64)
            dist.all_reduce(found, dist.ReduceOp.MAX)
            seconds[name].append(found[0].item())
            busy[name].append(found[1].item())
    peers = [name for name in names if not name.startswith("ours")]

    def ratio(times: dict[str, list[float]], name: str) -> float:
        best = min(peers, key=lambda peer: statistics.median(times[peer]))
        return statistics.median(a / b for a, b in zip(times[name], times[best], strict=True))

    if dist.get_rank() == 0:
        rows = {
            name: {
                "milliseconds": round(1e3 * statistics.median(seconds[name]), 1),
                "CPU milliseconds": round(1e3 * statistics.median(busy[name]), 1),
                "to the best peer": round(ratio(seconds, name), 3),
                "to the best peer, CPU": round(ratio(busy, name), 3),
            }
            for name in names
        }
        setting = {"layers": LAYERS, "hidden": HIDDEN, "sequence": SEQ, "samples": SAMPLES, "rounds": rounds}
        out.write_text(json.dumps({"setting": setting, "rows": rows}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
