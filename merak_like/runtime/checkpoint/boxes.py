"""Where what a rank holds of a parameter lies in the whole parameter.

A rank may hold all of it, a shard of it (blocks along its dimensions), or a run of its numbers in row-major order:
the share of an optimizer that is spread over replicas. All three are blocks:

    numbers 5 to 17 of a 4 x 6 tensor      . . . . . x      1 x 1
                                           x x x x x x      1 x 6
                                           x x x x x .      1 x 5
                                           . . . . . .
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor

Sizes = tuple[int, ...]


class Box(NamedTuple):
    """A block of a tensor."""

    start: Sizes
    sizes: Sizes


class Placement(NamedTuple):
    """How a rank's own tensor is part of a whole one: its blocks, and where each begins in the whole."""

    shape: Sizes
    """Of the whole."""
    blocks: tuple[tuple[Box, Sizes], ...]
    """A block of the own tensor, and its start in the whole."""


class Part(NamedTuple):
    """Some numbers of a whole tensor: ``tensor`` is a view of what the rank holds, of the block's shape."""

    start: Sizes
    tensor: Tensor


class Held(NamedTuple):
    """An entry of a checkpoint, as far as this rank holds it."""

    key: str
    shape: Sizes
    """Of the whole tensor."""
    parts: tuple[Part, ...]


def whole(shape: Sizes) -> Placement:
    """For a tensor that is all there."""
    start = (0,) * len(shape)
    return Placement(shape, ((Box(start, shape), start),))


def parts(tensor: Tensor, shape: Sizes, placement: Placement, run: tuple[int, int] | None = None) -> list[Part]:
    """The parts of the whole that a tensor holds.

    ``tensor`` has the shape of the rank's own tensor, ``shape``, or, with ``run`` = (start, stop), is flat and holds
    that run of the own tensor's numbers.
    """
    if run is None:
        return [Part(at, _cut(tensor, box)) for box, at in placement.blocks]
    found: list[Part] = []
    taken = 0
    for box in boxes_of_run(shape, *run):
        flat = tensor.narrow(0, taken, prod(box.sizes)).view(box.sizes)
        taken += prod(box.sizes)
        for block, at in placement.blocks:
            common = _intersection(box, block)
            if common is not None:
                inside = tuple(c - b for c, b in zip(common.start, box.start, strict=True))
                start = tuple(a + c - b for a, c, b in zip(at, common.start, block.start, strict=True))
                found.append(Part(start, _cut(flat, Box(inside, common.sizes))))
    return found


def boxes_of_run(shape: Sizes, start: int, stop: int) -> list[Box]:
    """The numbers ``start <= i < stop`` of a tensor in row-major order as blocks, in order: 2 * dims - 1 at most."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = start // row, stop // row
    found: list[Box] = []

    def inside(index: int, a: int, b: int) -> None:
        found.extend(Box((index, *box.start), (1, *box.sizes)) for box in boxes_of_run(shape[1:], a, b))

    if first == last:
        inside(first, start - first * row, stop - first * row)
        return found
    if start > first * row:
        inside(first, start - first * row, row)
        first += 1
    if last > first:
        rest = len(shape) - 1
        found.append(Box((first, *(0,) * rest), (last - first, *shape[1:])))
    if stop > last * row:
        inside(last, 0, stop - last * row)
    return found


def _cut(tensor: Tensor, box: Box) -> Tensor:
    for dim, (start, size) in enumerate(zip(box.start, box.sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, size)
    return tensor


def _intersection(a: Box, b: Box) -> Box | None:
    start = tuple(max(x, y) for x, y in zip(a.start, b.start, strict=True))
    stop = tuple(min(x + n, y + m) for x, n, y, m in zip(a.start, a.sizes, b.start, b.sizes, strict=True))
    sizes = tuple(q - p for p, q in zip(start, stop, strict=True))
    return Box(start, sizes) if all(size > 0 for size in sizes) else None
