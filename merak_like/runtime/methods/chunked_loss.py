"""Cross-entropy of an output layer without its logits: rows go through both a few at a time.

    hidden | 0 1 .. | .. | .. n |  ->  rows x vocabulary, one chunk at a time  ->  loss, and the rows' log-sum-exp
    backward: the same chunks once more; each gives its rows' gradients and adds to the weight's

The logits, their softmax and their gradient of all rows are never there together: the memory is that of a chunk, the
price one more product with the weight. Exact but for the order of sums. The idea is LightSeq2's fused criterion (Wang
et al., SC 2022, section 3.1.3), in chunks as in Liger Kernel (Hsu et al., arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Of one chunk's logits in float32: large enough for a matrix product's speed."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0, chunk_bytes: int = CHUNK_BYTES,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``cross_entropy(linear(hidden, weight, bias).to(dtype), target)``, the mean or sum over rows.

    ``hidden`` (rows, width), ``weight`` (vocabulary, width), ``bias`` (vocabulary), ``target`` (rows) of indices.
    Without ``dtype`` logits stay as the product makes them. Under autocast the product runs in its precision and the
    loss in float32, as torch does it.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        lower = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(lower), weight.to(lower), None if bias is None else bias.to(lower)
        dtype = torch.float32
    with torch.autocast(kind, enabled=False):
        total, rows = _Chunked.apply(
            hidden, weight, bias, target, ignore_index, label_smoothing, chunk_bytes, dtype or hidden.dtype
        )  # type: ignore[misc]
        return (total / rows if reduction == "mean" else total).to(dtype or hidden.dtype)


class _Chunked(torch.autograd.Function):
    """The sum over rows, and how many count."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        hidden, weight, bias, target, ignored, smoothing, chunk_bytes, dtype = args
        counted = target != ignored
        rows = max(1, chunk_bytes // (weight.shape[0] * 4))
        # torch's kernel sums in float32 whatever the logits are
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        for part in range(0, len(hidden), rows):
            some = slice(part, part + rows)
            logits = _logits(hidden[some], weight, bias, dtype)
            losses = F.cross_entropy(
                logits, target[some], ignore_index=ignored, reduction="none", label_smoothing=smoothing
            )
            total += losses.sum(dtype=total.dtype)
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.rest = ignored, smoothing, rows, dtype
        ctx.mark_non_differentiable(count := counted.sum())
        return total, count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, weight, bias, target = ctx.saved_tensors
        ignored, smoothing, rows, dtype = ctx.rest
        g = gradients[0]
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # sums over chunks in full precision, as one product over all rows would keep them
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for part in range(0, len(hidden), rows):
            some = slice(part, part + rows)
            logits = _logits(hidden[some], weight, bias, dtype)
            of_logits = _gradient(logits, target[some], ignored, smoothing).mul_(g).to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[some])
            if of_weight is not None:
                _add_product(of_weight, of_logits, hidden[some])
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        made = [of_weight, of_bias]
        cast = [None if t is None else t.to(weight.dtype) for t in made]
        return of_hidden, *cast, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(hidden, weight, bias).to(dtype)


def _gradient(logits: Tensor, target: Tensor, ignored: int, smoothing: float) -> Tensor:
    """Of the sum of losses, in the memory of the logits: softmax less the target's distribution."""
    counted = target != ignored
    made = torch.softmax(logits, -1, out=logits) if not logits.requires_grad else logits.softmax(-1)
    if smoothing:
        made -= smoothing / made.shape[-1]
    index = target.where(counted, 0).unsqueeze(1)
    made.scatter_add_(1, index, torch.full_like(index, -(1 - smoothing), dtype=made.dtype))
    return made.mul_(counted.unsqueeze(1))


def _add_product(into: Tensor, of_logits: Tensor, hidden: Tensor) -> None:
    if into.dtype == hidden.dtype:
        into.addmm_(of_logits.t(), hidden)
    else:
        into += of_logits.t() @ hidden
