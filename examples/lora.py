"""Fine-tune a pretrained causal language model with LoRA over data- and pipeline-parallel ranks, then merge.

    python examples/lora.py FOLDER_OF_A_MODEL texts.jsonl
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/lora.py FOLDER_OF_A_MODEL texts.jsonl --pp 2

Every line of ``texts.jsonl`` is ``{"text": ...}``. ``runs/lora/merged`` is then a model that needs no PEFT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from merak_like.hf import lora
from merak_like.runtime.initialize import rank
from merak_like.trainer.config import Data, Lora, Model, Run
from merak_like.trainer.run import start
from merak_like.trainer.settings import Optimizer, Parallelism, Schedule, Training


def main() -> None:
    """Train the additions and add them to the weights."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("texts")
    for name, default in (("dp", 1), ("pp", 1), ("steps", 100)):
        options.add_argument(f"--{name}", type=int, default=default)
    asked = options.parse_args()
    run = Run(
        model=Model(path=asked.model),
        data=Data(train=asked.texts, seq=256),
        training=Training(steps=asked.steps, batch=8),
        parallelism=Parallelism(dp=asked.dp, pp=asked.pp),
        optimizer=Optimizer(lr=2e-4),
        schedule=Schedule(name="cosine", warmup=0.05),
        lora=Lora(r=16, alpha=32, dropout=0.05),
        folder=Path("runs/lora"),
    )
    start(run)
    if rank() == 0:
        lora.merge(asked.model, run.folder / "model", run.folder / "merged")


if __name__ == "__main__":
    main()
