"""Follow the axes through a unit: run the rule of every step, then settle what side tensors do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from merak_like.partitioner.tensor_parallel.axes import Axes, Dim, Dims
from merak_like.partitioner.tensor_parallel.call import Call, Operand, Path, Said, flatten
from merak_like.partitioner.tensor_parallel.rules import RULES, Rule
from merak_like.partitioner.tensor_parallel.rules.elementwise import broadcast
from merak_like.partitioner.tensor_parallel.trying import commutes
from merak_like.partitioner.tensor_parallel.units import VIEWS, Tensor, Unit, ancestors
from merak_like.partitioner.tracer.fine import Name, Step

Version = tuple[str, int]
"""A value and how often it was written into before."""


@dataclass
class Use:
    """An operand of a step: which tensor, the dimensions it has and those it is to have here."""

    path: Path
    name: Name
    version: Version
    own: Dims
    dims: Dims
    grad: bool
    side: bool
    soft: bool


@dataclass
class Record(Said):
    """A step, what its rule said, and the axes of what goes in and comes out."""

    step: Step
    uses: list[Use]
    outs: list[tuple[Version, Dims]]


@dataclass
class Followed:
    """A unit with the axes of all its tensors."""

    unit: Unit
    known: Mapping[str, Tensor]
    axes: Axes
    records: list[Record]
    values: dict[Version, Dims]
    weights: dict[str, Dims]
    outer: frozenset[str]
    """Values made elsewhere."""
    last: dict[str, int]
    """How often each value is written into."""
    unknown: Counter[str]


def follow(
    unit: Unit, known: Mapping[str, Tensor], whole: Mapping[str, str] | None = None,
    rules: Mapping[str, Rule] = RULES, *, border: bool = True,
) -> Followed:  # fmt: skip
    """Give every dimension of every tensor its axes. ``whole`` names weights to pin, with the reasons.

    Without a ``border`` what enters and leaves the unit need not be whole.
    """
    return _Follower(unit, known, whole or {}, rules, border).run()


class _Follower:
    def __init__(
        self, unit: Unit, known: Mapping[str, Tensor], whole: Mapping[str, str], rules: Mapping[str, Rule], border: bool
    ) -> None:
        self.unit, self.known, self.whole, self.rules, self.border = unit, known, whole, rules, border
        self.axes = Axes()
        self.values: dict[Version, Dims] = {}
        self.weights: dict[str, Dims] = {}
        self.versions: dict[str, int] = {}
        self.base: dict[str, str] = {}
        self.records: list[Record] = []
        self.parents: dict[str, list[Dims]] = {}
        self.of_parent: dict[str, Record] = {}
        self.outer: set[str] = set()
        self.unknown: Counter[str] = Counter()

    def run(self) -> Followed:
        for step in self.unit.steps:
            self.step(step)
        for name in self.unit.left if self.border else ():
            version = self.version(name)
            if version in self.values:
                for dim in self.values[version]:
                    self.axes.pin(dim, "it leaves the block")
        self.settle()
        return Followed(
            self.unit, self.known, self.axes, self.records, self.values, self.weights, frozenset(self.outer),
            self.versions, self.unknown,
        )  # fmt: skip

    def version(self, name: str) -> Version:
        """A value as it is now."""
        return name, self.versions.get(name, 0)

    def dims(self, name: Name) -> Dims:
        if name.kind == "weight":
            if name.name not in self.weights:
                pin = self.whole.get(name.name, "")
                self.weights[name.name] = tuple(self.axes.fresh(size, pin) for size in self.known[name.name].shape)
            return self.weights[name.name]
        version = self.version(name.name)
        if version not in self.values:
            why = "a constant" if name.kind == "constant" else "it is made outside the block" * self.border
            self.outer.add(name.name)
            self.values[version] = tuple(self.axes.fresh(size, why) for size in self.known[name.name].shape)
        return self.values[version]

    def step(self, step: Step) -> None:
        if step.kind == "input":
            return self.give(Record(step, [], []), [self.fresh(step, "a batch is whole")])
        if step.kind == "item":
            return self.item(step)
        for name in step.weights:
            for dim in self.dims(Name(name, "weight")):
                self.axes.pin(dim, "its module looks at its data and is kept whole")
        named = [(path, name) for path, name in flatten((step.args, step.kwargs)) if name.name in self.known]
        named = [(path[1:], name) for path, name in named]
        own = {path: self.dims(name) for path, name in named}
        infos = {path: self.known[name.name] for path, name in named}
        booleans = frozenset(name for path, name in named if infos[path].dtype in ("bool", "uint8"))
        operands = {
            path: Operand(name, own[path], infos[path].grad, infos[path].side) for path, name in named
        }  # fmt: skip
        call = Call(step, self.axes, dict(operands), step.value.shape if step.value else None, booleans)
        rule = self.rules.get(step.word.split(".")[0])
        if rule is None:
            shapes = {name: self.known[name.name].shape for _, name in named}
            if not commutes(step, shapes):
                self.unknown[step.word] += 1
            rule = no_row if step.word in self.unknown else tried
        rule(call)
        if step.word in VIEWS and (0,) in operands and operands[0,].name.kind == "value":
            self.base[step.name] = operands[0,].name.name
        uses = [
            Use(path, o.name, self.version(o.name.name), own[path], o.dims, o.grad, o.side, o.soft)
            for path, o in call.operands.items()
        ]
        self.give(Record(step, uses, [], **call.said()), call.outs)

    def give(self, record: Record, outs: list[Dims]) -> None:
        step = record.step
        if step.value is not None:
            assert outs, f"the rule of {step.word} gave no result"
            assert len(outs[0]) == len(step.value.shape), f"{step.word} {step.name}: rank"
            for dim, size in zip(outs[0], step.value.shape, strict=True):
                assert self.axes.size(self.axes.resolve(dim)) == size, f"{step.word} {step.name}: {step.value.shape}"
            self.values[step.name, 0] = outs[0]
            record.outs.append(((step.name, 0), outs[0]))
        else:
            self.parents[step.name] = outs
            self.of_parent[step.name] = record
        for name in dict.fromkeys(ancestors(self.base, step.mutates)):
            if name in self.known and self.version(name) in self.values:
                old = self.values[self.version(name)]
                self.versions[name] = self.versions.get(name, 0) + 1
                new = self.version(name)
                self.values[new] = old
                record.outs.append((new, old))
        self.records.append(record)

    def item(self, step: Step) -> None:
        source, key = step.args[0], step.args[1]
        outs = self.parents.get(source.name)
        record = self.of_parent.get(source.name, Record(step, [], []))
        self.base[step.name] = self.base.get(source.name) or str(source.name)
        if step.value is None:
            self.parents[step.name] = []
            self.of_parent[step.name] = record
            return
        if outs and isinstance(key, int) and key < len(outs) and len(outs[key]) == len(step.value.shape):
            dims = outs[key]
        else:
            dims = self.fresh(step, "a result of several")
        self.values[step.name, 0] = dims
        record.outs.append(((step.name, 0), dims))
        if source.name not in self.of_parent:
            self.outer.add(source.name)
            self.records.append(record)

    def fresh(self, step: Step, pin: str) -> Dims:
        assert step.value is not None
        return tuple(self.axes.fresh(size, pin) for size in step.value.shape)

    def settle(self) -> None:
        """Side operands: first those that meet something pinned, until nothing changes; the others become one."""
        edges = [(m, t) for r in self.records for u in r.uses if u.soft for m, t in zip(u.own, u.dims, strict=True)]
        edges = [(mine, theirs) for mine, theirs in edges if mine or theirs]
        axes, moved = self.axes, True
        while edges:
            left = list[tuple[Dim, Dim]]()
            moved = False
            for mine, theirs in edges:
                if axes.resolve(mine) == axes.resolve(theirs):
                    continue
                if all(map(axes.pinned, axes.leaves(theirs))):
                    axes.pin(mine, "it meets something whole")
                elif not self.agree(mine, theirs):
                    axes.pin(mine, "it is sliced where it is used")
                else:
                    left.append((mine, theirs))
                    continue
                moved = True
            edges = left
            if edges and not moved:
                axes.unify(*edges.pop(0))

    def agree(self, one: Dim, other: Dim) -> bool:
        """Whether the first could be the second without pinning anything of the second."""
        axes = self.axes
        a, b = ([(axes.size((x,)), x) for x in axes.resolve(dim)][::-1] for dim in (one, other))
        while a and b:
            (p, x), (q, y) = a.pop(), b.pop()
            plain = not axes.segments(x) and not axes.pinned(x)
            if x != y and not plain and (axes.segments(x) or axes.segments(y) or not axes.pinned(y)):
                return False
            if p == q:
                continue
            if (p % q and q % p) or not min(p, q):
                return False
            (a if p > q else b).append((max(p, q) // min(p, q), x if p > q else y))
        return True


def tried(call: Call) -> None:
    """An operation that the table does not know, seen to work element by element."""
    assert call.shape is not None
    call.out(broadcast(call, list(call.operands.values()), call.shape))


def no_row(call: Call) -> None:
    """An operation that the table does not know."""
    call.keep_whole(f"{call.step.word} has no rule")
