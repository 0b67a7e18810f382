"""Given the axes that are sharded: where partial sums are reduced, forward and backward.

States of a value: *sharded* (each rank has a part), *whole* (each has the same), *partial* (the ranks' values add up
to it). A step is *local* if a sharded axis touches it. The gradient of a whole value is whole too, or partial:

- A local step gives its whole operands partial gradients, and wants partial ones for its whole results (a rank's share
  of a fused projection's whole part would count once per rank otherwise).
- Any other step is linear backward, so it may work on whole gradients or on partial ones. It does the latter where
  that saves a reduction: all its operands want or may have partial gradients, down to a weight that is reduced once.

Where a value's producer and its uses differ, the value is *entered* (backward: sum over ranks) or *evened* (backward:
divide by the ranks).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from merak_like.partitioner.tensor_parallel.axes import Axes, Dim, Dims
from merak_like.partitioner.tensor_parallel.follow import Followed, Record, Use, Version
from merak_like.partitioner.tensor_parallel.layout import Where

REDUCED_INSIDE: Mapping[str, tuple[int, int]] = {"cross_entropy": (3, 0), "layer_norm": (2, 2), "rms_norm": (1, 1)}
"""Forms whose partial sums are reduced inside: how many numbers per row, forward and backward."""


@dataclass
class Flow:
    """The conversions that make a unit right when some axes are sharded over a group of ``degree`` ranks."""

    degree: int
    reduced: dict[str, int] = field(default_factory=dict)
    """Values summed over ranks where they are made: bytes."""
    entered: dict[str, tuple[Where, ...]] = field(default_factory=dict)
    """Whole values whose gradient from these uses is summed over ranks."""
    entered_bytes: dict[str, int] = field(default_factory=dict)
    evened: dict[str, tuple[Where, ...]] = field(default_factory=dict)
    """Whole values whose gradient from these uses is divided by the ranks."""
    slices: list[tuple[Where, Use]] = field(default_factory=list)
    """Whole operands of which a rank takes its part."""
    shared: list[Where] = field(default_factory=list)
    """Whole operands added to a partial sum: every rank adds its share."""
    partial: list[str] = field(default_factory=list)
    """Whole weights whose gradients add up over ranks."""
    forms: list[tuple[str, str]] = field(default_factory=list)
    """Steps to be rewritten, and how."""
    local: list[str] = field(default_factory=list)
    """Steps that a sharded axis touches."""
    adding: list[str] = field(default_factory=list)
    """These, and other steps whose gradients are partial too."""
    forward_bytes: int = 0
    backward_bytes: int = 0


class Flows:
    """Flows through one unit, for any choice of axes."""

    def __init__(self, followed: Followed) -> None:
        self.f = followed
        self.counts = Counter(use.version for record in followed.records for use in record.uses)
        f = followed
        ends = {(n, f.last.get(n, 0)) for n in f.unit.left | f.unit.kept}
        self.ends = {version for version in ends if version in f.values}
        self.axes_of: dict[Dim, frozenset[int]] = {}

    def leaves(self, dims: Dims) -> frozenset[int]:
        """Every axis of a tensor."""
        found = frozenset[int]()
        for dim in dims:
            if dim not in self.axes_of:
                self.axes_of[dim] = frozenset(self.f.axes.leaves(dim))
            found |= self.axes_of[dim]
        return found

    def run(self, chosen: frozenset[int], degree: int, degrees: Mapping[int, int] | None = None) -> Flow:
        """The conversions for these axes; ``degrees`` of all sharded axes, if there are others."""
        return _Run(self, chosen, degree, degrees or dict.fromkeys(chosen, degree)).run()


def local_size(axes: Axes, dim: Dim, degrees: Mapping[int, int]) -> int:
    """Elements along a dimension on one rank."""
    total = 1
    for axis in axes.resolve(dim):
        segments = axes.segments(axis)
        if segments:
            total *= sum(local_size(axes, segment, degrees) for segment in segments)
        else:
            total *= axes.size((axis,)) // degrees.get(axis, 1)
    return total


class _Run:
    def __init__(self, flows: Flows, chosen: frozenset[int], degree: int, degrees: Mapping[int, int]) -> None:
        self.flows, self.chosen, self.degrees = flows, chosen, degrees
        self.f = flows.f
        self.flow = Flow(degree)
        self.at: set[Version] = set()
        """Where partial sums are to be reduced."""
        self.partial: dict[Version, list[Version]] = {}
        """Partial sums with the way they came without a reduction."""
        self.once_partial: set[Version] = set()
        self.local: set[int] = set()
        self.zeros: set[Version] = set()
        self.sharded_cache: dict[Dims, bool] = {}

    def sharded(self, dims: Dims) -> bool:
        known = self.sharded_cache.get(dims)
        if known is None:
            known = self.sharded_cache[dims] = not self.chosen.isdisjoint(self.flows.leaves(dims))
        return known

    def run(self) -> Flow:
        while True:
            self.partial, self.once_partial, self.local, self.zeros = {}, set(), set(), set()
            before = len(self.at)
            self.forward()
            if len(self.at) == before:
                break
        self.backward()
        flow = self.flow
        flow.reduced = {name: self.size(name) for name, _ in sorted(self.at)}
        flow.forward_bytes += sum(flow.reduced.values())
        flow.entered_bytes = {name: self.size(name) for name in flow.entered}
        flow.backward_bytes += sum(flow.entered_bytes.values())
        flow.local = [self.f.records[i].step.name for i in sorted(self.local)]
        return flow

    def size(self, name: str) -> int:
        known = self.f.known[name]
        dims = self.f.values.get((name, 0)) or self.f.weights.get(name) or ()
        return prod(local_size(self.f.axes, dim, self.degrees) for dim in dims) * known.itemsize

    # ---------------------------------------------------------------------------------------------------- forward
    def forward(self) -> None:
        self.flow.slices, self.flow.shared, self.flow.forms = [], [], []
        self.flow.forward_bytes = self.flow.backward_bytes = 0
        for index, record in enumerate(self.f.records):
            self.one(index, record)
        for version in self.flows.ends:
            if version in self.partial:
                self.force(version)

    def one(self, index: int, record: Record) -> None:
        for use in record.uses:
            if self.sharded(use.dims) and not self.sharded(use.own):
                self.flow.slices.append(((record.step.name, use.path), use))
        touched = any(self.sharded(use.dims) for use in record.uses)
        touched = touched or any(self.sharded(dims) for _, dims in record.outs)
        contracts = any(self.sharded((dim,)) for dim in record.contracted)
        partial = [use for use in record.uses if use.version in self.partial]
        passes = bool(partial) and self.passes(record, partial, touched)
        if partial and not passes:
            for use in partial:
                self.force(use.version)
        if record.zero:
            self.zeros.update(version for version, _ in record.outs)
        if touched or passes:
            self.local.add(index)
        inside = record.form in REDUCED_INSIDE
        if contracts and record.form:
            self.flow.forms.append((record.step.name, record.form))
        if contracts and inside:
            known, summed = self.f.known[record.uses[0].name.name], map(self.f.axes.size, record.contracted)
            row = prod(known.shape) // prod(summed) * known.itemsize
            forward, backward = REDUCED_INSIDE[record.form]
            self.flow.forward_bytes += forward * row
            self.flow.backward_bytes += backward * row
        if (contracts and not inside) or passes:
            for use in record.uses:
                if use.path in record.addends and not self.sharded(use.dims):
                    self.flow.shared.append((record.step.name, use.path))
        if (contracts and not inside) or passes:
            for version, _ in record.outs:
                way = self.partial[partial[0].version] if passes and len(partial) == 1 else []
                self.once_partial.add(version)
                if version not in self.at:
                    self.partial[version] = [*way, version]

    def passes(self, record: Record, partial: list[Use], touched: bool) -> bool:
        """Whether the step may work on partial sums, so that a reduction can wait."""
        if touched or record.step.mutates or record.addends or (record.linear == "product" and record.contracted):
            return False
        if any(self.flows.counts[use.version] > 1 for use in partial):
            return False
        if any(use.version in self.flows.ends for use in partial):
            return False
        if any(self.narrows(use.version, version) for use in partial for version, _ in record.outs):
            return False  # parts rounded before they are added up are not the rounded sum
        if record.linear == "sum":
            return all(use.version in self.partial or use.version in self.zeros for use in record.uses)
        return record.linear == "product" and len(partial) == 1

    def narrows(self, before: Version, after: Version) -> bool:
        """Whether a step rounds its operand to a shorter type."""
        return self.f.known[after[0]].itemsize < self.f.known[before[0]].itemsize

    def force(self, version: Version) -> None:
        """Reduce a partial sum where it was smallest on its way."""
        way = self.partial.pop(version, None)
        if way is not None:
            self.at.add(min(way, key=lambda v: self.size(v[0])))

    # --------------------------------------------------------------------------------------------------- backward
    def backward(self) -> None:
        wants = self.wants()
        f = self.f
        uses: dict[Version, list[tuple[Where, bool]]] = {}
        """Of each whole value or weight: where it is used, and whether its gradient from there is partial."""
        ends = {version for version in self.flows.ends if version[0] in f.unit.left}
        shared = set(self.flow.shared)
        for index in range(len(f.records) - 1, -1, -1):
            record = f.records[index]
            partial = index in self.local
            if not partial:
                outs = [version for version, _ in record.outs]
                partial = any(wants.get(v) for v in outs) and any(p for v in outs for _, p in uses.get(v, ()))
            if partial:
                self.flow.adding.append(record.step.name)
            for version, dims in record.outs:
                if self.whole(version, dims):
                    full = index not in self.local or version in self.once_partial or record.form in REDUCED_INSIDE
                    expected = partial and not (full and index in self.local)
                    self.meet(version, uses.get(version, []), expected, version in ends)
            for use in record.uses:
                if use.grad and self.whole(use.version, use.own):
                    where = (record.step.name, use.path)
                    mine = partial and where not in shared and use.version not in self.partial_kept
                    uses.setdefault(use.version, []).append((where, mine))
        for version, found in uses.items():
            if version[0] in f.weights:
                if all(p for _, p in found):
                    self.flow.partial.append(version[0])
                else:
                    self.meet(version, found, False, False)
            elif version[0] in f.outer:
                self.meet(version, found, False, False)

    @property
    def partial_kept(self) -> set[Version]:
        return self.once_partial - self.at

    def whole(self, version: Version, dims: Dims) -> bool:
        return not self.sharded(dims) and version not in self.partial_kept

    def meet(self, version: Version, found: list[tuple[Where, bool]], expected: bool, end: bool) -> None:
        name = version[0]
        known = self.f.known.get(name)
        if known is None or not known.grad:
            return
        if expected:
            odd = tuple(where for where, partial in found if not partial)
            if odd or end:
                self.flow.evened[name] = self.flow.evened.get(name, ()) + odd
                if end:
                    self.flow.evened[name] += (("", ()),)
        else:
            odd = tuple(where for where, partial in found if partial)
            if odd:
                self.flow.entered[name] = self.flow.entered.get(name, ()) + odd

    def wants(self) -> dict[Version, bool]:
        """Whole values that may as well have partial gradients."""
        found: dict[Version, bool] = {}
        for index, record in enumerate(self.f.records):
            if index in self.local:
                for version, dims in record.outs:
                    inside = record.form in REDUCED_INSIDE or version in self.once_partial
                    found[version] = self.whole(version, dims) and not inside
                continue
            grads = [use for use in record.uses if use.grad]
            streams = [use for use in grads if not use.side]
            asked = streams or grads
            may = bool(grads) and all(
                use.version[0] in self.f.weights or found.get(use.version, False) for use in asked
            )
            found.update(dict.fromkeys((version for version, _ in record.outs), may))
        return found
