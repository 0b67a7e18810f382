"""``sign``: one bit an element, and the mean magnitude as the scale.

The wire of binarised split learning (B-SL: Pham et al. 2022, "Binarizing Split Learning for Data Privacy Enhancement
and Computation Reduction"), where the edge half itself ends in signs with a straight-through gradient: there the
codec loses nothing but the scale. On other activations it is the best two-valued approximation: a * sign(x) with a =
mean |x| minimises the squared error (Rastegari et al. 2016, "XNOR-Net", sec. 3.1), which is then sum(x**2) - n *
a**2.

Zero counts as positive. A group with NaN or an infinity arrives as NaN throughout. It saves bytes; what the signs
tell about the sample is nearly all that the activations tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merak_like.runtime.codecs.bits import pack, packed_bytes, unpack
from merak_like.runtime.codecs.codec import Codec, Context, require_floating
from merak_like.runtime.codecs.plain import narrow
from merak_like.runtime.codecs.uniform import group_shape, grouped, groups, require_group, work_dtype
from merak_like.runtime.codecs.wire import Layout, from_bytes, layout_of, to_bytes


@dataclass(eq=False)
class Sign(Codec):
    """One bit an element; a scale (bf16) for the whole "tensor", or per "channel" or "sample"."""

    name: ClassVar[str] = "sign"
    per: str = "tensor"

    def __post_init__(self) -> None:
        require_group(self.per, self.text)

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        require_floating(layout_of(x), self.text)
        matrix, dim = grouped(x, self.per)
        if not matrix.numel():
            scale = matrix.new_zeros(groups(tuple(x.shape), self.per), dtype=torch.bfloat16)
        else:
            # A mean overflows where a sum does; the magnitudes relative to the largest do not.
            most = matrix.abs().amax(dim, keepdim=True)
            mean = (matrix / torch.where(most == 0, 1, most)).abs().mean(dim) * most.squeeze(dim)
            scale = torch.where(mean.isfinite(), narrow(mean, torch.bfloat16), torch.nan)
        return pack((matrix >= 0).view(-1).to(torch.uint8), 1), to_bytes(scale)

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        self.expect(body, side, layout, context)
        shape, dim = group_shape(layout.shape, self.per)
        scale = from_bytes(side, torch.bfloat16, body.device).to(work_dtype(layout.dtype))
        signs = unpack(body, 1, layout.numel).view(shape).to(scale.dtype).mul_(2).sub_(1)
        return narrow(signs.mul_(scale.unsqueeze(dim)), layout.dtype).view(layout.shape)

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        require_floating(layout, self.text)
        return Layout((packed_bytes(layout.numel, 1),), torch.uint8), 2 * groups(layout.shape, self.per)
