"""Plan three real models without allocating a weight: tables here, a plan and a page for each in runs/.

    python examples/plan_three.py                # about half a minute
    python examples/plan_three.py --only gpt2-xl

Needs transformers (``pip install 'merak-like[hf]'``), no GPU and no network.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, T5Config

from merak_like.hf import from_config
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.report.page import page
from merak_like.partitioner.report.table import render
from merak_like.partitioner.tracer import trace


@dataclass(frozen=True)
class Job:
    """A model and the machine it shall be trained on."""

    config: PretrainedConfig
    mesh: Mesh
    hardware: str
    batch: int
    """Samples of one step."""
    micro_batch: int
    seq: int


JOBS = {
    "gpt2-xl": Job(
        GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=1600, n_layer=48, n_head=25),
        Mesh(dp=2, pp=4), "rtx4090", batch=64, micro_batch=1, seq=1024,
    ),
    "t5-large": Job(
        T5Config.from_dict({
            "architectures": ["T5ForConditionalGeneration"], "d_model": 1024, "d_ff": 4096, "num_layers": 24,
            "num_heads": 16, "decoder_start_token_id": 0,
        }),
        Mesh(pp=4), "a100-40gb", batch=64, micro_batch=2, seq=512,
    ),
    "llama-70b": Job(
        LlamaConfig(
            architectures=["LlamaForCausalLM"], hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
            dtype="bfloat16",
        ),
        Mesh(dp=2, pp=16), "h200", batch=256, micro_batch=1, seq=2048,
    ),
}  # fmt: skip


def plan(job: Job, folder: Path) -> Plan:
    """Write the config as Hugging Face does, build the model from it on the meta device, trace it, plan it."""
    job.config.save_pretrained(folder)
    model, example = from_config(folder, batch=job.micro_batch, seq=job.seq)
    graph = trace(model, example).graph
    signature = {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in example.items()}
    return make_plan(
        graph, job.mesh, hardware=job.hardware, batch=job.batch, micro_batch=job.micro_batch, signature=signature
    )  # fmt: skip


def main() -> None:
    """Plan each job, print it, keep it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=JOBS, help="plan one of them")
    options.add_argument("--runs", type=Path, default=Path("runs"), help="where the folders go (default: runs)")
    asked = options.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console(highlight=False) if Console().is_terminal else Console(highlight=False, width=120)
    for name in [asked.only] if asked.only else JOBS:
        folder = asked.runs / f"plan-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        made = plan(JOBS[name], folder)
        took = time.perf_counter() - begin
        made.save(folder / "plan.json")
        (folder / "plan.html").write_text(page(made), encoding="utf-8")
        console.print(Rule(f"{name}: traced and planned in {took:.1f} s"), render(made))
        console.print(f"wrote {folder / 'plan.json'} and {folder / 'plan.html'}\n")


if __name__ == "__main__":
    main()
