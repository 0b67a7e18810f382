"""A tensor in few bits with a bound on every element: |x - x'| <= bound, signs and zeros exact.

    code 0          x == 0
    code +-k        (k - 1) * 2 bound < |x| <= k * 2 bound, read as (2 k - 1) * bound

Codes too large for the width, and whatever rounding would put outside of the bound, are kept as they are beside their
places; so are NaN and infinities. As zero and sign survive, what asks only whether x > 0, as a ReLU's backward does,
gets the exact answer. Error-bounded quantisation as in SZ (Di and Cappello, IPDPS 2016), without its prediction.

A slice is coded at a time, as codes on their way take ten times what they come to in the end. All slices have one
width, so that what is kept is one block of memory: many small ones leave holes that no activation fits into.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from merak_like.runtime.codecs.bits import pack, packed_bytes, unpack
from merak_like.runtime.codecs.wire import from_bytes

WIDTHS = range(3, 13)
SLICE = 2**17
"""Numbers that are coded at once; a multiple of 8, so that each slice ends on a whole byte."""
ODD_BYTES = 4
"""Of the place of an element that is kept as it is; its value comes on top."""


@dataclass(frozen=True)
class Packed:
    """A tensor in few bits."""

    shape: torch.Size
    dtype: torch.dtype
    bound: float
    width: int
    codes: Tensor | bytes
    """Packed without a gap; by the entropy coder, bytes."""
    places: Tensor
    odd: Tensor

    @property
    def nbytes(self) -> int:
        """Of everything it keeps, 16 for the bound and the width."""
        codes = len(self.codes) if isinstance(self.codes, bytes) else self.codes.nbytes
        return codes + self.places.nbytes + self.odd.nbytes + 16

    def tensor(self) -> Tensor:
        """The tensor again, within the bound."""
        flat = torch.empty(self.shape.numel(), dtype=self.dtype, device=self.odd.device)
        table = _levels(self.width, self.bound, flat.device).to(self.dtype)
        for part, codes in zip(flat.split(SLICE), self._slices(), strict=True):
            torch.index_select(table, 0, codes, out=part)
        flat[self.places.long()] = self.odd
        return flat.view(self.shape)

    def _slices(self) -> Iterator[Tensor]:
        """The codes as int32, a slice at a time."""
        reader, left = zlib.decompressobj(), self.codes
        for begin in range(0, self.shape.numel(), SLICE):
            count = min(SLICE, self.shape.numel() - begin)
            if isinstance(left, Tensor):
                start = packed_bytes(begin, self.width)
                yield unpack(left[start : start + packed_bytes(count, self.width)], self.width, count).int()
                continue
            raw = bytearray()
            while len(raw) < count * _planes(self.width):
                raw += reader.decompress(left, count * _planes(self.width) - len(raw))
                left = reader.unconsumed_tail
            planes = from_bytes(bytes(raw), torch.uint8, self.odd.device).view(-1, count)
            yield planes[0].int() if len(planes) == 1 else planes[0].int() | planes[1].int() << 8


def quantise(x: Tensor, bound: float, *, entropy: bool = False) -> Packed | None:
    """Pack a floating tensor; None where that would save nothing. ``entropy`` adds Huffman's code (RFC 1951)."""
    flat = x.detach().reshape(-1)
    if not flat.numel() or not 0 < bound < float("inf"):
        return None
    bound *= 1 - 2**-10  # so that rounding puts little outside
    width = _width(flat, bound)
    size = packed_bytes(flat.numel(), width)
    if size >= flat.nbytes:
        return None
    kept = bytearray() if entropy else torch.empty(size, dtype=torch.uint8, device=flat.device)
    coder = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    places: list[Tensor] = []
    for begin, part in zip(range(0, flat.numel(), SLICE), flat.split(SLICE), strict=True):
        codes, odd = _codes(part, bound, width)
        if len(odd):
            places.append(odd + begin)
        if isinstance(kept, bytearray):
            planes = torch.stack([codes & 255, codes >> 8] if _planes(width) == 2 else [codes])
            kept += coder.compress(planes.to(torch.uint8).cpu().numpy().tobytes())
        else:
            start = packed_bytes(begin, width)
            kept[start : start + packed_bytes(len(part), width)] = pack(codes.long(), width)
    where = torch.cat(places) if places else torch.empty(0, dtype=torch.int64, device=flat.device)
    codes = bytes(kept + coder.flush()) if isinstance(kept, bytearray) else kept
    near = where.int() if flat.numel() < 2**31 else where
    found = Packed(x.shape, x.dtype, bound, width, codes, near, flat[where])
    return found if found.nbytes < flat.nbytes else None


def _codes(part: Tensor, bound: float, width: int) -> tuple[Tensor, Tensor]:
    """The codes of a slice, none below 0, and the places of what they do not stand for."""
    wide, limit = _wide(part), 2 ** (width - 1) - 1
    steps = _steps(wide, bound)
    small = steps <= limit
    codes = torch.where(small, steps * wide.sign().nan_to_num_(0), 0).to(torch.int16) + limit
    table = _levels(width, bound, part.device)
    # a difference in float32 is rounded: what is within this is within the bound
    exact = (table[codes.int()].to(part.dtype).to(wide.dtype) - wide).abs() <= bound * (1 + 2**-11)
    return codes, (~(exact & small)).nonzero().view(-1)


def _wide(part: Tensor) -> Tensor:
    return part.to(torch.promote_types(part.dtype, torch.float32))


def _steps(wide: Tensor, bound: float) -> Tensor:
    """How many steps of twice the bound each number is from zero."""
    return torch.ceil(wide.abs() / (2 * bound)).nan_to_num_(2**30, 2**30).clamp_(max=2**30)


def _planes(width: int) -> int:
    """Bytes of a code before the entropy coder."""
    return 2 if width > 8 else 1


def _levels(width: int, bound: float, device: torch.device) -> Tensor:
    """What each code is read as, in double precision."""
    limit = 2 ** (width - 1) - 1
    steps = torch.arange(-limit, limit + 2, dtype=torch.float64, device=device)
    return steps.sign() * (2 * steps.abs() - 1).clamp(min=0) * bound


def _width(flat: Tensor, bound: float) -> int:
    """The width that takes fewest bytes, with what does not fit kept beside."""
    limits = _wide(torch.tensor([2 ** (w - 1) for w in WIDTHS], dtype=flat.dtype, device=flat.device))
    over = torch.zeros(len(WIDTHS), dtype=torch.int64, device=flat.device)
    for part in flat.split(SLICE):
        at = torch.bucketize(_steps(_wide(part), bound), limits, right=True)  # how many widths are too narrow for it
        over += torch.bincount(at, minlength=len(WIDTHS) + 1).flip(0).cumsum(0).flip(0)[1:]
    odd = ODD_BYTES + flat.element_size()
    sizes = {w: packed_bytes(flat.numel(), w) + odd * n for w, n in zip(WIDTHS, over.tolist(), strict=True)}
    return min(sizes, key=lambda w: (sizes[w], w))
