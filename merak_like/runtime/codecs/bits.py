"""Small numbers packed without a gap, and sets of indices in few bits."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, width: int) -> int:
    """Bytes that ``pack`` makes of ``count`` numbers: each 8 bits of them, and the rest, end on a whole byte."""
    whole = max(0, (width - 1) // 8)
    return count * whole + (count * (width - 8 * whole) + 7) // 8


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack a vector of numbers below 2**width, lowest bit first, into ``packed_bytes`` bytes (uint8).

    Up to 8 bits go through one machine word per group that fills whole bytes; wider numbers go byte by byte.
    """
    if width > 8:
        return torch.cat([pack(codes & 255, 8), pack(codes >> 8, width - 8)])
    group, word = _group(width)
    codes = codes.to(word)
    short = -codes.numel() % group
    if short:
        codes = torch.cat([codes, codes.new_zeros(short)])
    words = codes.new_zeros(codes.numel() // group)
    for i, column in enumerate(codes.view(-1, group).unbind(1)):
        words |= column << (i * width)
    size = packed_bytes(group, width)
    data = words.view(torch.uint8).view(-1, word.itemsize)[:, :size].reshape(-1)
    return data[: packed_bytes(codes.numel() - short, width)]


def unpack(data: Tensor, width: int, count: int) -> Tensor:
    """The ``count`` numbers that ``pack`` packed: uint8, or int64 where they are wider than 8 bits.

    ``data`` must have ``packed_bytes(count, width)`` bytes.
    """
    assert data.numel() == packed_bytes(count, width), (data.numel(), count, width)
    if width > 8:
        low = unpack(data[:count], 8, count).long()
        return low | unpack(data[count:], width - 8, count).long() << 8
    group, word = _group(width)
    size, groups = packed_bytes(group, width), -(-count // group)
    padded = data.new_zeros(groups * size)
    padded[: data.numel()] = data
    words = data.new_zeros(groups, word.itemsize)
    words[:, :size] = padded.view(groups, size)
    words = words.view(word).reshape(groups)
    mask = (1 << width) - 1
    return torch.stack([(words >> (i * width) & mask).to(torch.uint8) for i in range(group)], 1).view(-1)[:count]


def _group(width: int) -> tuple[int, torch.dtype]:
    """How many numbers fill whole bytes, and the word that holds them."""
    return (8 // width, torch.uint8) if 8 % width == 0 else (8, torch.int64)


def index_bytes(count: int, size: int) -> int:
    """Bytes that ``pack_indices`` takes for ``count`` indices below ``size``."""
    low = _low_bits(count, size)
    if low is None:
        return packed_bytes(size, 1)
    return packed_bytes(count, low) + packed_bytes(count + (size >> low) + 1, 1)


def pack_indices(indices: Tensor, size: int) -> Tensor:
    """A strictly growing vector of indices below ``size`` as bytes (uint8).

    The low bits of each index are written as they are; the high bits, which only grow, in unary: at most 2 +
    log2(size / count) bits an index, within half a bit of what any code needs, and of a length known beforehand
    (Elias 1974, "Efficient storage and retrieval by content and address of static files", sec. III; Fano 1971). A
    dense set is a bitmap.
    """
    count, low = indices.numel(), _low_bits(indices.numel(), size)
    if low is None:
        bitmap = torch.zeros(size, dtype=torch.uint8, device=indices.device)
        bitmap[indices] = 1
        return pack(bitmap, 1)
    unary = torch.zeros(count + (size >> low) + 1, dtype=torch.uint8, device=indices.device)
    unary[(indices >> low) + torch.arange(count, device=indices.device)] = 1
    parts = [pack(indices & (1 << low) - 1, low)] if low else []
    return torch.cat([*parts, pack(unary, 1)])


def unpack_indices(data: Tensor, count: int, size: int) -> Tensor:
    """The indices (int64) that ``pack_indices`` packed.

    Raises ValueError for bytes that are not ``count`` growing indices below ``size``.
    """
    if data.numel() != index_bytes(count, size):
        raise ValueError(f"the frame is malformed: {data.numel()} bytes for {count} indices below {size}")
    low = _low_bits(count, size)
    if low is None:
        indices = unpack(data, 1, size).nonzero().view(-1)
        good = indices.numel() == count
    else:
        lows = packed_bytes(count, low)
        ones = unpack(data[lows:], 1, count + (size >> low) + 1).nonzero().view(-1)
        good = ones.numel() == count
        indices = ones
        if good:
            indices = ones - torch.arange(count, device=data.device) << low
            indices = indices | unpack(data[:lows], low, count).long() if low else indices
            good = bool((indices[1:] > indices[:-1]).all()) and bool((indices < size).all())
    if not good:
        raise ValueError(f"the frame is malformed: its indices are not {count} growing numbers below {size}")
    return indices


def _low_bits(count: int, size: int) -> int | None:
    """How many bits of an index are written as they are; None where a bitmap is no longer."""
    low = max(0, (size // max(count, 1)).bit_length() - 1)
    if packed_bytes(count, low) + packed_bytes(count + (size >> low) + 1, 1) >= packed_bytes(size, 1):
        return None
    return low
