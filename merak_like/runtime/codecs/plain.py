"""Codecs that keep every element: as it is, or in half the bits.

``fp16`` and ``bf16`` are the IEEE 754 half (relative error 2**-11 from 6.1e-5 to 65504) and Google's brain float
(2**-8 over the range of fp32). NaN and infinities pass; a finite value beyond the range becomes the largest there is,
not infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merak_like.runtime.codecs.codec import Codec, Context, require_floating
from merak_like.runtime.codecs.wire import Layout, layout_of


@dataclass(eq=False)
class Identity(Codec):
    """The tensor's own bytes, for any dtype."""

    name: ClassVar[str] = "identity"

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        return x, b""

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        self.expect(body, side, layout, context)
        return body

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        return layout, 0


@dataclass(eq=False)
class Fp16(Codec):
    """Elements as IEEE half."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        require_floating(layout_of(x), self.text)
        return narrow(x, self.dtype), b""

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        self.expect(body, side, layout, context)
        return narrow(body, layout.dtype)

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        require_floating(layout, self.text)
        return Layout(layout.shape, self.dtype), 0


@dataclass(eq=False)
class Bf16(Fp16):
    """Elements as brain float."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, with what is finite kept finite."""
    y = x.to(dtype)
    most = torch.finfo(dtype).max
    if most >= torch.finfo(x.dtype).max:
        return y
    return torch.where(y.isinf() & x.isfinite(), torch.copysign(torch.full_like(y, most), y), y)
