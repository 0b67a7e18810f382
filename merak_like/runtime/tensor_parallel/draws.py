"""Random numbers for a part of a tensor: the part of what one process would draw for the whole.

The numbers of the whole are drawn on every rank, so that the stream goes on where it would in one process.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merak_like.partitioner.tensor_parallel.layout import Axis, Layout, whole_size
from merak_like.runtime.tensor_parallel.collectives import Target
from merak_like.runtime.tensor_parallel.shards import part


class Dropout(Target):
    """A dropout of ``torch.nn.functional`` on a part."""

    def __init__(self, function: Any, layout: Layout, rank: int) -> None:
        super().__init__(f"{getattr(function, '__name__', 'dropout')}_part")
        self.function, self.layout, self.rank = function, layout, rank

    def __call__(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return input
        mask = part(self.function(_ones(input, self.layout), p, True), self.layout, self.rank)
        return input.mul_(mask) if inplace else input * mask


class Attention(Target):
    """Scaled dot-product attention with dropout, for some heads: torch's own fused kernels draw for these heads only."""

    def __init__(self, layout: Layout, rank: int) -> None:
        """``layout`` is that of the result ``(..., heads, queries, width)``."""
        super().__init__("attention_part")
        self.layout, self.rank = layout, rank

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        # the order of torch's unfused attention: both factors are scaled, so that the numbers are its numbers
        root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = (query * root) @ (key.transpose(-2, -1) * root)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
        unseeing = scores.detach().amax(-1, keepdim=True) == -math.inf  # a query that sees nothing gets zeros
        chances = scores.masked_fill(unseeing, 0.0).softmax(-1).masked_fill(unseeing, 0.0)
        sizes: Layout = tuple((Axis(n),) for n in chances.shape[-2:])
        drop = Dropout(F.dropout, (*self.layout[:-2], *sizes), self.rank)
        return drop(chances, dropout_p) @ value


class Creation(Target):
    """``rand``, ``randn_like`` and the like: made whole, then cut."""

    def __init__(self, function: Any, layout: Layout, rank: int) -> None:
        super().__init__(f"{getattr(function, '__name__', 'random')}_part")
        self.function, self.layout, self.rank = function, layout, rank

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (_ones(args[0], self.layout), *args[1:])
        return part(self.function(*args, **kwargs), self.layout, self.rank)


def _ones(like: Tensor, layout: Layout) -> Tensor:
    """A whole tensor of ones whose elements lie in memory in the order that the part's do: so they are drawn."""
    sizes = [whole_size(factors) for factors in layout]
    order = sorted(range(like.ndim), key=lambda dim: (-like.stride(dim), dim))
    ones = torch.ones([sizes[dim] for dim in order], dtype=like.dtype, device=like.device)
    return ones.permute([order.index(dim) for dim in range(like.ndim)])


DROPOUTS = frozenset("dropout dropout1d dropout2d dropout3d".split())
CREATIONS = frozenset("rand randn randint rand_like randn_like randint_like".split())


def drawing(word: str, function: Any, layout: Layout, rank: int) -> Target | None:
    """What stands for a step that draws random numbers for a part; None if there is nothing for it."""
    if word in DROPOUTS:
        return Dropout(function, layout, rank)
    if word == "scaled_dot_product_attention":
        return Attention(layout, rank)
    return Creation(function, layout, rank) if word in CREATIONS else None
