"""Random numbers for a part of a tensor: the part of what one process would draw for the whole.

The numbers of the whole are drawn on every rank, so that the stream goes on where it would in one process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merak_like.partitioner.tensor_parallel.layout import Axis, Layout, whole_size
from merak_like.partitioner.tensor_parallel.ranks import take
from merak_like.runtime.tensor_parallel.collectives import Target


@dataclass(frozen=True)
class Rows:
    """Some of the rows of a tensor: those of some samples of a micro-batch."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Cut:
    """From what one process draws to what is used here: a rank's part, and of that perhaps some rows."""

    layout: Layout
    rank: int
    rows: Rows | None = None

    def __call__(self, whole: Tensor) -> Tensor:
        own = take(whole, self.layout, self.rank)
        return (
            own if self.rows is None else own.narrow(self.rows.dim, self.rows.start, self.rows.stop - self.rows.start)
        )

    def ones(self, like: Tensor) -> Tensor:
        """A whole tensor of ones whose elements lie in memory in the order that the part's do: so they are drawn."""
        sizes = [whole_size(factors) for factors in self.layout]
        order = _order(like)
        ones = torch.ones([sizes[dim] for dim in order], dtype=like.dtype, device=like.device)
        return ones.permute([order.index(dim) for dim in range(like.ndim)])


def _order(tensor: Tensor) -> list[int]:
    """The dimensions from the slowest in memory to the fastest. The stride of a dimension of one says nothing: it
    stays in its place if the others are in theirs."""
    longer = [dim for dim in range(tensor.ndim) if tensor.shape[dim] > 1]
    natural = sorted(longer, key=lambda dim: (-tensor.stride(dim), dim)) == longer
    return sorted(range(tensor.ndim), key=lambda dim: (0 if natural else -tensor.stride(dim), dim))


class Draw(Target):
    """A step that draws random numbers, for a part of what it is in one process."""

    def __init__(self, function: Any, cut: Cut) -> None:
        super().__init__(f"{getattr(function, '__name__', 'random')}_part")
        self.function, self.cut = function, cut

    def for_rows(self, rows: Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Draw:
        """The same for some rows. ``args`` and ``kwargs`` are those of the step for all rows."""
        return type(self)(self.function, replace(self.cut, rows=rows))


class Dropout(Draw):
    """A dropout of ``torch.nn.functional``."""

    def __call__(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return input
        mask = self.cut(self.function(self.cut.ones(input), p, True))
        return input.mul_(mask) if inplace else input * mask


class Attention(Draw):
    """Attention with dropout, unfused: torch's fused kernels would draw for this part only.

    The cut's layout is that of the result ``(..., heads, queries, width)``.
    """

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
        drop = Dropout(F.dropout, replace(self.cut, layout=(*self.cut.layout[:-2], *sizes)))
        return drop(chances, dropout_p) @ value


class Creation(Draw):
    """``rand``, ``randn_like`` and the like: made whole, then cut."""

    def __init__(self, function: Any, cut: Cut, whole: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None) -> None:
        """``whole``: what the function is called with in one process, if not with what it is called with here."""
        super().__init__(function, cut)
        self.whole = whole

    def for_rows(self, rows: Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Draw:
        return Creation(self.function, replace(self.cut, rows=rows), (args, kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            return self.cut(self.function(self.cut.ones(args[0]), *args[1:], **kwargs))
        positional, keywords = self.whole or (args, kwargs)
        return self.cut(self.function(*positional, **keywords))


KINDS: Mapping[str, type[Draw]] = {
    **dict.fromkeys("dropout dropout1d dropout2d dropout3d".split(), Dropout),
    "scaled_dot_product_attention": Attention,
    **dict.fromkeys("rand randn randint rand_like randn_like randint_like".split(), Creation),
}
"""By the word of a step: what stands for it where a part is drawn for."""


def drawing(word: str, function: Any, layout: Layout, rank: int) -> Draw | None:
    """What stands for a step that draws random numbers for a part; None if there is nothing for it."""
    kind = KINDS.get(word)
    return None if kind is None else kind(function, Cut(layout, rank))
