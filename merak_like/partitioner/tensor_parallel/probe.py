"""Believe nothing unverified: a derived model sharded against the same model whole, in one process.

Every step runs once per rank on that rank's parts; reductions are explicit sums over the ranks' tensors, with their own
backward. Everything is in float64 and without dropout, whatever the model says. Loss and every gradient must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel.derived import Derived
from merak_like.partitioner.tensor_parallel.ranks import Ranks, shaken, take
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.example import leaves
from merak_like.partitioner.tracer.fine import steps

EXACT = 1e-8
"""A sharded block in float64 that differs by less agrees with the whole one."""


@dataclass(frozen=True)
class Difference:
    """The largest of all differences.

    Each is relative to the largest element of its tensor, or to a millionth of the largest gradient where that is more:
    a gradient that is zero but for rounding is compared with nothing smaller.
    """

    worst: float
    where: str


def probe(model: nn.Module, traced: Trace, derived: Derived, batch: Any) -> Difference:
    """Run a model of real weights whole and sharded; how far loss and gradients are apart.

    ``traced`` is the fine trace that ``derived`` was derived from, ``batch`` one like its example.
    """
    found = leaves(batch)
    inputs = {name: found[path] for name, path in traced.inputs.items()}
    code, loss, weights = steps(traced), traced.graph.outputs["loss"], shaken(model)
    whole = Ranks(model, code, traced.constants, (), 1, weights, inputs)
    sharded = Ranks(model, code, traced.constants, derived.blocks, derived.tp, weights, inputs)
    for ranks in (whole, sharded):
        ranks.run()
        ranks.backward({loss: torch.ones((), dtype=torch.float64)})
    differences = {"loss": difference(sharded.env[loss][0], whole.env[loss][0], 0.0)}
    differences |= of_gradients(whole, sharded)
    worst = max(differences, key=lambda name: differences[name])
    return Difference(differences[worst], worst)


def of_gradients(whole: Ranks, sharded: Ranks) -> dict[str, float]:
    """The largest difference of every weight's gradient on any rank."""
    floor = gradient_floor(whole)
    found = dict[str, float]()
    for name, (weight,) in whole.weights.items():
        if weight.requires_grad:
            want = torch.zeros_like(weight) if weight.grad is None else weight.grad
            parts = [take(want, sharded.layouts.get(name), rank) for rank in range(sharded.count)]
            found[name] = max(map(difference, sharded.gradients(name), parts, [floor] * sharded.count))
    return found


def gradient_floor(whole: Ranks) -> float:
    """A millionth of the largest gradient."""
    tensors = [xs[0] for xs in (*whole.weights.values(), *whole.inputs.values()) if isinstance(xs[0], Tensor)]
    gradients = [x.grad for x in tensors if x.grad is not None and x.grad.numel()]
    return max(1e-6 * max((grad.abs().max().item() for grad in gradients), default=1.0), 1e-12)


def difference(ours: Tensor, theirs: Tensor, floor: float) -> float:
    """Of the largest element, or of ``floor`` if that is larger; infinite for other shapes and what is no number."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    if not (ours.is_floating_point() or ours.is_complex()):
        ours, theirs = ours.double(), theirs.double()
    worst = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=max(floor, 1e-12))).item()
    return worst if worst == worst else float("inf")
