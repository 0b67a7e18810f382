"""``deflate``: fewer bytes, the same tensor.

The bytes of the elements, sorted by significance (all first bytes, then all second ones, as HDF5's shuffle filter
does), then DEFLATE (RFC 1951) in zlib's frame. Where that gains nothing the bytes are sent as they are. Any dtype;
behind any codec.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merak_like.runtime.codecs.codec import Codec, Context
from merak_like.runtime.codecs.wire import Layout, as_bytes, from_bytes, layout_of

STORED, DEFLATED = b"\x00", b"\x01"


@dataclass(eq=False)
class Deflate(Codec):
    """zlib at ``level``, 1 (fast) to 9 (small)."""

    name: ClassVar[str] = "deflate"
    level: int = 1

    def __post_init__(self) -> None:
        if self.level not in range(1, 10):
            raise ValueError(f"{self.text}: the level must be 1 (fast) to 9 (small), found {self.level}")

    @property
    def fixed(self) -> bool:
        return False

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        plain = as_bytes(x)
        data = zlib.compress(plain.view(-1, x.itemsize).T.contiguous().cpu().numpy().tobytes(), self.level)
        if len(data) >= plain.numel():
            return plain, STORED
        return from_bytes(data, torch.uint8, x.device), DEFLATED

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        if side == STORED:
            self.expect(body, side, layout, context)
            return body.view(layout.dtype).view(layout.shape)
        if side != DEFLATED or body.dtype != torch.uint8 or body.dim() != 1:
            raise ValueError(f"the frame is malformed: side {side!r} and body {layout_of(body)} are not of {self.text}")
        inflate = zlib.decompressobj()
        try:
            # One byte more than is right, so that too much shows without being made.
            data = inflate.decompress(body.cpu().numpy().tobytes(), layout.nbytes + 1)
        except zlib.error as error:
            raise ValueError(f"the frame is malformed: its body does not inflate: {error}") from None
        if len(data) != layout.nbytes or not inflate.eof or inflate.unused_data:
            raise ValueError(
                f"the frame is malformed: its body does not inflate to the {layout.nbytes} bytes of {layout}"
            )
        planes = from_bytes(data, torch.uint8, body.device).view(layout.dtype.itemsize, -1)
        return planes.T.contiguous().view(-1).view(layout.dtype).view(layout.shape)

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        """The most it can be: what is not worth deflating is sent as it is."""
        return Layout((layout.nbytes,), torch.uint8), 1
