"""Which steps may run on a rank's rows only (sequence parallelism: Korthikanti et al., arXiv 2205.05198, section 4.2).

::

    partial sums ──► reduce-scatter ──► add, norm, dropout, ... ──► all-gather ──► linear (columns)
                     each rank has some rows of the sequence, and works on these

Rows are sharded from a sum on, as long as every step keeps them apart: its rule, run on this step alone, neither pins
nor contracts the axis of rows. Before any other step the value is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tensor_parallel.call import Path, flatten
from merak_like.partitioner.tensor_parallel.derived import Derived
from merak_like.partitioner.tensor_parallel.follow import Followed, follow
from merak_like.partitioner.tensor_parallel.layout import Axis, Layout, Where
from merak_like.partitioner.tensor_parallel.row_step import RowStep, on_rows
from merak_like.partitioner.tensor_parallel.rules import RULES, Rule
from merak_like.partitioner.tensor_parallel.units import VIEWS, tensors, units
from merak_like.partitioner.tracer.fine import Name, Step
from merak_like.partitioner.tracer.words import draws

REPEATABLE = frozenset("dropout dropout1d scaled_dot_product_attention rand_like randn_like randint_like".split())
"""Words of random steps that can be drawn for some rows as one process draws them for all."""


@dataclass
class Rows:
    """What runs on a rank's rows, and what must be converted there. Empty: nothing does."""

    scattered: dict[str, Layout] = field(default_factory=dict)
    """Sums over all ranks of which each rank gets its rows."""
    values: dict[str, Layout] = field(default_factory=dict)
    """All values of which a rank has its rows: these sums and what follows from them."""
    steps: set[str] = field(default_factory=set)
    """Steps that run on rows, the sums not included."""
    sliced: dict[Where, Layout] = field(default_factory=dict)
    """Operands of these steps that are whole and have rows."""
    entered: set[Where] = field(default_factory=set)
    """Operands of these steps that are whole and have no rows, but a gradient: from each rank's rows, so partial."""
    weights: set[str] = field(default_factory=set)
    """Weights whose gradients from these steps are partial in this way."""
    sizes: dict[Where, int] = field(default_factory=dict)
    """Constants in the code that are smaller on a rank."""
    random: set[str] = field(default_factory=set)
    """Steps that draw random numbers for rows."""
    unread: set[Where] = field(default_factory=set)
    """Operands of other steps of which only the dtype is read: they need not be gathered."""
    changing: set[str] = field(default_factory=set)
    """Values that are written into after they were made."""


def rows_of(
    graph: ProxyGraph, steps: Sequence[Step], derived: Derived, constants: Mapping[str, Any],
    rules: Mapping[str, Rule] = RULES,
) -> Rows:  # fmt: skip
    """What of a fine trace can run on rows of the ``derived.tp`` ranks."""
    return _Search(graph, steps, derived, constants, rules).run()


class _Search:
    def __init__(
        self, graph: ProxyGraph, steps: Sequence[Step], derived: Derived, constants: Mapping[str, Any],
        rules: Mapping[str, Rule],
    ) -> None:  # fmt: skip
        self.steps, self.tp, self.rules = steps, derived.tp, rules
        self.known = tensors(graph, steps, constants)
        groups = [group for block in derived.blocks for group in block.groups]
        self.adding = {name for group in groups for name in group.adding}
        all_ranks = (derived.tp, 1)
        odd = [group for group in groups if (group.degree, group.repeat) != all_ranks]
        self.odd_weights = {name for group in odd for name in group.partial_gradients}
        reduced = {name for group in groups if group not in odd for name in group.reduced}
        reduced -= {name for group in odd for name in group.reduced}
        reduced -= {name for block in derived.blocks for name in block.values}
        self.sources = self.choose(graph, steps, derived, constants, reduced)
        self.items: dict[str, list[Step]] = {}
        self.base: dict[str, str] = {}
        self.banned: set[str] = set()
        """Values that are not to be sharded."""
        self.look_around()

    def choose(
        self, graph: ProxyGraph, steps: Sequence[Step], derived: Derived, constants: Mapping[str, Any],
        reduced: set[str],
    ) -> dict[str, Layout]:  # fmt: skip
        """For each sum the rows to shard: the last axis before the last dimension that the ranks divide.

        That is the sequence where it can be, else the samples. Not for what does not depend on the batch, as a bias of
        positions: all layers read it whole.
        """
        found: dict[str, Layout] = {}
        parts = units(graph, steps)
        followed: dict[int, Followed] = {}
        for unit, kind in zip(parts, derived.kinds, strict=True):
            for place, step in enumerate(unit.steps):
                if step.name not in reduced or step.mutates or self.known[step.name].side:
                    continue
                if kind not in followed:
                    followed[kind] = follow(parts[kind], self.known, rules=self.rules)
                axes = followed[kind].axes
                sizes = [
                    [axes.size((axis,)) for axis in axes.resolve(dim)]
                    for dim in followed[kind].values[parts[kind].steps[place].name, 0]
                ]
                good = [
                    (i, j) for i, dim in enumerate(sizes[:-1]) for j in range(len(dim)) if self.divides(sizes, i, j)
                ]
                if good:
                    layout = [[Axis(n) for n in dim] for dim in sizes]
                    i, j = good[-1]
                    layout[i][j] = Axis(sizes[i][j], self.tp)
                    found[step.name] = tuple(map(tuple, layout))
        return found

    def divides(self, sizes: Sequence[Sequence[int]], dim: int, factor: int) -> bool:
        """Whether the ranks divide this axis so that each has rows; a dropout must see how they lie in memory.

        It does not for a single row behind other axes: its stride says nothing.
        """
        rows, left = divmod(sizes[dim][factor], self.tp)
        leading = prod(chain(*sizes[:dim], sizes[dim][:factor])) == 1
        return not left and (rows > 1 or (rows == 1 and leading))

    def look_around(self) -> None:
        """Who shares memory with whom, and what cannot be sharded because of who reads it."""
        for step in self.steps:
            read = [name.name for _, name in flatten((step.args, step.kwargs)) if name.kind == "value"]
            if step.kind == "guard":
                self.banned.update(read)
            elif step.kind == "item":
                source = step.args[0].name
                self.items.setdefault(source, []).append(step)
                self.base[step.name] = source
                if source not in self.known and (step.value is None or type(step.args[1]) is not int):
                    self.banned.add(source)
            else:
                self.banned.update(name for name in read if name not in self.known)
                if step.mutates:
                    self.base[step.name] = step.mutates[0]
                elif step.word in VIEWS and read:
                    self.base[step.name] = read[0]

    def root(self, name: str) -> str:
        while name in self.base:
            name = self.base[name]
        return name

    def run(self) -> Rows:
        changing = {self.root(name) for step in self.steps for name in step.mutates}
        family = {name: self.root(name) for name in {*self.known, *self.items} if self.root(name) in changing}
        while True:
            rows = self.once()
            torn = self.torn(rows, family)
            if not torn:
                rows.changing = {name for name in rows.values if name in family}
                return rows
            self.banned.update(name for name, root in family.items() if root in torn)

    def torn(self, rows: Rows, family: Mapping[str, str]) -> set[str]:
        """Memory that is written into, and of which some would be a copy: the write would not be seen there."""
        found = set[str]()
        for step in self.steps:
            for near in (*step.mutates, *((self.base[step.name],) if step.name in self.base else ())):
                if near in family and (near in rows.values or near in rows.steps) != (step.name in rows.steps):
                    found.add(family[near])
        return found

    def once(self) -> Rows:
        rows = Rows()
        for step in self.steps:
            if step.name in self.sources and step.name not in self.banned:
                rows.scattered[step.name] = rows.values[step.name] = self.sources[step.name]
            elif step.kind not in ("input", "guard", "item", "module") and step.name not in self.adding:
                self.step(step, rows)
        return rows

    def step(self, step: Step, rows: Rows) -> None:
        named = [(path[1:], n) for path, n in flatten((step.args, step.kwargs)) if n.name in self.known]
        if not any(name.name in rows.values for _, name in named):
            return
        local = on_rows(step, named, self.known, rows.values, self.tp, self.rules)
        if local is None:
            return
        rows.unread.update((step.name, path) for path in local.unread)
        if not local.outs:
            return
        made = [item.name for item in self.items.get(step.name, ()) if step.value is None]
        if not self.allowed(step, named, local, rows) or not self.banned.isdisjoint((step.name, *made)):
            rows.unread.difference_update((step.name, path) for path in local.unread)
            return
        rows.steps.update((step.name, *made))
        if step.value is not None:
            rows.values[step.name] = local.outs[0]
        else:
            for item in self.items[step.name]:
                rows.values[item.name] = local.outs[item.args[1]]
        rows.sliced.update(((step.name, path), layout) for path, layout in local.sliced.items())
        rows.sizes.update(((step.name, path), size) for path, size in local.sizes.items())
        if draws(step.word, step.args, step.kwargs):
            rows.random.add(step.name)
        by_path = dict(named)
        for path in (*local.whole, *local.sliced):
            name = by_path[path]
            if self.known[name.name].grad and step.grad:
                if name.kind == "weight":
                    rows.weights.add(name.name)
                elif path in local.whole:
                    rows.entered.add((step.name, path))

    def allowed(self, step: Step, named: Sequence[tuple[Path, Name]], local: RowStep, rows: Rows) -> bool:
        """Whether nothing but the axes forbids it."""
        if any(name not in rows.values for name in step.mutates):
            return False
        if any(name.kind == "weight" and name.name in self.odd_weights for _, name in named):
            return False
        items = self.items.get(step.name, ())
        if step.value is None and (not items or any(item.args[1] >= len(local.outs) for item in items)):
            return False
        return not draws(step.word, step.args, step.kwargs) or step.word in REPEATABLE
