"""Steps whose local form differs from their whole form, for all ranks together: what ``Group.forms`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.derived import DerivedBlock
from merak_like.partitioner.tensor_parallel.layout import Factors, Layout, pieces
from merak_like.partitioner.tensor_parallel.reductions import AllReduce, Enter, over
from merak_like.partitioner.tracer.fine import Step


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """Rows of ``a (s, k)`` up to each offset times the group's matrix of ``b (e, k, n)``, in any dtype."""
    if offs.shape != b.shape[:1]:
        raise ValueError(f"{tuple(offs.shape)} groups for {b.shape[0]} matrices")
    if a.is_meta:
        return a.new_empty(a.shape[0], b.shape[-1])
    rows, start = list[Tensor](), 0
    for group, stop in enumerate(offs.tolist()):
        rows.append(a[start:stop] @ b[group])
        start = stop
    rows.append(a.new_zeros(a.shape[0] - start, b.shape[-1]))
    return torch.cat(rows)


def _piece(factors: Factors, rank: int) -> tuple[int, int]:
    ((start, stop),) = pieces(factors, rank)
    return start, stop


def _embedding(layouts: Mapping[str, Layout], step: Step, args: list[Any], block: DerivedBlock) -> list[Tensor]:
    """Rows that a rank does not have are zeros."""
    found = list[Tensor]()
    weight = step.kwargs.get("weight", step.args[1] if len(step.args) > 1 else None)
    for rank, ((ids, table, *_), _) in enumerate(args):
        start, stop = _piece(layouts[weight.name][0], rank)
        here = (ids >= start) & (ids < stop)
        padding = step.kwargs.get("padding_idx", step.args[2] if len(step.args) > 2 else None)
        rows = torch.nn.functional.embedding((ids - start).where(here, 0), table)
        if padding is not None:  # no gradient from there
            rows = rows.detach().where((ids == padding).unsqueeze(-1), rows)
        found.append(rows * here.unsqueeze(-1))
    return found


def _cross_entropy(layouts: Mapping[str, Layout], step: Step, args: list[Any], block: DerivedBlock) -> list[Tensor]:
    """The classes are never gathered: maximum, sum of exponentials and the target's logit are reduced."""
    layout = block.values[step.args[0].name][1]
    top = torch.stack([a[0][0].detach().amax(1) for a in args]).amax(0)
    sums, hits = [], []
    for rank, (positional, _) in enumerate(args):
        logits, target = positional[0], positional[1]
        start, stop = _piece(layout, rank)
        sums.append((logits - top.unsqueeze(1)).exp().sum(1))
        here = (target >= start) & (target < stop)
        hits.append(logits.gather(1, (target - start).where(here, 0).unsqueeze(1)).squeeze(1) * here)
    sums, hits = AllReduce.apply(*sums), AllReduce.apply(*hits)  # type: ignore[misc]
    found = list[Tensor]()
    for (positional, kwargs), total, hit in zip(args, sums, hits, strict=True):  # type: ignore[arg-type]
        kept = positional[1] != kwargs.get("ignore_index", -100)
        losses = (total.log() + top - hit) * kept
        reduction = kwargs.get("reduction", "mean")
        found.append(losses if reduction == "none" else losses.sum() / (kept.sum() if reduction == "mean" else 1))
    return found


def _layer_norm(layouts: Mapping[str, Layout], step: Step, args: list[Any], block: DerivedBlock) -> list[Tensor]:
    """Mean and variance over dimensions of which a rank has a part: two sums are reduced, their gradients too."""
    group = next(group for group in block.groups if step.name in group.forms)
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    if step.word == "rms_norm":
        names = ("input", "normalized_shape", "weight", "eps")
    given = [dict(zip(names, positional, strict=False)) | kwargs for positional, kwargs in args]
    dims = tuple(range(-len(given[0]["normalized_shape"]), 0))

    def mean(tensors: list[Tensor]) -> list[Tensor]:
        means = [t.mean(dims, keepdim=True) / group.degree for t in tensors]
        return over(group, over(group, means, lambda t: AllReduce.apply(*t)), lambda t: Enter.apply(*t))  # type: ignore[arg-type]

    x = [g["input"] for g in given]
    if step.word == "layer_norm":
        x = [t - m for t, m in zip(x, mean(x), strict=True)]
    found = list[Tensor]()
    for g, t, square in zip(given, x, mean([t * t for t in x]), strict=True):
        eps = g.get("eps", 1e-5)
        out = t * (square + (torch.finfo(t.dtype).eps if eps is None else eps)).rsqrt()
        out = out if g.get("weight") is None else out * g["weight"]
        found.append(out if g.get("bias") is None else out + g["bias"])
    return found


Rewritten = Callable[[Mapping[str, Layout], Step, list[Any], DerivedBlock], list[Tensor]]
REWRITTEN: Mapping[str, Rewritten] = {
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
}
"""By form: from the layouts of weights, the step, each rank's (args, kwargs) and the block to each rank's result."""
