"""The end of a step: the one global norm, clipping, and the numbers every rank shall see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like.runtime.initialize import World
from merak_like.runtime.watch import Watch


@dataclass(frozen=True)
class StepResult:
    """What one step gave; the same on every rank."""

    loss: float
    """Mean over all items (target tokens, or samples) of the global batch."""
    grad_norm: float
    """Of all gradients of the model together, each counted once, before clipping."""
    tokens: int
    """Items the loss is the mean of."""


def squared_norm(gradients: Sequence[Tensor]) -> float:
    """Sum of squares of all their elements."""
    return torch.nn.utils.get_total_norm(list(gradients)).double().square().item() if gradients else 0.0


def clip(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients as ``torch.nn.utils.clip_grad_norm_`` does for a total norm already known."""
    scale = limit / (norm + 1e-6)
    if scale < 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(scale)


def agree_on(numbers: Mapping[str, float], world: World, watch: Watch) -> dict[str, float]:
    """Sum some numbers over all ranks, in one small collective."""
    if world.alone:
        return dict(numbers)
    total: Tensor = torch.tensor(list(numbers.values()), dtype=torch.float64, device=world.device)
    watch.wait(dist.all_reduce(total, async_op=True), "the sum of the step's numbers", "with all ranks")
    return dict(zip(numbers, total.tolist(), strict=True))


def check_finite(result: StepResult, step: int, bad: list[int]) -> None:
    """Raise FloatingPointError before the weights are touched."""
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    where = f", in micro-batches {bad} of this rank" if bad else ""
    raise FloatingPointError(
        f"step {step}: the loss is {result.loss} and the gradient norm {result.grad_norm}{where}; the weights are as "
        "they were before the step"
    )
