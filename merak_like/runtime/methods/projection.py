"""Training towards low rank (LRPET: Guo et al., IEEE TNNLS 2024, "Low-Rank Projection with Energy Transfer").

Every ``every`` steps each chosen weight W = U S V becomes U_r S_r V_r, and training goes on in the full space. With
``energy`` the kept values are scaled so that their squares sum to what all had. A convolution before a batch norm is
projected as the two work together: its rows times gamma / running deviation before, and divided again after. In the end
``two_linears`` writes each weight as two, with r (out + in) numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods.method import Job, Method, Place


class LowRank(Method):
    """Projects the weights whose module's name matches ``layers`` after every so many steps of the optimizer.

    ``rank`` is that of all of them. ``norms`` names the batch norm that follows a layer.
    """

    def __init__(
        self, rank: int, every: int, layers: str = ".*", *, energy: bool = False, norms: Mapping[str, str] | None = None
    ) -> None:
        if rank < 1 or every < 1:
            raise ValueError(f"rank={rank}, every={every}: both are at least 1")
        self.rank, self.every, self.layers, self.energy, self.norms = rank, every, layers, energy, dict(norms or {})

    def check(self, job: Job) -> None:
        """A decomposition needs the whole matrix."""
        if job.elsewhere or job.tp > 1:
            raise ValueError(
                f"LowRank decomposes whole weights that the optimizer updates itself: use zero=0, tp=1 and float32, "
                f"found tp={job.tp}{job.elsewhere and f' and {job.elsewhere}'}"
            )

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """The same; the projection follows the optimizer's step."""
        own = {id(p) for p in place.parameters.values()}
        modules = dict(place.model.named_modules())
        layers = {n: m for n, m in chosen(place.model, self.layers, self.rank).items() if id(m.weight) in own}
        norms = {name: modules[self.norms[name]] for name in layers if name in self.norms}

        def after(*_: Any) -> None:
            if (place.steps() + 1) % self.every == 0:  # the job counts this step when it is through
                for name, layer in layers.items():
                    project(layer.weight, self.rank, energy=self.energy, scale=_scale(norms.get(name)))

        if place.optimizer is not None:
            place.optimizer.register_step_post_hook(after)
        return reducer


def chosen(model: nn.Module, pattern: str, rank: int) -> dict[str, Any]:
    """Linear and Conv2d layers by name that the pattern matches and that have more rank than that."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and re.fullmatch(pattern, name)
        if min(module.weight.flatten(1).shape) > rank
    }
    if not found:
        raise ValueError(f"no Linear or Conv2d layer of a rank above {rank} has a name that matches {pattern!r}")
    return found


@torch.no_grad()
def project(weight: Tensor, rank: int, *, energy: bool = False, scale: Tensor | None = None) -> None:
    """Replace a weight by the nearest of this rank, with each row times ``scale``."""
    matrix = weight.flatten(1)
    matrix = matrix if scale is None else matrix * scale
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = s[:rank]
    if energy:
        kept = kept * (s.square().sum() / kept.square().sum().clamp(min=torch.finfo(s.dtype).tiny)).sqrt()
    made = (u[:, :rank] * kept) @ v[:rank]
    weight.copy_((made if scale is None else made / scale).reshape(weight.shape))


def _scale(norm: Any) -> Tensor | None:
    """What a batch norm multiplies each row with; never so small that dividing by it would lose the row."""
    if norm is None:
        return None
    factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return factor.abs().clamp(min=1e-3 * float(factor.abs().max())).unsqueeze(1)


def two_linears(model: nn.Module, rank: int, layers: str = ".*") -> nn.Module:
    """A copy of a model whose chosen Linear layers are two each, of the square roots of the singular values.

    Raises ValueError if a Conv2d is chosen: it stays one weight.
    """
    made = copy.deepcopy(model)
    for name, layer in chosen(made, layers, rank).items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a convolution, which is not written as two Linear layers: leave it out")
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        root = s[:rank].sqrt()
        first = nn.Linear(layer.in_features, rank, bias=False, dtype=u.dtype, device=u.device)
        last = nn.Linear(rank, layer.out_features, bias=layer.bias is not None, dtype=u.dtype, device=u.device)
        with torch.no_grad():
            first.weight.copy_(root[:, None] * v[:rank])
            last.weight.copy_(u[:, :rank] * root)
            if layer.bias is not None:
                last.bias.copy_(layer.bias)
        parent, _, own = name.rpartition(".")
        setattr(made.get_submodule(parent), own, nn.Sequential(first, last))
    return made
