"""A tensor in few bits with a bound on every element: |x - x'| <= bound, signs and zeros exact.

    code 0          x == 0
    code +-k        (k - 1) * 2 bound < |x| <= k * 2 bound, read as (2 k - 1) * bound

Codes too large for the width, and whatever rounding would put outside of the bound, are kept as they are beside their
places; so are NaN and infinities. As zero and sign survive, what asks only whether x > 0, as a ReLU's backward does,
gets the exact answer. Error-bounded quantisation as in SZ (Di and Cappello, IPDPS 2016), without its prediction.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from merak_like.runtime.codecs.bits import pack, packed_bytes, unpack
from merak_like.runtime.codecs.wire import from_bytes

WIDTHS = range(3, 13)
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
        count = self.shape.numel()
        if isinstance(self.codes, bytes):
            planes = from_bytes(zlib.decompress(self.codes), torch.uint8, self.odd.device).view(-1, count)
            codes = planes[0].int() if len(planes) == 1 else planes[0].int() | planes[1].int() << 8
        else:
            codes = unpack(self.codes, self.width, count)
        table = _levels(self.width, self.bound, self.odd.device)
        x = table[codes.int()].to(self.dtype)
        x[self.places.long()] = self.odd
        return x.view(self.shape)


def quantise(x: Tensor, bound: float, *, entropy: bool = False) -> Packed | None:
    """Pack a floating tensor; None where that would save nothing. ``entropy`` adds Huffman's code (RFC 1951)."""
    flat = x.detach().reshape(-1)
    if not flat.numel() or not 0 < bound < float("inf"):
        return None
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    bound *= 1 - 2**-10  # so that rounding puts little outside
    steps = torch.ceil(wide.abs() / (2 * bound)).nan_to_num_(2**30, 2**30).clamp_(max=2**30)
    width = _width(steps, flat)
    limit = 2 ** (width - 1) - 1
    small = steps <= limit
    codes = torch.where(small, steps * wide.sign().nan_to_num_(0), 0).to(torch.int16)
    table = _levels(width, bound, flat.device)
    codes = codes + limit
    # a difference in float32 is rounded: what is within this is within the bound
    exact = (table[codes.int()].to(flat.dtype).to(wide.dtype) - wide).abs() <= bound * (1 + 2**-11)
    places = (~(exact & small)).nonzero().view(-1).int()
    odd = flat[places.long()]
    if entropy:
        planes = [codes & 255, codes >> 8] if width > 8 else [codes]
        raw = torch.stack(planes).to(torch.uint8).cpu().numpy().tobytes()
        coder = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        made: Tensor | bytes = coder.compress(raw) + coder.flush()
    else:
        made = pack(codes.long(), width)
    found = Packed(x.shape, x.dtype, bound, width, made, places, odd)
    return found if found.nbytes < flat.nbytes else None


def _levels(width: int, bound: float, device: torch.device) -> Tensor:
    """What each code is read as, in double precision."""
    limit = 2 ** (width - 1) - 1
    steps = torch.arange(-limit, limit + 2, dtype=torch.float64, device=device)
    return steps.sign() * (2 * steps.abs() - 1).clamp(min=0) * bound


def _width(steps: Tensor, flat: Tensor) -> int:
    """The width that takes fewest bytes, with what does not fit kept beside."""
    count, odd = flat.numel(), ODD_BYTES + flat.element_size()
    sizes = {w: packed_bytes(count, w) + odd * int((steps >= 2 ** (w - 1)).sum()) for w in WIDTHS}
    return min(sizes, key=lambda w: (sizes[w], w))
