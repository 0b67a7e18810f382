"""A tiny copy of a unit: every axis short, and the constants in the code that are sizes with it.

Every dimension is a product of axes, so the same code runs on other sizes, as long as it says its sizes through axes.
Whether it does is seen by running it on tensors without memory. Where a step gives another shape than its axes say,

- the odd dimension is an axis that nothing had before (what a padding or a convolution gives): it takes that size;
- or dimensions that were equal in reality are made equal again;
- or the fewest axes of the step that mend it get their real sizes back. Then all begins anew.

In the end every step fits, at worst with all axes as they were. A module that was kept whole, and what runs on no such
tensors, keeps the sizes it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.axes import Axes, Dims
from merak_like.partitioner.tensor_parallel.derived import DerivedBlock
from merak_like.partitioner.tensor_parallel.follow import Followed, Record
from merak_like.partitioner.tensor_parallel.perform import arguments, perform, wide
from merak_like.partitioner.tensor_parallel.placed import Place, resized
from merak_like.partitioner.tracer.fine import Name, Step

SHORT = (5, 6, 7, 8, 9)
"""What axes are cut to: different sizes to different ones, as long as there are any, so that none is taken for another.
"""
PART = 2
"""Elements of a sharded axis that a rank is left with."""
TRIES = 60
"""Repairs, after which the unit keeps its real sizes."""


def tiny(followed: Followed, block: DerivedBlock, place: Mapping[int, Place], tp: int, real: Mapping[str, int]) -> Axes:
    """The unit's axes in sizes that its code runs with.

    Steps in ``real`` fit the shapes but not the numbers: dimensions that were equal are made equal again (1), axes that
    go in and do not come out, which an index picks from, keep their sizes (2), or all do (3).
    """
    return _Shrinking(followed, block, place, tp, real).run()


def shape(axes: Axes, dims: Dims) -> tuple[int, ...]:
    """Of a tensor."""
    return tuple(axes.size(axes.resolve(dim)) for dim in dims)


class _Shrinking:
    def __init__(
        self, followed: Followed, block: DerivedBlock, place: Mapping[int, Place], tp: int, real: Mapping[str, int]
    ) -> None:
        self.f, self.block, self.place, self.tp = followed, block, place, tp
        self.records: dict[str, Record] = {record.step.name: record for record in followed.records}
        self.dims: dict[str, Dims] = {n: d for (n, version), d in followed.values.items() if not version}
        self.items: dict[str, list[tuple[Any, str]]] = {}
        """Of steps with several results: which is which."""
        for step in followed.unit.steps:
            if step.kind == "item":
                self.items.setdefault(step.args[0].name, []).append((step.args[1], step.name))
        self.equal = set[str]()
        """Steps of which dimensions that were equal must be."""
        self.opaque: set[str] = set()
        """Steps that are not run."""
        self.real = set[int]()
        """Axes that got their real sizes back."""
        self.once = set[int]()
        """Axes that were made equal to others, which happens once, so that it ends."""
        self.sizes = self.wanted()
        for record in followed.records:
            level = real.get(record.step.name, 0)
            if record.step.kind == "module" or level == 3:
                self.refuse(record)
            elif level == 1:
                self.equal.add(record.step.name)
            elif level == 2:
                given = {axis for use in record.uses for dim in use.own for axis in followed.axes.leaves(dim)}
                for axis in given - {a for _, dims in record.outs for dim in dims for a in followed.axes.leaves(dim)}:
                    self.restore(axis)

    def wanted(self) -> dict[int, int]:
        """The first try."""
        f, tensors = self.f, [*self.f.values.values(), *self.f.weights.values()]
        tensors += [use.dims for record in f.records for use in record.uses]
        tensors += [(dim,) for record in f.records for _, dim in record.sizes]
        leaves = sorted({axis for dims in tensors for dim in dims for axis in f.axes.leaves(dim)})
        real = {axis: f.axes.size((axis,)) for axis in leaves}
        order = sorted(set(real.values()), reverse=True)
        short = {size: min(size, SHORT[i % len(SHORT)]) for i, size in enumerate(order)}
        return {axis: min(size, PART * self.degree(axis)) if axis in self.place else short[size]
                for axis, size in real.items()}  # fmt: skip

    def degree(self, axis: int) -> int:
        return self.place[axis][0]

    def run(self) -> Axes:
        for _ in range(TRIES):
            axes = self.f.axes.resized(self.sizes)
            if (axes := self.through(axes)) is not None:
                return axes
        return self.f.axes

    # ----------------------------------------------------------------------------------------------- through the unit
    def through(self, axes: Axes) -> Axes | None:
        """Run all steps; the sizes they run with, or None after a repair."""
        env: dict[str, Any] = {}
        seen = set[int]()
        whole, _ = resized(self.block, self.f, axes, self.tp)
        for step in self.f.unit.steps:
            record = self.records.get(step.args[0].name if step.kind == "item" else step.name)
            expected = shape(axes, self.dims[step.name]) if step.name in self.dims else None
            parent = step.args[0].name if step.kind == "item" else ""
            if record is not None:
                seen.update(axis for use in record.uses for dim in use.own for axis in axes.leaves(dim))
            if step.kind == "guard":
                continue
            if step.kind in ("input", "module") or step.name in self.opaque or (parent and parent not in env):
                if expected is not None:
                    env[step.name] = self.empty(step.name, expected)
                continue
            if record is not None and step.name in self.equal and (evened := self.evened(record, again=True)):
                self.even(evened)
                return None
            out = self.call(step, axes, whole, env)
            found = tuple(out.shape) if isinstance(out, Tensor) else None
            if isinstance(out, Exception) or (expected is not None and found != expected):
                if found is None or expected is None or not self.adopt(step.name, found, expected, seen):
                    self.repair(record, step.name)
                    return None
                axes = self.f.axes.resized(self.sizes)
                whole, _ = resized(self.block, self.f, axes, self.tp)
            env[step.name] = out
            seen.update(axis for dim in self.dims.get(step.name, ()) for axis in axes.leaves(dim))
        return axes

    def empty(self, name: str, size: tuple[int, ...]) -> Tensor:
        known = self.f.known[name]
        return wide(torch.empty(size, dtype=getattr(torch, known.dtype), device="meta"))

    def call(self, step: Step, axes: Axes, whole: DerivedBlock, env: Mapping[str, Any]) -> Any:
        """What the step gives on empty tensors, or the exception it raises."""

        def tensor(name: Name) -> Any:
            if name.kind == "weight":
                return self.empty(name.name, shape(axes, self.f.weights[name.name]))
            if name.name in env or name.name not in self.dims:
                return env.get(name.name)
            return self.empty(name.name, shape(axes, self.dims[name.name]))

        try:
            args, kwargs = map(_on_meta, arguments(step, whole.sizes, tensor))
            with torch.device("meta"), torch.no_grad():
                return perform(step, args, kwargs)
        except Exception as error:  # whatever torch says about shapes that do not fit
            return error

    # ------------------------------------------------------------------------------------------------------- repairs
    def adopt(self, name: str, found: tuple[int, ...], expected: tuple[int, ...], seen: set[int]) -> bool:
        """Give new axes the sizes that the step gave them; whether all odd dimensions are new axes."""
        if len(found) != len(expected):
            return False
        new: dict[int, int] = {}
        for dim, mine, theirs in zip(self.dims[name], found, expected, strict=True):
            if mine == theirs:
                continue
            leaves = list(self.f.axes.resolve(dim))
            if len(leaves) != 1 or leaves[0] in seen | self.real | self.place.keys() or self.f.axes.segments(leaves[0]):
                return False
            if mine < 1 or new.setdefault(leaves[0], mine) != mine:
                return False
        self.sizes |= new
        return True

    def repair(self, record: Record | None, name: str) -> None:
        """Give the fewest axes of a step their real sizes back, so that it gives what its axes say."""
        if record is None:
            self.opaque.add(name)
            return
        short = [axis for axis in self.leaves(record) if self.sizes[axis] != self.f.axes.size((axis,))]
        evened = self.evened(record)
        if evened and self.works(record, set(), evened):
            self.even(evened)
            return
        if not short or not self.works(record, set(short)):
            self.refuse(record)
            return
        kept = set(short)
        real = {axis: self.f.axes.size((axis,)) for axis in short}
        alike = [{axis for axis in short if real[axis] == size} for size in sorted({*real.values()}, reverse=True)]
        for group in [*alike, *({axis} for axis in sorted(short, key=lambda axis: -real[axis]))]:
            if self.works(record, kept - group):
                kept -= group
        for axis in kept:
            self.restore(axis)

    def evened(self, record: Record, again: bool = False) -> dict[int, int]:
        """New sizes for axes that are a dimension of their own, where another of the same real size is a product."""
        axes, found = self.f.axes.resized(self.sizes), dict[int, int]()
        fixed = self.place.keys() | self.real | (set() if again else self.once)
        tensors = [use.own for use in record.uses] + [use.dims for use in record.uses]
        dims = {self.f.axes.resolve(dim) for each in [*tensors, *(dims for _, dims in record.outs)] for dim in each}
        for size in {self.f.axes.size(dim) for dim in dims}:
            alike = [dim for dim in dims if self.f.axes.size(dim) == size]
            alone = [dim for dim in alike if len(dim) == 1 and not self.f.axes.segments(dim[0])]
            sizes = {axes.size(dim) for dim in alike if dim not in alone}
            free = [dim[0] for dim in alone if dim[0] not in fixed]
            sizes = sizes or {axes.size(dim) for dim in alone if dim[0] not in free}
            if len(sizes) == 1:
                (new,) = sizes
                found |= {axis: new for axis in free if self.sizes[axis] != new and new > 1}
        return found

    def even(self, new: Mapping[int, int]) -> None:
        self.sizes |= new
        self.once |= new.keys()

    def restore(self, axis: int) -> None:
        self.real.add(axis)
        self.sizes[axis] = self.f.axes.size((axis,))

    def leaves(self, record: Record) -> set[int]:
        tensors = [use.dims for use in record.uses] + [use.own for use in record.uses]
        tensors += [dims for _, dims in record.outs] + [(dim,) for _, dim in record.sizes]
        return {axis for dims in tensors for dim in dims for axis in self.f.axes.leaves(dim)}

    def works(self, record: Record, real: set[int], new: Mapping[int, int] | None = None) -> bool:
        """Whether a step gives what its axes say if these are as long as in reality, and those of ``new`` sizes."""
        sizes = {**self.sizes, **(new or {})}
        axes = self.f.axes.resized({axis: size for axis, size in sizes.items() if axis not in real})
        step = record.step
        env = {u.name.name: self.empty(u.name.name, shape(axes, u.own)) for u in record.uses if u.name.kind != "weight"}
        whole, _ = resized(self.block, self.f, axes, self.tp)
        out = self.call(step, axes, whole, env)
        if isinstance(out, Exception):
            return False
        results = [(out, step.name)] if step.name in self.dims else []
        results += [(out[key], name) for key, name in self.items.get(step.name, ()) if name in self.dims]
        return all(tuple(result.shape) == shape(axes, self.dims[name]) for result, name in results)

    def refuse(self, record: Record) -> None:
        """A step that says nothing on empty tensors: its axes stay as they are."""
        self.opaque.add(record.step.name)
        for axis in self.leaves(record):
            self.restore(axis)
        for name in record.step.weights:
            for dim in self.f.weights[name]:
                for axis in self.f.axes.leaves(dim):
                    self.restore(axis)


def _on_meta(item: Any) -> Any:
    """Arguments with devices replaced."""
    if isinstance(item, torch.device):
        return torch.device("meta")
    if isinstance(item, (tuple, list)):
        return type(item)([_on_meta(x) for x in item])
    return {key: _on_meta(x) for key, x in item.items()} if isinstance(item, dict) else item


def elements(followed: Followed, axes: Axes) -> int:
    """Of all tensors of the unit."""
    tensors = [*followed.weights.values(), *(d for (_, version), d in followed.values.items() if not version)]
    return sum(prod(shape(axes, dims)) for dims in tensors)
