"""The bytes a codec writes besides its body: layouts, numbers, and a reader that believes nothing it is told.

Numbers are little-endian base-128 (LEB128): small ones, nearly all of them, take one or two bytes.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

assert sys.byteorder == "little", "a body is the tensor's own bytes, and the wire is little-endian"

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
MOST_DIMENSIONS = 16


class Layout(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def layout_of(x: Tensor) -> Layout:
    """The layout of a tensor."""
    return Layout(tuple(x.shape), x.dtype)


def number(value: int) -> bytes:
    """A number of 0 or more as LEB128."""
    assert value >= 0
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def written(layout: Layout) -> bytes:
    """A layout as bytes. Raises ValueError for a dtype that does not travel."""
    if layout.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"a tensor of {layout.dtype} does not travel: cast it to one of {names}")
    if len(layout.shape) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(layout.shape)} dimensions does not travel: flatten it to {MOST_DIMENSIONS}")
    return bytes([DTYPES.index(layout.dtype), len(layout.shape)]) + b"".join(map(number, layout.shape))


def to_bytes(x: Tensor) -> bytes:
    """A tensor's elements as bytes of the host."""
    return as_bytes(x).cpu().numpy().tobytes()


def as_bytes(x: Tensor) -> Tensor:
    """A tensor's elements as a vector of uint8 on the same device, without a copy where it is contiguous."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector from bytes; their number must be a multiple of the element's size."""
    assert len(data) % dtype.itemsize == 0
    if not data:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device)


class Reader:
    """Reads a frame from its beginning; every step past the end, or over a limit, is a ValueError."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"the frame ends early: {what} takes {count} bytes, {len(self.data) - self.at} are left")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self, what: str) -> int:
        """A number of 0 or more, below 2**63."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1, what)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError(f"the frame is malformed: {what} is larger than any size")

    def layout(self, limit: int) -> Layout:
        """A layout of at most ``limit`` elements: asked before anything of that size is made."""
        code, dimensions = self.take(2, "a layout")
        if code >= len(DTYPES) or dimensions > MOST_DIMENSIONS:
            raise ValueError(f"the frame is malformed: dtype code {code}, {dimensions} dimensions")
        layout = Layout(tuple(self.number("a size") for _ in range(dimensions)), DTYPES[code])
        # Sizes too, each alone: a zero beside huge ones makes an empty tensor that torch cannot hold.
        if max(layout.numel, *layout.shape, 0) > limit:
            raise ValueError(f"the frame claims {layout}, more than the {limit} elements that are allowed")
        return layout

    def rest(self) -> bytes:
        """Everything not read so far."""
        return self.take(len(self.data) - self.at, "the rest")

    def end(self, what: str) -> None:
        """Raises ValueError where something is left."""
        if self.at != len(self.data):
            raise ValueError(f"the frame is malformed: {len(self.data) - self.at} bytes too many after {what}")
