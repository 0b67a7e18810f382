"""Train a module of your own, on two pipeline stages, with a loss of your own.

OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/own_model.py --pp 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import Evaluation, Optimizer, Parallelism, Schedule, Settings, Training


class Mixer(nn.Module):
    """Blocks with skip connections: nothing that says where to cut."""

    def __init__(self, width: int = 64, depth: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.enter = nn.Linear(16, width)
        layers = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.blocks = nn.ModuleList(layers)
        self.leave = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


def samples(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Points, and which of ten fixed centres is nearest."""
    centres = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    points = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return list(zip(points, torch.cdist(points, centres).argmin(1), strict=True))


options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in (("dp", 1), ("pp", 1), ("steps", 200)):
    options.add_argument(f"--{name}", type=int, default=default)
asked = options.parse_args()
torch.manual_seed(0)  # the same weights on every rank
settings = Settings(
    training=Training(steps=asked.steps, batch=64),
    parallelism=Parallelism(dp=asked.dp, pp=asked.pp),
    optimizer=Optimizer(lr=3e-3),
    schedule=Schedule(name="cosine", warmup=0.05),
    evaluation=Evaluation(every=100),
    folder=Path("runs/own-model"),
)
loss_fn = lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1])  # noqa: E731
trainer = Trainer(Mixer(), settings, samples(4096, 1), samples(512, 2), loss_fn=loss_fn)
trainer.train()
trainer.close()
