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
from merak_like.partitioner.tensor_parallel.layout import same_parts
from merak_like.partitioner.tensor_parallel.ranks import Ranks, take
from merak_like.partitioner.tensor_parallel.reductions import over
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.example import leaves
from merak_like.partitioner.tracer.fine import steps


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
    code, loss = steps(traced), traced.graph.outputs["loss"]
    whole = Ranks(model, code, traced.constants, None, inputs)
    sharded = Ranks(model, code, traced.constants, derived, inputs)
    differences = {"loss": _difference(sharded.run(loss)[0], whole.run(loss)[0], 0.0)}
    gradients = [w.grad for (w,) in whole.weights.values() if w.grad is not None and w.grad.numel()]
    largest = max((grad.abs().max().item() for grad in gradients), default=1.0)
    floor = max(1e-6 * largest, 1e-12)
    for name, reference in whole.weights.items():
        if not reference[0].requires_grad:
            continue
        grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in sharded.weights[name]]
        for group in sharded.partial.get(name, ()):
            grads = over(group, grads, lambda some: [torch.stack(some).sum(0)] * len(some))
        want = reference[0].grad
        want = torch.zeros_like(reference[0]) if want is None else want
        layout = derived.weights.get(name)
        for group in sharded.divides.get(name, ()):
            total = over(group, grads, lambda some: [torch.stack(some).sum(0)] * len(some))
            for dim, factors in enumerate(layout or ()):
                for start, stop in same_parts(factors, group.degree, group.repeat, derived.tp):
                    for grad, all_of in zip(grads, total, strict=True):
                        grad.narrow(dim, start, stop - start).copy_(all_of.narrow(dim, start, stop - start))
        differences[name] = max(_difference(g, take(want, layout, rank), floor) for rank, g in enumerate(grads))
    worst = max(differences, key=lambda name: differences[name])
    return Difference(differences[worst], worst)


def _difference(ours: Tensor, theirs: Tensor, floor: float) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    worst = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=max(floor, 1e-12))).item()
    return worst if worst == worst else float("inf")
