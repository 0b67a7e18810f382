"""Pre-train a small Llama on Python's own documentation with the ready-made loop.

python examples/pretrain.py
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/pretrain.py --pp 2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from python_text import CONTEXT, VOCABULARY, prepared
from transformers import LlamaConfig, LlamaForCausalLM

from merak_like.runtime.initialize import rank
from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import Checkpoints, Evaluation, Optimizer, Parallelism, Schedule, Settings, Training

SMALL: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4
}  # fmt: skip


def main() -> None:
    """Prepare, train, say how well."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dp", 1), ("pp", 1), ("tp", 1), ("steps", 100)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--runs", type=Path, default=Path("runs"))
    asked = options.parse_args()
    _, rows = prepared(asked.runs, rank())
    data = {name: [{"input_ids": row, "labels": row} for row in part] for name, part in rows.items()}
    with torch.device("meta"):  # no memory here: each rank makes the weights of its own stage
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **SMALL))
    settings = Settings(
        training=Training(steps=asked.steps, batch=8),
        parallelism=Parallelism(dp=asked.dp, pp=asked.pp, tp=asked.tp),
        optimizer=Optimizer(lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        schedule=Schedule(name="cosine", warmup=0.1, end=0.1),
        evaluation=Evaluation(every=50, batches=16),
        checkpoints=Checkpoints(best=True),
        folder=asked.runs / "pretrain",
    )
    trainer = Trainer(model, settings, data["train"], data["valid"])
    trainer.train()
    trainer.save(asked.runs / "pretrain" / "model")
    trainer.close()


if __name__ == "__main__":
    main()
