"""Steps whose local form differs from their whole form: what ``Group.forms`` names, for one rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merak_like.runtime.exchange import MAX
from merak_like.runtime.tensor_parallel.collectives import Enter, Reduce, Target, TensorGroup


class Mean(Target):
    """A mean over a dimension of which a rank has one of ``degree`` equal parts: its share of the whole mean."""

    def __init__(self, mean: Any, degree: int) -> None:
        super().__init__("mean_share")
        self.mean, self.degree = mean, degree

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.mean(*args, **kwargs) / self.degree


def require_within(ids: Tensor, count: int) -> None:
    """Let torch refuse an index that no rank has, on all of them and as it would on one: IndexError on a CPU."""
    ids.new_empty(1).expand(count).index_select(0, ids.reshape(-1))


class Embedding(Target):
    """Rows ``start <= i < stop`` of a table; other rows are zeros, to be summed over ranks."""

    def __init__(self, start: int, stop: int, rows: int) -> None:
        """``rows`` of the whole table."""
        super().__init__("embedding_part")
        self.start, self.stop, self.rows = start, stop, rows

    def __call__(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> Tensor:  # fmt: skip
        assert max_norm is None, "the rule keeps such a table whole"
        require_within(input, self.rows)
        elsewhere = (input < self.start) | (input >= self.stop)
        ids = (input - self.start).masked_fill(elsewhere, 0)
        rows = F.embedding(ids, weight, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
        if padding_idx is not None:  # a row without a gradient, though it is read
            rows = torch.where((input == padding_idx % self.rows).unsqueeze(-1), rows.detach(), rows)
        return rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)


class CrossEntropy(Target):
    """Classes ``start <= i < stop`` of all: the logits are never gathered (Shoeybi et al., section 3)."""

    def __init__(self, group: TensorGroup, what: str, start: int, stop: int, classes: int) -> None:
        """``classes`` of all ranks."""
        super().__init__("cross_entropy_part")
        self.group, self.what, self.start, self.stop, self.classes = group, what, start, stop, classes

    def __call__(
        self, input: Tensor, target: Tensor, weight: None = None, size_average: Any = None, ignore_index: int = -100,
        reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        require_within(target.masked_fill(target == ignore_index, 0), self.classes)
        losses = _CrossEntropy.apply(input, target, ignore_index, self)
        if reduction == "none":
            return losses  # type: ignore[return-value]
        total = losses.sum()  # type: ignore[union-attr]
        return total / (target != ignore_index).sum() if reduction == "mean" else total


class _CrossEntropy(torch.autograd.Function):
    """Maximum, sum of exponentials and the target's logit are reduced; two collectives of one or two numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore: int, node: CrossEntropy) -> Tensor:
        top = node.group.reduce(logits.amax(1), f"the largest logits of {node.what}", MAX)
        ratios = (logits - top.unsqueeze(1)).exp_()
        here = (target >= node.start) & (target < node.stop)
        column = (target - node.start).masked_fill(~here, 0).unsqueeze(1)
        hit = logits.gather(1, column).squeeze(1).masked_fill(~here, 0.0)
        sums = node.group.reduce(torch.stack((ratios.sum(1), hit)), f"the sums of {node.what}")
        kept = target != ignore
        ctx.save_for_backward(ratios.div_(sums[0].unsqueeze(1)), column, here, kept)
        return (sums[0].log() + top - sums[1]).masked_fill(~kept, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        chances, column, here, kept = ctx.saved_tensors
        grad = grads[0] * kept
        of_logits = chances * grad.unsqueeze(1)
        of_logits.scatter_add_(1, column, -(grad * here).unsqueeze(1))
        return of_logits, None, None, None


class Norm(Target):
    """Layer norm or RMS norm over a dimension of which a rank has a part: mean and mean square are reduced."""

    def __init__(self, group: TensorGroup, what: str, centred: bool) -> None:
        super().__init__("layer_norm_part" if centred else "rms_norm_part")
        self.degree, self.centred = group.degree, centred
        self.sum = Reduce(group, f"the mean of {what}", own=False)
        self.enter = Enter(group, f"the gradient of the mean of {what}")

    def __call__(self, input: Tensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        names = ("weight", "bias", "eps") if self.centred else ("weight", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5 if self.centred else None)
        dims = tuple(range(-len(normalized_shape), 0))
        # torch's layer norm lays its result out anew, and a dropout after it draws in that order
        x = input.contiguous() - self.mean(input, dims) if self.centred else input
        square = self.mean(x * x, dims)
        out = x * (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    def mean(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Over the parts of all ranks; its gradient is the sum of theirs."""
        return self.enter(self.sum(x.mean(dims, keepdim=True) / self.degree))
