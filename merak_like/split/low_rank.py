"""A weight as three factors of low rank, plain or weighted by how much its rows and columns matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """weight ~ u @ s @ v, with u (out, rank), s (rank, rank) and v (rank, in)."""

    u: Tensor
    s: Tensor
    v: Tensor


def factor(weight: Tensor, rank: int, fisher: Tensor | None = None) -> Factors:
    """Factors of this rank, in the weight's dtype: u and v orthonormal, s diagonal and falling.

    Without ``fisher`` they are the truncated singular value decomposition, which errs least in the sum of squares
    (Eckart and Young 1936). With the weight's Fisher information (mean squared gradients, of the weight's shape) they
    err least where element ij counts with r_i c_j, the information's sums over row i and column j: the decomposition
    of diag(r)^(1/2) weight diag(c)^(1/2), and both divided out again. FWSVD (Hsu et al. 2022, "Language model
    compression with weighted low-rank factorization" (ICLR), sec. 3) is this with one of the two sides, r alone.
    Scaled up again the factors would learn badly: what is so weighed is as small as gradients are, and its inverse as
    large.

    Raises ValueError for a rank that is not 1 to min(out, in), or a Fisher information of another shape.
    """
    most = min(weight.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"a {tuple(weight.shape)} weight has ranks 1 to {most}, asked for {rank}")
    if fisher is None:
        work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        u, s, v = torch.linalg.svd(work, full_matrices=False)
        return Factors(*(part.to(weight.dtype).contiguous() for part in (u[:, :rank], s[:rank].diag(), v[:rank])))
    if fisher.shape != weight.shape:
        raise ValueError(f"the Fisher information is {tuple(fisher.shape)}, its weight {tuple(weight.shape)}")
    work, information = weight.detach().double(), fisher.double()
    rows, columns = _root(information.sum(1)).unsqueeze(1), _root(information.sum(0))
    u, s, v = torch.linalg.svd(rows * work * columns, full_matrices=False)
    return orthogonal(u[:, :rank] * s[:rank] / rows, v[:rank] / columns, weight.dtype)


def orthogonal(left: Tensor, right: Tensor, dtype: torch.dtype) -> Factors:
    """left @ right with u and v orthonormal, s diagonal and falling."""
    basis, rest = torch.linalg.qr(left)
    u, s, v = torch.linalg.svd(rest @ right, full_matrices=False)
    return Factors(*(part.to(dtype).contiguous() for part in (basis @ u, s.diag(), v)))


def _root(sums: Tensor) -> Tensor:
    """One that never had a gradient would divide zero by zero; it may as well be a little exact."""
    root = sums.sqrt()
    return root.clamp(min=1e-6 * root.max().clamp(min=1e-30))


def fisher_information(
    model: nn.Module, names: Sequence[str], batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """Mean squared gradient of some parameters over batches: the empirical Fisher information, up to batching.

    ``loss(model, batch)`` gives a scalar. The smaller the batches, the nearer to the information of single samples.
    Gradients that the parameters hold are left as they were. Raises ValueError where there is no batch.
    """
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    sums = [torch.zeros_like(parameter) for parameter in wanted]
    count = 0
    for batch in batches:
        for total, gradient in zip(sums, torch.autograd.grad(loss(model, batch), wanted), strict=True):
            total += gradient.square()
        count += 1
    if not count:
        raise ValueError("the Fisher information needs at least one batch of the data to be trained on")
    return {name: total / count for name, total in zip(names, sums, strict=True)}
