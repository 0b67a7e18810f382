"""How much memory does an edge need, beside a process that fine-tunes the whole model? Linux.

    OMP_NUM_THREADS=1 python -m benchmarks.split.memory

A BERT of four layers of which the edge owns one, from a folder of safetensors; two steps of AdamW. What counts is the
peak of a process's resident memory above what it holds once everything is imported.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from merak_like.cli.halves import half_source
from merak_like.split.edge import Edge
from merak_like.split.forecast import forecast
from merak_like.split.host import Host
from merak_like.split.messages import OptimizerText, Task

WIDTH, LAYERS, WORDS, BATCH, TOKENS, STEPS = 768, 4, 1000, 16, 64, 2
CUT = "bert.encoder.layer.0:bert.pooler.dense"
TASK = Task(cut=CUT, micro_batches=4, window=2, checkpoint_every=1000, optimizer=OptimizerText(lr=1e-4))


def main() -> None:
    """Print the table."""
    found = compare()
    print("| memory at most, MB | the whole model, one process | the edge | share |\n| --- | ---: | ---: | ---: |")
    for name in ("resident", "tensors"):
        whole, edge = found["whole"][name] / 1e6, found["edge"][name] / 1e6
        print(f"| {name} | {whole:,.1f} | {edge:,.1f} | {edge / whole:.0%} |")
    print(f"\nForecast of the edge: {found['edge']['forecast'] / 1e6:,.1f} MB, with activations and what waits.")


def compare() -> dict[str, dict[str, float]]:
    """Bytes of both, each in a process of its own; the host is in this one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "model")
        source = half_source(str(folder / "model"), task=None, weights=None)
        with Host(source, CUT, listen="127.0.0.1:0", folder=folder / "host") as host:
            return {who: measured(who, folder, host.port) for who in ("whole", "edge")}


def measured(who: str, folder: Path, port: int) -> dict[str, float]:
    """What a process says of itself."""
    command = [sys.executable, "-m", "benchmarks.split.memory", who, str(folder), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def make(folder: Path) -> None:
    """The checkpoint."""
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=12,
        intermediate_size=4 * WIDTH, max_position_embeddings=TOKENS, num_labels=2,  # pyright: ignore[reportCallIssue]
        architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


def whole(folder: Path) -> dict[str, float]:
    """Fine-tune all of it here, in as many micro-batches."""
    before = resident()
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(STEPS):
        for i in range(TASK.micro_batches):
            part = {name: t[i :: TASK.micro_batches] for name, t in batch().items()}
            (model(**part).loss / TASK.micro_batches).backward()
        optimizer.step()
        if _ < STEPS - 1:
            optimizer.zero_grad()
    return {"resident": peak() - before, "tensors": held(model, optimizer)}


def edge(folder: Path, port: int) -> dict[str, float]:
    """The edge's part of the same."""
    before = resident()
    source = half_source(str(folder / "model"), task=None, weights=None)
    with Edge(source, TASK, batch(), connect=f"127.0.0.1:{port}", folder=folder / "edge") as mine:
        for _ in range(STEPS):
            mine.step(batch())
        made = mine.training.made
        found: dict[str, float] = {
            "resident": peak() - before, "tensors": held(made.model, made.engine.optimizer)
        }  # fmt: skip
    return found | {"forecast": forecast(source, TASK, batch()).edge_bytes}


def batch() -> dict[str, Tensor]:
    """Any."""
    ids = torch.randint(1, WORDS, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def held(model: nn.Module, optimizer: Any) -> float:
    """Bytes of weights, gradients and what the optimizer keeps."""
    real = [p for p in (*model.parameters(), *model.buffers()) if not p.is_meta]
    grads = [p.grad for p in real if p.grad is not None]
    states: Iterable[Any] = (x for state in optimizer.state.values() for x in state.values())
    return float(sum(t.nbytes for t in (*real, *grads, *(x for x in states if isinstance(x, Tensor)))))


def resident() -> float:
    """Bytes resident now."""
    return _status("VmRSS")


def peak() -> float:
    """The most bytes that were ever resident."""
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "whole":
        print(json.dumps(whole(Path(sys.argv[2]))))
    else:
        print(json.dumps(edge(Path(sys.argv[2]), int(sys.argv[3]))))
