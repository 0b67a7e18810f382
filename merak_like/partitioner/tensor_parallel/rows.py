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
from typing import Any

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tensor_parallel.axes import Axes, Dims
from merak_like.partitioner.tensor_parallel.call import Call, Operand, Path, flatten
from merak_like.partitioner.tensor_parallel.derived import Derived
from merak_like.partitioner.tensor_parallel.follow import Followed, follow, tried
from merak_like.partitioner.tensor_parallel.layout import Axis, Factors, Layout, Where, is_sharded
from merak_like.partitioner.tensor_parallel.rules import RULES, Rule
from merak_like.partitioner.tensor_parallel.rules.elementwise import CREATED, LIKE, ONLY_FIRST
from merak_like.partitioner.tensor_parallel.trying import commutes
from merak_like.partitioner.tensor_parallel.units import VIEWS, Tensor, tensors, units
from merak_like.partitioner.tracer.fine import Name, Step
from merak_like.partitioner.tracer.words import draws

REPEATABLE = frozenset("dropout dropout1d scaled_dot_product_attention rand_like randn_like randint_like".split())
"""Words of random steps that can be drawn for some rows as one process draws them for all."""
BLIND = ONLY_FIRST | frozenset(CREATED.split()) | frozenset(LIKE.split())
"""Words of steps that look at a tensor's dtype and device only, where their rule drops it."""


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


@dataclass(frozen=True)
class Local:
    """One step on rows."""

    outs: tuple[Layout, ...]
    """Empty if it only looked at the dtype of what has rows."""
    sliced: Mapping[Path, Layout]
    whole: tuple[Path, ...]
    """Operands without rows."""
    sizes: Mapping[Path, int]
    unread: tuple[Path, ...]


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
                good = [(i, j) for i, dim in enumerate(sizes[:-1]) for j, n in enumerate(dim) if n and n % self.tp == 0]
                if good:
                    layout = [[Axis(n) for n in dim] for dim in sizes]
                    i, j = good[-1]
                    layout[i][j] = Axis(sizes[i][j], self.tp)
                    found[step.name] = tuple(map(tuple, layout))
        return found

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
        local = self.local(step, named, rows.values)
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

    def allowed(self, step: Step, named: Sequence[tuple[Path, Name]], local: Local, rows: Rows) -> bool:
        """Whether nothing but the axes forbids it."""
        if any(name not in rows.values for name in step.mutates):
            return False
        if any(name.kind == "weight" and name.name in self.odd_weights for _, name in named):
            return False
        if step.value is None and any(item.args[1] >= len(local.outs) for item in self.items.get(step.name, ())):
            return False
        return not draws(step.word, step.args, step.kwargs) or step.word in REPEATABLE

    def local(self, step: Step, named: Sequence[tuple[Path, Name]], values: Mapping[str, Layout]) -> Local | None:
        """What the step is on rows; None if they do not stay apart."""
        axes, own, marks = Axes(), dict[Name, Dims](), set[int]()
        for name in dict.fromkeys(name for _, name in named):
            own[name] = _dims(axes, values.get(name.name), self.known[name.name], marks)
        infos = {name: self.known[name.name] for name in own}
        booleans = frozenset(name for name, info in infos.items() if info.dtype in ("bool", "uint8"))
        operands = {path: Operand(name, own[name], infos[name].grad, False) for path, name in named}
        call = Call(step, axes, dict(operands), step.value.shape if step.value else None, booleans)
        rule = self.rules.get(step.word.split(".")[0])
        if rule is None and commutes(step, {name: info.shape for name, info in infos.items()}):
            rule = tried
        if rule is None:
            return None
        rule(call)
        dropped = tuple(path for path in operands if path not in call.operands)
        if dropped and step.word not in BLIND:
            return None
        if not any(name.name in values for path, name in named if path not in dropped):
            return Local((), {}, (), {}, tuple(path for path in dropped if operands[path].name.name in values))
        roots = {axes.resolve((axis,)) for axis in marks}
        if len(roots) != 1 or len(mark := next(iter(roots))) != 1 or axes.segments(mark[0]) or axes.pinned(mark[0]):
            return None
        axis = mark[0]
        if any(axis in axes.leaves(dim) for dim in call.contracted):
            return None
        made = [_layout(axes, dims, axis, self.tp) for dims in call.outs]
        if step.value is None and len(self.items.get(step.name, ())) == 0:
            return None
        sliced, whole = dict[Path, Layout](), list[Path]()
        for path, name in named:
            if path in dropped or name.name in values:
                continue
            layout = _layout(axes, own[name], axis, self.tp)
            if layout is None:
                return None
            if any(map(is_sharded, layout)):
                sliced[path] = layout
            else:
                whole.append(path)
        outs = tuple(layout for layout in made if layout is not None and any(map(is_sharded, layout)))
        if not outs or len(outs) < len(made):
            return None
        sizes = {path: dim for path, dim in call.sizes if axis in axes.leaves(dim)}
        if not all(axis in axes.resolve(dim) for dim in sizes.values()):
            return None
        unread = tuple(path for path in dropped if operands[path].name.name in values)
        local = {path: axes.size(axes.resolve(dim)) // self.tp for path, dim in sizes.items()}
        return Local(outs, sliced, tuple(whole), local, unread)


def _dims(axes: Axes, layout: Layout | None, known: Tensor, marks: set[int]) -> Dims:
    """New axes for a tensor; that of its rows is marked."""
    if layout is None:
        return tuple(axes.fresh(size) for size in known.shape)
    dims: list[tuple[int, ...]] = []
    for factors in layout:
        dim: tuple[int, ...] = ()
        for factor in factors:
            assert isinstance(factor, Axis)
            new = axes.fresh(factor.size)
            if factor.degree > 1:
                marks.update(new)
            dim += new
        dims.append(dim)
    return tuple(dims)


def _layout(axes: Axes, dims: Dims, axis: int, tp: int) -> Layout | None:
    """How a tensor lies if one axis is sharded; None if that cannot be said."""
    found: list[Factors] = []
    for dim in dims:
        factors: list[Axis] = []
        for each in axes.resolve(dim):
            if each != axis and axis in axes.leaves((each,)):
                return None
            factors.append(Axis(axes.size((each,)), tp if each == axis else 1))
        found.append(tuple(factors))
    if sum(factor == Axis(axes.size((axis,)), tp) for factors in found for factor in factors) > 1:
        return None
    return tuple(found)
