"""A weight as three factors of low rank, plain or weighted by how much each row matters."""

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
    """The best factors of this rank, in the weight's dtype; s is diagonal, v has orthonormal rows.

    Without ``fisher`` it is the truncated singular value decomposition, which errs least in the sum of squares (Eckart
    and Young 1936). With the weight's Fisher information (mean squared gradients, of the weight's shape) it errs least
    where row i counts with the sum of its information: the decomposition of diag(a) @ weight with
    a_i = sqrt(sum_j fisher_ij), and a divided out of u again (FWSVD: Hsu et al. 2022, "Language model compression with
    weighted low-rank factorization" (ICLR), sec. 3).

    Raises ValueError for a rank that is not 1 to min(out, in), or a Fisher information of another shape.
    """
    most = min(weight.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"a {tuple(weight.shape)} weight has ranks 1 to {most}, asked for {rank}")
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rows = None
    if fisher is not None:
        if fisher.shape != weight.shape:
            raise ValueError(f"the Fisher information is {tuple(fisher.shape)}, its weight {tuple(weight.shape)}")
        rows = fisher.to(work).sum(1).sqrt()
        # A row that never had a gradient would divide zero by zero; it may as well be a little exact.
        rows = rows.clamp(min=1e-6 * rows.max().clamp(min=1e-30)).unsqueeze(1)
        work = work * rows
    u, s, v = torch.linalg.svd(work, full_matrices=False)
    u = u[:, :rank] if rows is None else u[:, :rank] / rows
    return Factors(*(part.to(weight.dtype).contiguous() for part in (u, s[:rank].diag(), v[:rank])))


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
