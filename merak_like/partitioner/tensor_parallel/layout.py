"""How a tensor lies on the ranks of a tensor-parallel group: per dimension, which axes are sharded. Plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Axis:
    """A factor of a dimension. Rank r of the group has part ``r // repeat % degree`` of it; degree 1 has it whole."""

    size: int
    degree: int = 1
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Segments:
    """A factor that is a row of dimensions, as in fused projections of several widths."""

    parts: tuple[Factors, ...]


Factors = tuple["Axis | Segments", ...]
"""A dimension: the product of its factors, slowest first."""
Layout = tuple[Factors, ...]
"""A tensor: its dimensions."""
Where = tuple[str, tuple[int | str, ...]]
"""An operand: the step's name and the path in its arguments."""


def is_sharded(factors: Factors) -> bool:
    """Whether some of a dimension is on other ranks."""
    return any(f.degree > 1 if isinstance(f, Axis) else any(map(is_sharded, f.parts)) for f in factors)


def whole_size(factors: Factors) -> int:
    """Elements along the dimension."""
    return prod(f.size if isinstance(f, Axis) else sum(map(whole_size, f.parts)) for f in factors)


def local_size(factors: Factors) -> int:
    """Elements along the dimension that one rank has; the same for all."""
    return prod(f.size // f.degree if isinstance(f, Axis) else sum(map(local_size, f.parts)) for f in factors)


def pieces(factors: Factors, rank: int) -> tuple[tuple[int, int], ...]:
    """The ranges ``start, stop`` of the whole dimension that a rank has, in the order it has them."""
    merged: list[tuple[int, int]] = []
    for start, stop in _pieces(factors, rank):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _pieces(factors: Factors, rank: int) -> Iterator[tuple[int, int]]:
    if not factors:
        yield 0, 1
        return
    head, inner = factors[0], factors[1:]
    width = whole_size(inner)
    inside = pieces(inner, rank)
    if isinstance(head, Axis):
        each = head.size // head.degree
        first = rank // head.repeat % head.degree * each
        ranges = [(first, first + each)]
    else:
        ranges, place = list[tuple[int, int]](), 0
        for part in head.parts:
            ranges += [(place + start, place + stop) for start, stop in pieces(part, rank)]
            place += whole_size(part)
    for start, stop in ranges:
        if inside == ((0, width),):
            yield start * width, stop * width
        else:
            for i in range(start, stop):
                yield from ((i * width + a, i * width + b) for a, b in inside)


def same_parts(factors: Factors, degree: int, repeat: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The ranges, in a rank's own numbering, of segments that a group does not divide though it divides others.

    Every rank of the group has these elements; their gradients add up over it. Empty if all is divided, or nothing.
    """
    found: list[tuple[int, int]] = []

    def divided(dim: Factors) -> bool:
        return any(
            (f.degree, f.repeat) in ((degree, repeat), (ranks, 1)) and f.degree > 1
            if isinstance(f, Axis)
            else any(map(divided, f.parts))
            for f in dim
        )

    def walk(dim: Factors, start: int, scale: int) -> None:
        if not divided(dim):
            found.append((start, start + local_size(dim) * scale))
            return
        head, inner = (dim[0], dim[1:]) if dim else (None, ())
        if isinstance(head, Segments) and not divided(inner):
            width = local_size(inner) * scale
            for part in head.parts:
                walk(part, start, width)
                start += local_size(part) * width

    if divided(factors):
        walk(factors, 0, 1)
    return tuple(found)
