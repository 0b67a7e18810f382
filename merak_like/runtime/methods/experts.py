"""Experts that share most of their weights (MPOE: Gao et al., COLING 2022, "Parameter-Efficient Mixture-of-Experts
Architecture for Pre-trained Language Models").

    W_e = C1_e - C2_e - C - C4_e - C5_e       a chain of five cores, contracted over their bonds

A matrix of prod(rows) x prod(columns) is a matrix product operator: core k is (bond, rows[k], columns[k], bond). The
middle core holds most of the numbers and is one for all experts; the others are each expert's own. With full bonds any
matrix is such a chain exactly. The matrices are made anew in each forward: parameters are saved, not operations. Every
expert runs on every token and the gate's zeros cancel those that are not among the best, so the shapes do not depend on
the data, and the axis of the experts is one like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods.method import Job, Method, Place
from merak_like.runtime.methods.wrapped import AfterSum


def bonds(rows: Sequence[int], columns: Sequence[int], most: int | None = None) -> list[int]:
    """The sizes of the bonds between cores, both ends (1) included; ``most`` truncates them."""
    sizes = [i * j for i, j in zip(rows, columns, strict=True)]
    full = [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(len(sizes) + 1)]
    return [min(size, most or size) for size in full]


def decompose(matrix: Tensor, rows: Sequence[int], columns: Sequence[int], most: int | None = None) -> list[Tensor]:
    """The cores of a matrix (prod(rows), prod(columns)), by one SVD after the other.

    Exact without ``most``; with it, each cut keeps the largest singular values. Raises ValueError for other sizes.
    """
    if matrix.shape != (prod(rows), prod(columns)) or len(rows) != len(columns):
        raise ValueError(
            f"factors {tuple(rows)} x {tuple(columns)} make {prod(rows)} x {prod(columns)}, the matrix is "
            f"{tuple(matrix.shape)}"
        )
    count = len(rows)
    order = [k for pair in zip(range(count), range(count, 2 * count), strict=True) for k in pair]
    rest = matrix.detach().reshape(*rows, *columns).permute(order).reshape(1, -1)
    sizes, cores = bonds(rows, columns, most), list[Tensor]()
    for k in range(count - 1):
        left = rest.reshape(sizes[k] * rows[k] * columns[k], -1)
        u, s, v = torch.linalg.svd(left, full_matrices=False)
        keep = sizes[k + 1]
        cores.append(u[:, :keep].reshape(sizes[k], rows[k], columns[k], keep))
        rest = s[:keep, None] * v[:keep]
    return [*cores, rest.reshape(sizes[count - 1], rows[-1], columns[-1], 1)]


def contract(cores: Sequence[Tensor]) -> Tensor:
    """Matrices (experts, prod(rows), prod(columns)) of cores (experts, bond, row, column, bond)."""
    made = cores[0]
    for core in cores[1:]:
        e, a, i, j, _ = made.shape
        _, _, k, m, _ = core.shape
        made = torch.einsum("eaijb,ebkmc->eaikjmc", made, core).reshape(e, a, i * k, j * m, -1)
    return made.squeeze(1).squeeze(-1)


class SharedCore(nn.Module):
    """Matrices of several experts, (experts, rows, columns), whose middle core is one for all."""

    def __init__(self, experts: int, rows: Sequence[int], columns: Sequence[int], most: int | None = None) -> None:
        super().__init__()
        if len(rows) != len(columns) or len(rows) % 2 == 0:
            raise ValueError(f"a middle core needs an odd number of factors, found {tuple(rows)} x {tuple(columns)}")
        self.rows, self.columns, self.middle = tuple(rows), tuple(columns), len(rows) // 2
        start = torch.empty(prod(rows), prod(columns))
        nn.init.normal_(start, std=prod(rows) ** -0.5)
        cores = decompose(start, rows, columns, most)
        self.central = nn.Parameter(cores[self.middle].unsqueeze(0))
        own = [core.unsqueeze(0).repeat(experts, 1, 1, 1, 1) for k, core in enumerate(cores) if k != self.middle]
        # experts begin a little apart, or they would stay one
        self.own = nn.ParameterList([nn.Parameter(core * (1 + 0.1 * torch.randn_like(core))) for core in own])

    def forward(self) -> Tensor:
        """The matrices."""
        experts = self.own[0].shape[0]
        cores = [*self.own[: self.middle], self.central.expand(experts, -1, -1, -1, -1), *self.own[self.middle :]]
        return contract(cores)


class MatrixProductExperts(nn.Module):
    """A feed-forward of several experts, ``top`` of which each token uses; (.., width) to (.., width)."""

    def __init__(
        self, experts: int, width: Sequence[int], hidden: Sequence[int], *, top: int = 2, most: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:  # fmt: skip
        """``width`` and ``hidden`` as factors, as many of each. ``most`` truncates bonds."""
        super().__init__()
        if not 1 <= top <= experts:
            raise ValueError(f"top={top} of {experts} experts: use 1 to {experts}")
        self.top, self.activation = top, activation
        self.gate = nn.Linear(prod(width), experts, bias=False)
        self.up, self.down = SharedCore(experts, width, hidden, most), SharedCore(experts, hidden, width, most)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the best experts' outputs, by their gate's share."""
        scores = self.gate(x)
        best = scores.topk(self.top, -1).values[..., -1:]
        share = scores.masked_fill(scores < best, float("-inf")).softmax(-1)
        hidden = self.activation(torch.einsum("...i,eio->...eo", x, self.up()))
        return torch.einsum("...eo,eoi,...e->...i", hidden, self.down(), share)


class CentralMask(Method):
    """Leaves the shared cores as they are in a share of the steps: they get every expert's gradient and would be
    trained too much (section 3.3). All ranks leave out the same steps."""

    def __init__(self, probability: float = 0.5, seed: int = 0) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"probability={probability}: a share of the steps, 0 to below 1")
        self.probability, self.seed = probability, seed

    def check(self, job: Job) -> None:
        """Gradients where the parameters are."""
        if job.elsewhere:
            raise ValueError(
                f"CentralMask takes the cores' own gradients away, {job.elsewhere} has them elsewhere: use zero=0 and "
                "float32, or torch.autocast around the engine"
            )

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """The same, but for the cores' gradients in some steps."""
        own = {id(p) for p in place.parameters.values()}
        cores = [m.central for m in place.model.modules() if isinstance(m, SharedCore) and id(m.central) in own]

        def mask() -> None:
            if np.random.Philox(key=[self.seed, place.steps()]).random_raw() < self.probability * 2**64:
                for core in cores:
                    core.grad = None  # of zeros an optimizer with momentum or decay would make a step

        return AfterSum(reducer, mask)
