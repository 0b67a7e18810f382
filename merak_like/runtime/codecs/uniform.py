"""``int``: 1 to 8 bits an element on a uniform grid around zero, one scale per channel.

With k = 2**(bits - 1), grid step d = s / k and s the largest magnitude of the channel, an element x becomes the integer
round(x / d) in [-k, k - 1], as in Wang et al. 2022, "Fine-tuning Language Models over Slow Networks using Activation
Quantization with Guarantees" (NeurIPS), and their released code. One end of the grid is short of s; here d takes the
sign that puts the largest element at the other end, so a channel of one sign uses all of it. Zero is always exact.

    |x - x'| <= |d| / 2,   and up to |d| for elements within half a step of s at the short end

``stochastic=True`` rounds up or down at random, so that the mean of x' is x (Alistarh et al. 2017, "QSGD" (NeurIPS),
sec. 3.1); its grid has k - 1 steps on both sides, nothing is cut off, and |x - x'| < |d|. It takes 2 bits or more.

Scales travel as bf16, rounded up: fp16 would lose gradients below 6e-8. A channel with NaN or an infinity (or above
3.39e38) arrives as NaN throughout, so that whoever skips such steps sees it; the other channels are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merak_like.runtime.codecs.bits import pack, packed_bytes, unpack
from merak_like.runtime.codecs.codec import Codec, Context, by_sample, require_floating
from merak_like.runtime.codecs.plain import narrow
from merak_like.runtime.codecs.wire import Layout, from_bytes, layout_of, to_bytes

GROUPS = ("channel", "sample", "tensor")


@dataclass(eq=False)
class Uniform(Codec):
    """``bits`` an element; a scale per "channel" (last dimension), "sample" (first) or for the whole "tensor"."""

    name: ClassVar[str] = "int"
    bits: int = 8
    per: str = "channel"
    stochastic: bool = False

    def __post_init__(self) -> None:
        lowest = 2 if self.stochastic else 1
        if self.bits not in range(lowest, 9):
            nearest = max(lowest, min(8, int(self.bits)))
            raise ValueError(f"{self.text}: bits must be {lowest} to 8 here, the nearest is {nearest}")
        require_group(self.per, self.text)

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        require_floating(layout_of(x), self.text)
        matrix, dim = grouped(x, self.per)
        k = 2 ** (self.bits - 1)
        steps = _scale(matrix, dim, k - self.stochastic)
        d = steps.to(matrix.dtype) / (k - self.stochastic)
        at = matrix / torch.where(d == 0, 1, d).unsqueeze(dim)
        if self.stochastic:
            noise = torch.rand(at.shape, generator=context.generator(self.text, x.device), device=x.device)
            at = (at + noise.to(at.dtype)).floor_()
        else:
            at = at.round_()
        codes = at.nan_to_num_(0.0).clamp_(-k, k - 1).add_(k).to(torch.uint8)
        return pack(codes.view(-1), self.bits), to_bytes(steps)

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        self.expect(body, side, layout, context)
        k = 2 ** (self.bits - 1)
        shape, dim = group_shape(layout.shape, self.per)
        work = work_dtype(layout.dtype)
        d = from_bytes(side, torch.bfloat16, body.device).to(work) / (k - self.stochastic)
        codes = unpack(body, self.bits, layout.numel).view(shape).to(work).sub_(k)
        return narrow(codes.mul_(d.unsqueeze(dim)), layout.dtype).view(layout.shape)

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        require_floating(layout, self.text)
        return Layout((packed_bytes(layout.numel, self.bits),), torch.uint8), 2 * groups(layout.shape, self.per)


def _scale(matrix: Tensor, dim: int, steps: int) -> Tensor:
    """Largest magnitude of each group as bf16, rounded up; negative where the positive end is the larger."""
    if not matrix.numel():
        return matrix.new_zeros(matrix.shape[1 - dim], dtype=torch.bfloat16)
    low, high = matrix.amin(dim), matrix.amax(dim)
    most = torch.maximum(high, -low).float()
    scale = most.to(torch.bfloat16)
    # The next bf16 up is the next integer up, as for every float of one sign.
    scale = torch.where(scale.float() < most, (scale.view(torch.int16) + 1).view(torch.bfloat16), scale)
    scale = torch.where(most.isfinite(), scale.clamp(max=torch.finfo(torch.bfloat16).max), torch.nan)
    return torch.where(high > -low, -scale, scale)


def require_group(per: str, who: str) -> None:
    """Raises ValueError for a word that is not in ``GROUPS``."""
    if per not in GROUPS:
        raise ValueError(f"{who}: per must be one of {', '.join(GROUPS)}, found {per!r}")


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in: fp32, or fp64 for tensors of fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_shape(shape: tuple[int, ...], per: str) -> tuple[tuple[int, int], int]:
    """The matrix in which elements that share a scale stand along one dimension, and that dimension."""
    samples, features = by_sample(shape)
    if per == "tensor" or len(shape) < 2:
        return (1, samples * features), 1
    if per == "sample":
        return (samples, features), 1
    return (samples * features // shape[-1] if shape[-1] else 0, shape[-1]), 0


def groups(shape: tuple[int, ...], per: str) -> int:
    """Number of scales."""
    matrix, dim = group_shape(shape, per)
    return matrix[1 - dim]


def grouped(x: Tensor, per: str) -> tuple[Tensor, int]:
    """x as that matrix, in the dtype to compute in."""
    shape, dim = group_shape(tuple(x.shape), per)
    return x.reshape(shape).to(work_dtype(x.dtype)), dim
