"""An edge half of signs (B-SL: Pham et al. 2022, "Binarizing Split Learning for Data Privacy Enhancement and
Computation Reduction").

Weights are sign(W) * mean|W| and activations are signs; gradients pass through where |x| <= 1 (the straight-through
estimator of Courbariaux et al. 2016, sec. 1.3). What crosses the cut is then signs, so the codec ``sign`` sends one bit
an element and loses nothing but the scale. ``leak_loss`` added to the task's loss makes what is sent less dependent on
the sample, and ``ClipNoise`` adds noise to it. Neither is a proof: noise without an accountant of what it hides is no
differential privacy, and a decoder trained on signs still finds most of the sample. Measure it with ``leakage``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradients[0] * (x.abs() <= 1)


def sign(x: Tensor) -> Tensor:
    """+1 or -1 (for 0: +1); the gradient passes where |x| <= 1."""
    return _Sign.apply(x)  # type: ignore[return-value]


class Binary(nn.Module):
    """Signs as a layer, behind a norm that spreads them."""

    def forward(self, x: Tensor) -> Tensor:
        """The signs of x."""
        return sign(x)


class BinaryLinear(nn.Linear):
    """A Linear layer whose weight is a sign and, for each output, a magnitude; the full weight is only trained."""

    def forward(self, input: Tensor) -> Tensor:
        """(.., in) to (.., out)."""
        scale = self.weight.detach().abs().mean(1, keepdim=True)
        return F.linear(input, sign(self.weight) * scale, self.bias)


class ClipNoise(nn.Module):
    """Clips each sample to a norm and, in training and after, adds normal noise of ``noise`` times that norm.

    This is no differential privacy: nobody here counts what the samples tell over many steps.
    """

    def __init__(self, norm: float, noise: float) -> None:
        super().__init__()
        if norm <= 0 or noise < 0:
            raise ValueError(f"norm={norm}, noise={noise}: the norm is above 0, the noise not below")
        self.norm, self.noise = norm, noise

    def forward(self, x: Tensor) -> Tensor:
        """(samples, ..) to the same."""
        return clip_noise(x, self.norm, self.noise, torch.randn_like(x))


def clip_noise(x: Tensor, norm: float, noise: float, drawn: Tensor) -> Tensor:
    """Samples (samples, ..) of at most a norm, plus normal numbers ``drawn`` with ``noise`` times that norm."""
    length = x.flatten(1).norm(dim=1).clamp(min=1e-12)
    clipped = x * (norm / length).clamp(max=1).view(-1, *[1] * (x.ndim - 1))
    return clipped + noise * norm / x[0].numel() ** 0.5 * drawn


def binarise(model: nn.Module, head: Collection[str]) -> None:
    """Let the Linear layers whose weights are among these names be of signs, in place. Raises ValueError for none."""
    found = [m for n, m in model.named_modules() if type(m) is nn.Linear and f"{n}.weight" in head]
    if not found:
        raise ValueError("binary_edge: the edge's head calls no Linear layer, so there is nothing to make of signs")
    for layer in found:
        layer.__class__ = BinaryLinear


def leak_loss(x: Tensor, z: Tensor) -> Tensor:
    """Distance correlation between samples and what is sent of them, (samples, ..) each: 0 (independent) to 1.

    Differentiable (Szekely et al. 2007, sec. 2). A low value alone proves nothing: a decoder may still find the sample.
    """
    a, b = (_centred(t.flatten(1)) for t in (x, z))
    both = ((a * a).mean() * (b * b).mean()).sqrt()
    return ((a * b).mean() / both.clamp(min=1e-12)).clamp(min=1e-12).sqrt()  # at 0 a root has no gradient


def _centred(x: Tensor) -> Tensor:
    """Distances between samples with the means of rows and columns taken away."""
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # with a gradient of 0 at 0
    return apart - apart.mean(0, keepdim=True) - apart.mean(1, keepdim=True) + apart.mean()
