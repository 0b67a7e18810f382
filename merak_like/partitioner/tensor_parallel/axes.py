"""Tensor dimensions as products of axes.

A dimension is a tuple of *axes*, slowest first; one of size 1 is empty. Views split and merge dimensions, so an axis
may be *refined* into several, everywhere at once, and two axes may turn out to be the same one (union-find). An axis
may also be a row of *segments*, as in a fused projection whose parts differ in size. A *pinned* axis may never be
sharded, and says why::

    qkv (48)  ──view──►  (3, 4, 4)  ──unbind──►  q, k, v (4, 4): pinned 3, heads 4, width of a head 4
    qkv (32)  ──split──►  q (16) | k (8) | v (8): one axis of three segments
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

Dim = tuple[int, ...]
"""Axes by number, slowest first."""
Dims = tuple[Dim, ...]
"""Of a tensor: one Dim per dimension."""


class Axes:
    """The axes found so far. Everything here is exact: what does not divide is pinned, never guessed."""

    def __init__(self) -> None:
        self._size: list[int] = []
        self._link: list[int] = []
        self._parts: dict[int, Dim] = {}
        self._segments: dict[int, Dims] = {}
        self._pins: dict[int, str] = {}

    def fresh(self, size: int, pin: str = "") -> Dim:
        """A dimension of one new axis, pinned if there is a reason given."""
        if size == 1:
            return ()
        axis = len(self._size)
        self._size.append(size)
        self._link.append(axis)
        if pin:
            self._pins[axis] = pin
        return (axis,)

    def root(self, axis: int) -> int:
        """The one axis that stands for all that are the same."""
        link = self._link
        while link[axis] != axis:
            link[axis] = link[link[axis]]
            axis = link[axis]
        return axis

    def resolve(self, dim: Iterable[int]) -> Dim:
        """The dimension in axes that are not refined further; a row of segments stays one axis."""
        found: list[int] = []
        for axis in dim:
            axis = self.root(axis)
            found.extend(self.resolve(self._parts[axis]) if axis in self._parts else (axis,))
        return tuple(found)

    def resized(self, sizes: Mapping[int, int]) -> Axes:
        """The same axes in other sizes; those of refined axes and rows of segments follow."""
        copy = Axes()
        copy.__dict__ |= self.__dict__
        known = dict[int, int]()

        def size(axis: int) -> int:
            axis = self.root(axis)
            if axis not in known:
                rows = self._segments.get(axis)
                if axis in self._parts:
                    known[axis] = prod(map(size, self._parts[axis]))
                elif rows:
                    known[axis] = sum(prod(map(size, dim)) for dim in rows)
                else:
                    known[axis] = sizes.get(axis, self._size[axis])
            return known[axis]

        copy._size = [size(axis) for axis in range(len(self._size))]
        return copy

    def size(self, dim: Iterable[int]) -> int:
        """Elements along a dimension."""
        return prod(self._size[axis] for axis in dim)

    def segments(self, axis: int) -> Dims:
        """The segments of an axis in order, those of segments included; empty for an ordinary axis."""
        flat: list[Dim] = []
        for segment in self._segments.get(axis, ()):
            inner = self.resolve(segment)
            nested = self.segments(inner[0]) if len(inner) == 1 else ()
            flat.extend(nested or (inner,))
        return tuple(flat)

    def leaves(self, dim: Iterable[int]) -> Iterator[int]:
        """Every axis of a dimension that is neither refined nor a row of segments."""
        for axis in self.resolve(dim):
            segments = self.segments(axis)
            if segments:
                for segment in segments:
                    yield from self.leaves(segment)
            else:
                yield axis

    def pinned(self, axis: int) -> str:
        """Why an axis may not be sharded, or nothing."""
        return self._pins.get(self.root(axis), "")

    def pin(self, dim: Iterable[int], why: str) -> None:
        """Forbid sharding a dimension; the first reason is kept."""
        for axis in self.leaves(dim):
            self._pins.setdefault(axis, why)

    def unify(self, one: Iterable[int], other: Iterable[int], why: str = "sizes do not divide") -> None:
        """The two dimensions are the same, element by element. What cannot be matched is pinned."""
        a, b = list(one)[::-1], list(other)[::-1]
        while a and b:
            x, y = self._next(a), self._next(b)
            if x == y:
                continue
            p, q = self._size[x], self._size[y]
            if p == 0 or q == 0:
                self.pin([*a, x, *b, y], "it is empty")
                return
            if p == q:
                self._merge(x, y, why)
            elif q % p == 0:
                self._refine(y, p)
                a.append(x)
                b.append(y)
            elif p % q == 0:
                self._refine(x, q)
                a.append(x)
                b.append(y)
            else:
                self.pin([*a, x, *b, y], why)
                return
        self.pin([*a, *b], why)

    def _next(self, stack: list[int]) -> int:
        axis = self.root(stack.pop())
        while axis in self._parts:
            stack.extend(self._parts[axis][::-1])
            axis = self.root(stack.pop())
        return axis

    def _merge(self, x: int, y: int, why: str) -> None:
        if y in self._segments and x not in self._segments:
            x, y = y, x
        pin = self._pins.pop(y, "")
        mine, theirs = self.segments(x), self.segments(y)
        if mine and theirs:
            self._align(x, y, why)
        self._segments.pop(y, None)
        self._link[y] = x
        if pin:
            self.pin((x,), pin)

    def _align(self, x: int, y: int, why: str) -> None:
        """Unify two rows of segments, cut at the borders of both."""
        for border in self._borders(x):
            self.cut(y, border)
        for border in self._borders(y):
            self.cut(x, border)
        if self._borders(x) == self._borders(y):
            for mine, theirs in zip(self.segments(x), self.segments(y), strict=True):
                self.unify(mine, theirs, why)
        else:
            self.pin((x,), why)
            self.pin((y,), why)

    def _borders(self, axis: int) -> list[int]:
        borders, place = list[int](), 0
        for segment in self.segments(axis):
            place += self.size(segment)
            borders.append(place)
        return borders[:-1]

    def _refine(self, axis: int, first: int) -> None:
        """Split an axis into a slower one of size ``first`` and the rest."""
        rest = self._size[axis] // first
        segments = self.segments(axis)
        pin = self._pins.get(axis, "")
        if segments and all(self.size(segment) % rest == 0 for segment in segments):
            inner = self.fresh(rest)
            outer = tuple(self.fresh(self.size(segment) // rest) for segment in segments)
            (row,) = self.fresh(first)
            self._segments[row] = outer
            for segment, slow in zip(segments, outer, strict=True):
                self.unify(segment, (*slow, *inner))
            self._parts[axis] = (row, *inner)
            self._segments.pop(axis)
            return
        if segments:
            pin = "its segments and its factors do not fit"
            self.pin((axis,), pin)
            self._segments.pop(axis)
        self._parts[axis] = self.fresh(first, pin) + self.fresh(rest, pin)

    def cut(self, axis: int, place: int) -> bool:
        """Make ``place`` a border of segments of an unrefined axis; whether that was possible."""
        if not 0 < place < self._size[axis]:
            return True
        segments = self.segments(axis)
        if not segments:
            pin = self._pins.pop(axis, "")
            sizes = (place, self._size[axis] - place)
            self._segments[axis] = tuple(self.fresh(size, pin) for size in sizes)
            return True
        start = 0
        for segment in segments:
            size = self.size(segment)
            if start < place < start + size:
                inner = self.size(segment[1:])
                return (place - start) % inner == 0 and len(segment) == 1 and self.cut(segment[0], place - start)
            start += size
        return True

    def row(self, dims: Iterable[Dim]) -> Dim:
        """The dimension that has these one after the other."""
        parts = [self.resolve(dim) for dim in dims]
        parts = [dim for dim in parts if self.size(dim) > 0]
        if len(parts) <= 1:
            return parts[0] if parts else self.fresh(0, "it is empty")
        (axis,) = self.fresh(sum(self.size(dim) for dim in parts))
        self._segments[axis] = tuple(parts)
        return (axis,)

    def part(self, dim: Iterable[int], start: int, stop: int, why: str) -> Dim:
        """Elements ``start`` to ``stop`` of a dimension."""
        dim = self.resolve(dim)
        total = self.size(dim)
        if (start, stop) == (0, total):
            return dim
        if start >= stop or not dim:
            return self.fresh(max(stop - start, 0), why)
        first, inner = dim[0], self.size(dim[1:])
        if start % inner or stop % inner:
            self.pin(dim, why)
            return self.fresh(stop - start, why)
        start, stop = start // inner, stop // inner
        if self._pins.get(first) and first not in self._segments:
            return self.fresh(stop - start, self._pins[first]) + dim[1:]
        if not (self.cut(first, start) and self.cut(first, stop)):
            self.pin((first,), why)
            return self.fresh(stop - start, why) + dim[1:]
        taken, place = list[Dim](), 0
        for segment in self.segments(first):
            if start <= place < stop:
                taken.append(segment)
            place += self.size(segment)
        return self.row(taken) + dim[1:]
