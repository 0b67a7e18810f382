"""A model in stages against the same model whole: loss, every gradient, every buffer."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from merak_like.partitioner.cuts import find_cuts
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tracer import LossFn, Trace, trace
from merak_like.runtime.local import LocalPipeline

TOLERANCE = 1e-5
"""Relative, see ``difference``. Sums of gradients of one weight from several stages add up in another order."""


class Compared(NamedTuple):
    """One model, traced once, whole and in stages."""

    trace: Trace
    worst: float
    """The largest difference of all; 0.0 means bitwise equal."""
    where: str
    """The number of stages and the tensor with that difference."""


def seed(value: int = 1) -> None:
    """Everything that draws random numbers starts here."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def even_starts(graph: ProxyGraph, stages: int) -> tuple[int, ...]:
    """Starts of that many stages at legal positions, about equal in ops."""
    inputs = sum(op.kind == "input" for op in graph.ops)
    legal = [int(position) for position in find_cuts(graph).positions if position > inputs]
    if len(legal) < stages - 1:
        raise ValueError(f"only {len(legal)} positions may be cut, too few for {stages} stages")
    return (0, *(legal[len(legal) * k // stages] for k in range(1, stages)), len(graph.ops))


def difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Largest difference, relative to the largest element (to 0.01, if that is smaller); None counts as zeros."""
    if ours is None and theirs is None:
        return 0.0
    a = torch.zeros_like(theirs) if ours is None and theirs is not None else ours
    b = torch.zeros_like(ours) if theirs is None and ours is not None else theirs
    assert a is not None
    assert b is not None
    if not a.numel() or torch.equal(a, b):
        return 0.0
    worst = ((a - b).abs().max() / b.abs().max().clamp(min=1e-2)).item()
    return worst if worst == worst else float("inf")


def whole(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """One step of the plain model; its loss."""
    outputs = model(**batch)
    loss = outputs.loss if loss_fn is None else loss_fn(outputs, batch)
    loss.backward()
    return loss.detach()


def compare(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    stages: Sequence[int] = (2, 3),
    *,
    settled: bool = False,
) -> Compared:
    """Trace a model in train mode, then run it whole and cut into each number of stages, from the same seed.

    ``settled``: compare with the second forward of the plain model. Some replace modules in their first one, and draw
    random numbers to fill weights that they then throw away.
    """
    recorded = trace(model, copy.deepcopy(batch), loss_fn, fuse=False)  # what is compared is the cutting
    plain = copy.deepcopy(model)
    if settled:
        with torch.no_grad():
            plain(**copy.deepcopy(batch))
            for (_, mine), (_, theirs) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
                mine.copy_(theirs)
    seed()
    loss = whole(plain, copy.deepcopy(batch), loss_fn)
    worst, where = 0.0, ""
    for count in stages:
        ours = copy.deepcopy(model)
        pipeline = LocalPipeline(recorded, ours, even_starts(recorded.graph, count))
        seed()
        found = {"loss": difference(pipeline.step(copy.deepcopy(batch))["loss"], loss)}
        theirs = dict(plain.named_parameters())
        found |= {name: difference(mine.grad, theirs[name].grad) for name, mine in ours.named_parameters()}
        buffers = dict(plain.named_buffers())
        found |= {name: difference(mine.float(), buffers[name].float()) for name, mine in ours.named_buffers()}
        name = max(found, key=lambda key: found[key])
        if found[name] > worst:
            worst, where = found[name], f"{name} in {count} stages"
    return Compared(recorded, worst, where)
