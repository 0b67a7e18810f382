"""A trace in units that are derived one by one: each block, and what is outside of blocks. Equal blocks are one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merak_like.partitioner.blocks import _mark_blocks, _Node, _tree
from merak_like.partitioner.graph import ITEMSIZE, ProxyGraph, Value
from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tensor_parallel.derived import OUTSIDE
from merak_like.partitioner.tensor_parallel.rules.elementwise import BINARY_WORDS, UNARY_WORDS
from merak_like.partitioner.tracer.fine import Name, Step


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a value, parameter or constant."""

    shape: tuple[int, ...]
    dtype: str
    grad: bool
    """A gradient flows into it, perhaps after something was written into it."""
    side: bool
    """Does not depend on the batch, or has no gradient."""
    matrix: bool = False
    """A parameter of two dimensions or more."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Unit:
    """Steps derived together."""

    name: str
    steps: tuple[Step, ...]
    left: frozenset[str]
    """Values that other units read, and the loss."""
    kept: frozenset[str] = frozenset()
    """Values that are results of the model."""


def units(graph: ProxyGraph, steps: Sequence[Step]) -> tuple[Unit, ...]:
    """Every step in one unit, in order of first step; what is outside of blocks comes last."""
    owner = [OUTSIDE] * len(graph.ops)
    names: dict[str, int] = {}
    for path, first, stop in blocks(graph):
        count = names[path] = names.get(path, 0) + 1
        owner[first:stop] = [path if count == 1 else f"{path}#{count}"] * (stop - first)
    grouped: dict[str, list[Step]] = {}
    for step in steps:
        grouped.setdefault(owner[step.index], []).append(step)
    made = {step.name: owner[step.index] for step in steps}
    left: dict[str, set[str]] = {name: set() for name in grouped}
    for step in steps:
        for _, name in flatten((step.args, step.kwargs)):
            if name.kind == "value" and made[name.name] != owner[step.index]:
                left[made[name.name]].add(name.name)
    loss = graph.outputs.get("loss")
    if loss in made:
        left[made[loss]].add(loss)
    kept = frozenset(graph.outputs.values())
    ordered = sorted(grouped, key=lambda name: name == OUTSIDE)
    return tuple(Unit(name, tuple(grouped[name]), frozenset(left[name]), kept) for name in ordered)


def blocks(graph: ProxyGraph) -> Iterator[tuple[str, int, int]]:
    """Path, first op and end of the outermost repeated modules, and of what stands in one list with them."""
    root = _tree(graph)
    _mark_blocks(graph, root)

    def walk(node: _Node) -> Iterator[tuple[str, int, int]]:
        lists = {_list_of(child) for child in node.children if child.is_block}
        for child in node.children:
            if child.is_block or (_list_of(child) in lists and child.stop - child.first > 1):
                yield child.path, child.first, child.stop
            else:
                yield from walk(child)

    return walk(root)


def _list_of(node: _Node) -> str:
    """The path of the list (or dict) a module is in; its own path if it is an attribute of its own."""
    parent, _, name = node.path.rpartition(".")
    return parent if name.isdigit() else node.path


def tensors(graph: ProxyGraph, steps: Sequence[Step], constants: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor by the name steps use for it."""
    known = {
        p.name: Tensor(p.shape, p.dtype, p.trainable, True, len(p.shape) > 1 and not p.buffer) for p in graph.parameters
    }
    for name, value in constants.items():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            known[name] = Tensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), False, True)
    values: dict[str, Value] = {step.name: step.value for step in steps if step.value is not None}
    grad = {name: value.requires_grad for name, value in values.items()}
    batch = {step.name: step.kind == "input" for step in steps}
    base: dict[str, str] = {}
    changed = True
    while changed:
        changed = False
        for step in steps:
            sources = [name.name for _, name in flatten((step.args, step.kwargs)) if name.kind == "value"]
            # A table's rows plus a mask of the batch are still about the table: what has no gradient adds no stream.
            counted = [s for s in sources if grad.get(s)] if grad.get(step.name) and step.word in PLAIN else sources
            depends = any(batch.get(name) for name in counted)
            if depends and not batch[step.name]:
                batch[step.name] = changed = True
            if sources and step.word in VIEWS:
                base[step.name] = sources[0]
            for name in ancestors(base, step.mutates):
                wants = any(grad.get(s) for s in sources)
                if (depends, wants) != (depends and batch.get(name), wants and grad.get(name)):
                    batch[name], grad[name] = bool(batch.get(name) or depends), bool(grad.get(name) or wants)
                    changed = True
    for name, value in values.items():
        known[name] = Tensor(value.shape, value.dtype, grad[name], not (grad[name] and batch[name]))
    return known


PLAIN = UNARY_WORDS | BINARY_WORDS
VIEWS = frozenset(
    "view reshape transpose permute unsqueeze squeeze getitem select narrow t flatten unflatten expand chunk split "
    "unbind detach contiguous to view_as swapaxes moveaxis".split()
)
"""Words of operations that may give a view of their first operand."""


def ancestors(base: Mapping[str, str], names: Sequence[str]) -> Iterator[str]:
    """What is changed when these are: themselves and what they are views of."""
    for name in names:
        yield name
        while name in base:
            name = base[name]
            yield name


Signature = tuple[Any, ...]


def signature(unit: Unit, known: Mapping[str, Tensor]) -> tuple[Signature, tuple[str, ...]]:
    """What the derivation of a unit depends on, names left out, and the names in order of first appearance."""
    names: dict[str, int] = {}
    parts: list[Any] = []

    def word(item: Any) -> Any:
        if isinstance(item, Name):
            if item.name in names:
                return Name, names[item.name]
            names[item.name] = len(names)
            return Name, item.kind, known.get(item.name)
        if isinstance(item, (tuple, list)):
            return type(item), *map(word, item)
        if isinstance(item, Mapping):
            return tuple((key, word(inner)) for key, inner in item.items())
        if isinstance(item, slice):
            return slice, word(item.start), word(item.stop), word(item.step)
        return item if item.__hash__ is not None else repr(item)

    for step in unit.steps:
        held = [Name(weight, "weight") for weight in step.weights]
        parts.append((
            step.word, step.kind, word(step.args), word(step.kwargs), word(held), known.get(step.name),
            step.name in unit.left, step.name in unit.kept, tuple(names.get(name, name) for name in step.mutates),
        ))  # fmt: skip
        names.setdefault(step.name, len(names))
    return tuple(parts), tuple(names)
