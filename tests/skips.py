"""A model whose values skip stages and whose weights are tied, its plans, and their dry runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.tracer import trace
from merak_like.runtime.dry_run import proof
from merak_like.runtime.dry_run.whole import dry_run
from tests.graphs import TOY

WIDTH, ROWS = 8, 2


class Skips(nn.Module):
    """Four layers with dropout; the first value is read by all of them, and the first weight is the last one's too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.drop = nn.Dropout(0.1)
        self.layers[7].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            x = self.drop(layer(x)) + kept
        return x


def squares(out: torch.Tensor, batch: Any) -> torch.Tensor:
    return out.square().mean()


def planned(pp: int = 2, dp: int = 2, micro_batches: int = 4, **options: Any) -> Plan:
    graph = trace(Skips(), torch.ones(ROWS, WIDTH), squares).graph
    return make_plan(
        graph, Mesh(dp, pp), hardware=TOY, batch=ROWS * dp * micro_batches, micro_batches=micro_batches, **options
    )


def proved(plan: Plan, **options: Any) -> proof.Proof:
    return dry_run(plan, Skips(), torch.ones(ROWS, WIDTH), squares, **options)
