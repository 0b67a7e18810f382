"""How long does tracing take, and how much memory? Models on the meta device, the largest first to hurt."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import platform
import resource
import subprocess
import sys
import time

import torch
from torch import nn

from merak_like.partitioner.tracer import trace


def llama_70b() -> nn.Module:
    """The configuration of Llama 3.1 70B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256, use_cache=False,
        )
    )  # fmt: skip


def gpt_1000() -> nn.Module:
    """A thousand layers as wide as GPT-3."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1000, n_embd=12288, n_head=96, n_positions=1024, use_cache=False))


MODELS = {"llama-70b": (llama_70b, (4, 2048)), "gpt-1000-layers": (gpt_1000, (1, 1024))}


def measure(name: str) -> None:
    """One row of the table. A fresh process, so that the peak of memory is this model's."""
    make, shape = MODELS[name]
    with torch.device("meta"):
        model = make().train()
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.zeros(shape, dtype=torch.long)
    wall, process = time.perf_counter(), time.process_time()
    graph = trace(model, {"input_ids": ids, "labels": ids}).graph
    wall, process = time.perf_counter() - wall, time.process_time() - process
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(p.numel for p in graph.parameters if not p.buffer)
    print(
        f"| {name} | {weights / 1e9:.1f} | {len(graph.ops)} | {wall:.1f} | {process:.1f} | {peak / 1e6:.2f} | "
        f"{imported / 1e6:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, help="only this one, in this process")
    model = parser.parse_args().model
    if model is not None:
        measure(model)
        return
    print(f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, {os.cpu_count()} cores\n")
    print("| model | 1e9 parameters | ops | wall s | process s | peak RSS GB | of which before tracing |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for name in MODELS:
        subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == "__main__":
    main()
