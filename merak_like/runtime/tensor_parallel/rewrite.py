"""From a fine trace and what was derived for it to the code of one rank: local sizes, and collectives as nodes.

The nodes of the trace stay, so cuts, values that cross them and module calls keep their names. A step whose result is
summed becomes the sum, and a new node before it does what it did; conversions of operands stand before their step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tensor_parallel.derived import Derived, DerivedBlock, Group
from merak_like.partitioner.tensor_parallel.layout import Layout, pieces, whole_size
from merak_like.partitioner.tensor_parallel.local import local_graph
from merak_like.partitioner.tensor_parallel.ranks import take
from merak_like.partitioner.tensor_parallel.rows import Rows
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.fine import Step, steps
from merak_like.runtime.tensor_parallel.collectives import Enter, Reduce, Scale, Target, TensorGroup
from merak_like.runtime.tensor_parallel.draws import drawing
from merak_like.runtime.tensor_parallel.forms import CrossEntropy, Embedding, Mean, Norm

Groups = Mapping[tuple[int, int], TensorGroup]
"""By ``(degree, repeat)``: the process groups of this rank."""


class Slice(Target):
    """A rank's part of a whole operand; the gradient of the rest is zero."""

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__("part")
        self.layout, self.rank = layout, rank

    def __call__(self, whole: torch.Tensor) -> torch.Tensor:
        return take(whole, self.layout, self.rank)


def shard(
    traced: Trace, derived: Derived, groups: Groups, rank: int, stage_of: Callable[[int], int],
    rows: Rows | None = None,
) -> Trace:  # fmt: skip
    """The trace of tensor-parallel rank ``rank``. Its code is ``traced``'s own, changed: use ``traced`` no more.

    ``stage_of`` tells the stage of an op; no conversion is shared by two stages. The graph says what runs on ``rows``
    only, the code does not yet. Raises ValueError for a step that
    draws random numbers for a part in a way that cannot be repeated part by part.
    """
    writer = _Writer(traced, derived, groups, rank, stage_of)
    for block in derived.blocks:
        writer.block(block)
    touched = sorted(writer.touched)
    calls = tuple(c for c in traced.calls if not any(c.first <= index < c.stop for index in touched))
    return replace(traced, graph=local_graph(traced.graph, writer.steps.values(), derived, rows), calls=calls)


class _Writer:
    def __init__(
        self, traced: Trace, derived: Derived, groups: Groups, rank: int, stage_of: Callable[[int], int]
    ) -> None:
        self.code, self.groups, self.rank, self.stage_of = traced.code, groups, rank, stage_of
        self.layouts = derived.weights
        self.steps = {step.name: step for step in steps(traced)}
        self.nodes = {node.name: node for node in traced.code.nodes}
        self.touched: set[int] = set()
        """Ops whose code is not the whole model's."""
        self.entries: dict[tuple[str, int, int, int], fx.Node] = {}
        self.home = {name: block for block in derived.blocks for name in block.steps}
        self.outside: dict[str, list[Group]] = {}
        for block in derived.blocks:
            for group in block.groups:
                for name, uses in group.evened.items():
                    if ("", ()) in uses:
                        self.outside.setdefault(name, []).append(group)

    def block(self, block: DerivedBlock) -> None:
        self.entries.clear()
        drawn = set(block.random)
        for name in block.steps:
            step, node = self.steps[name], self.nodes[name]
            if step.kind in ("input", "guard"):
                continue
            if any(w in self.layouts for w in (n.name for _, n in flatten((step.args, dict(step.kwargs))))):
                self.touched.add(step.index)
            if name in drawn and name in block.values:
                self.draw(step, node, block.values[name])
            else:
                for (at, path), size in block.sizes.items():
                    if at == name:
                        self.put(step, node, path, size)
            self.form(step, node, block)
            self.operands(step, node, block)
            for group in block.groups:
                if name in group.reduced:
                    own = step.word in FRESH
                    self.after(step, node, Reduce(self.group(group), f"the sum of {name}", own))

    def group(self, group: Group) -> TensorGroup:
        return self.groups[group.degree, group.repeat]

    def put(self, step: Step, node: fx.Node, path: tuple[Any, ...], value: Any) -> None:
        """Replace one argument, which may lie inside lists and slices."""
        self.touched.add(step.index)
        if isinstance(path[0], str):
            node.kwargs = {**node.kwargs, path[0]: inside(node.kwargs[path[0]], path[1:], value)}
        else:
            node.args = inside(node.args, path, value)

    def draw(self, step: Step, node: fx.Node, layout: Layout) -> None:
        function = node.target if callable(node.target) else getattr(torch, str(node.target).rstrip("_"), None)
        target = drawing(step.word, function, layout, self.rank)
        if target is None:
            raise ValueError(
                f"{step.name} draws random numbers ({step.word}) for a part of what one process would draw for, in a "
                "way that cannot be repeated part by part: use tp=1, or a dropout of torch.nn.functional instead"
            )
        self.call(step, node, target)

    def call(self, step: Step, node: fx.Node, target: Any) -> None:
        self.touched.add(step.index)
        node.op, node.target = "call_function", target

    def form(self, step: Step, node: fx.Node, block: DerivedBlock) -> None:
        group = next((g for g in block.groups if step.name in g.forms), None)
        if group is None:
            return
        form, ranks = group.forms[step.name], self.group(group)
        if form == "mean":
            mean = node.target if callable(node.target) else getattr(torch.Tensor, str(node.target))
            self.call(step, node, Mean(mean, group.degree))
        elif form == "embedding":
            weight = step.kwargs.get("weight", step.args[1] if len(step.args) > 1 else None)
            rows = self.layouts[weight.name][0]  # type: ignore[union-attr]
            self.call(step, node, Embedding(*self.piece(rows), whole_size(rows)))
        elif form == "cross_entropy":
            classes = block.values[step.args[0].name][1]
            self.call(step, node, CrossEntropy(ranks, step.name, *self.piece(classes), whole_size(classes)))
        else:
            self.call(step, node, Norm(ranks, step.name, centred=form == "layer_norm"))

    def piece(self, factors: Any) -> tuple[int, int]:
        ((start, stop),) = pieces(factors, self.rank)
        return start, stop

    def operands(self, step: Step, node: fx.Node, block: DerivedBlock) -> None:
        for path, name in list(flatten((step.args, dict(step.kwargs)))):
            path = path[1:]
            where = (step.name, path)
            for group in self.outside.get(name.name, ()):
                if self.home.get(name.name) is not block:
                    self.before(step, node, path, Scale(1, group.degree))
            for group in block.groups:
                if where in group.entered.get(name.name, ()):
                    self.enter(step, node, path, name.name, group)
                if where in group.evened.get(name.name, ()):
                    self.before(step, node, path, Scale(1, group.degree))
                if where in group.shared:
                    self.before(step, node, path, Scale(group.degree, 1))
                if where in group.sliced:
                    self.before(step, node, path, Slice(group.sliced[where], self.rank))

    def enter(self, step: Step, node: fx.Node, path: tuple[Any, ...], name: str, group: Group) -> None:
        """All uses of a value in a stage have one entry: their gradients are added up before they are summed."""
        key = (name, group.degree, group.repeat, self.stage_of(step.index))
        operand = argument(node, path)
        known = self.entries.get(key)
        if known is not None and known.args[0] is operand:
            self.put(step, node, path, known)
            return
        own = step.word in FRESH and len(group.entered[name]) == 1
        self.entries[key] = self.before(step, node, path, Enter(self.group(group), f"the gradient of {name}", own))

    def before(self, step: Step, node: fx.Node, path: tuple[Any, ...], target: Target) -> fx.Node:
        """Convert one operand."""
        with self.code.inserting_before(node):
            made = self.code.call_function(target, (argument(node, path),))  # type: ignore[arg-type]
        made.meta.update(meta_of(node))
        self.put(step, node, path, made)
        return made

    def after(self, step: Step, node: fx.Node, target: Target) -> None:
        """Convert the result: the node becomes the conversion, so that its name and its readers stay."""
        with self.code.inserting_before(node):
            made = self.code.create_node(node.op, node.target, node.args, node.kwargs)
        made.meta.update(meta_of(node))
        self.call(step, node, target)
        node.args, node.kwargs = (made,), {}


FRESH = frozenset("linear matmul bmm addmm baddbmm embedding conv1d conv2d conv3d".split())
"""Words of steps whose result has memory of its own that their backward does not read, and that give their operand a
gradient of its own."""


def meta_of(node: fx.Node) -> dict[str, Any]:
    """What a conversion beside a node takes over from it: its op and the state it runs in."""
    return {key: node.meta[key] for key in ("index", "state") if key in node.meta}


def argument(node: fx.Node, path: tuple[Any, ...]) -> Any:
    """What stands at a place in a node's arguments."""
    item: Any = node.kwargs if isinstance(path[0], str) else node.args
    for key in path:
        item = getattr(item, key) if isinstance(item, slice) else item[key]
    return item


def inside(item: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested arguments with one of them replaced."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(item, Mapping):
        return {**item, key: inside(item[key], rest, value)}
    if isinstance(item, slice):
        ends = {k: getattr(item, k) for k in ("start", "stop", "step")}
        ends[key] = inside(ends[key], rest, value)
        return slice(*ends.values())
    if isinstance(key, str):  # an index of one element, [i], which the rules follow as the range i:i+1
        return [value] if key == "start" else item
    changed = list(item)
    changed[key] = inside(changed[key], rest, value)
    return tuple(changed) if isinstance(item, tuple) else changed
