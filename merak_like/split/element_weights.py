"""Low-rank factors that err least where each number of a weight counts for itself (TFWSVD: Hua et al., EMNLP 2022).

    minimise  sum_ij  fisher_ij (weight - left right)_ij ^ 2

There is no closed form. The start is the better of the plain and the side-weighted decomposition (low_rank.py); then
each row of ``left`` and each column of ``right`` in turn is solved exactly, a small least-squares problem each, so the
error never rises (alternating least squares, Srebro and Jaakkola 2003; the paper goes by gradients). So the error is at
most that of either start. Weights of rows and columns are best already if the information is their product, from which
``spread`` measures how far it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merak_like.split.low_rank import Factors, factor, orthogonal

RIDGE = 1e-8
"""Of the mean weight: a row without any information leaves its problem without a unique answer."""


def weighted_error(weight: Tensor, left: Tensor, right: Tensor, fisher: Tensor) -> float:
    """The sum of squares that is minimised."""
    return float((fisher * (weight - left @ right).square()).double().sum())


def factor_elements(weight: Tensor, rank: int, fisher: Tensor, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """``left`` (out, rank) and ``right`` (rank, in), in the weight's dtype.

    Raises ValueError for a rank or a Fisher information that does not fit, or one that is negative.
    """
    if fisher.shape == weight.shape and bool((fisher < 0).any()):
        raise ValueError("the Fisher information is a mean of squares, found negative numbers")
    w, f = weight.detach().double(), fisher.detach().double()
    starts = [(p.u @ p.s, p.v) for p in (factor(w, rank), factor(w, rank, f))]
    left, right = min(starts, key=lambda pair: weighted_error(w, *pair, f))
    best = weighted_error(w, left, right, f), left, right
    for _ in range(rounds):
        left = _solve(w, right, f)
        right = _solve(w.t(), left.t(), f.t()).t()
        now = weighted_error(w, left, right, f)
        if now >= best[0] * (1 - 1e-6):
            break
        best = now, left, right
    return best[1].to(weight.dtype), best[2].to(weight.dtype)


def factor_by_elements(weight: Tensor, rank: int, fisher: Tensor) -> Factors:
    """``factor_elements`` as ``factor`` gives them: u and v orthonormal, s diagonal and falling."""
    return orthogonal(*factor_elements(weight.detach().double(), rank, fisher), weight.dtype)


def _solve(w: Tensor, right: Tensor, f: Tensor) -> Tensor:
    """For each row the best left factors: (right f_i right^T) a = right (f_i * w_i)."""
    normal = torch.einsum("kn,in,ln->ikl", right, f, right)
    ridge = RIDGE * (normal.diagonal(dim1=1, dim2=2).mean() + torch.finfo(w.dtype).tiny)
    normal = normal + ridge * torch.eye(len(right), dtype=w.dtype, device=w.device)
    return torch.linalg.solve(normal, ((f * w) @ right.t()).unsqueeze(2)).squeeze(2)


def spread(fisher: Tensor) -> float:
    """How far the information is from a product of rows and columns: the deviation of their ratio, weighted by it.

    At 0 weights of rows and columns are best already; the larger, the more weighting by elements can gain.
    """
    f = fisher.double()
    even = f.sum(1, keepdim=True) * f.sum(0) / f.sum().clamp(min=torch.finfo(f.dtype).tiny)
    there = even > 0
    off = ((f - even).square()[there] / even[there]).sum() / even.sum().clamp(min=torch.finfo(f.dtype).tiny)
    return float(off.sqrt())
