"""The sequence-parallel form of a rank's code (Korthikanti et al., arXiv 2205.05198): a pass over what ``shard`` made.

Sums over ranks become reduce-scatters, entries become gathers, and what lies between runs on a rank's rows. Every other
reader of rows is given the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tensor_parallel.layout import Layout
from merak_like.partitioner.tensor_parallel.rows import Rows
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.fine import Step
from merak_like.runtime.tensor_parallel.collectives import Enter, Reduce, Scale, Target, TensorGroup
from merak_like.runtime.tensor_parallel.draws import drawing
from merak_like.runtime.tensor_parallel.gathered import Gathered
from merak_like.runtime.tensor_parallel.rewrite import Slice, argument, inside, meta_of
from merak_like.runtime.tensor_parallel.scatter import Gather, GatherEnter, Scatter, Take


def on_rows(
    traced: Trace, walk: Sequence[Step], rows: Rows, group: TensorGroup, rank: int, place: Callable[[int], Any],
    summed: Collection[str], added: Collection[str], gathered: Gathered,
) -> Trace:  # fmt: skip
    """Change the code of a rank, in place, to work on rows only where that is enough.

    ``walk`` are the steps of the trace before it was sharded, ``group`` are all tensor-parallel ranks. ``place`` tells
    for an op who may share a conversion with it. Gradients of weights: those ``summed`` are summed over the ranks once
    a step because of rows, so what is whole in this trace counts for its share; those ``added`` are summed anyway; all
    others must be whole at once. ``gathered`` is told as the code runs what was gathered of rows that stay.
    """
    writer = _Writer(traced, rows, group, rank, place, gathered)
    for step in walk:
        writer.step(step)
    writer.gathers(walk)
    writer.weights(summed, added)
    touched = sorted(writer.touched)
    return replace(traced, calls=tuple(c for c in traced.calls if not any(c.first <= i < c.stop for i in touched)))


class _Writer:
    def __init__(
        self, traced: Trace, rows: Rows, group: TensorGroup, rank: int, place: Callable[[int], Any], gathered: Gathered
    ) -> None:  # fmt: skip
        self.gathered = gathered
        self.code, self.rows, self.group, self.rank, self.place = traced.code, rows, group, rank, place
        self.canonical = traced.graph.canonical
        self.nodes = {node.name: node for node in traced.code.nodes}
        self.ours: set[str] = set(rows.steps)
        """Nodes that run on rows, or that bring whole operands there."""
        self.touched: set[int] = set()

    def step(self, step: Step) -> None:
        rows, node = self.rows, self.nodes[step.name]
        if step.name in rows.scattered:
            assert isinstance(node.target, Reduce)
            self.aim(node, Scatter(self.group, rows.values[step.name], self.rank, node.target.what))
        if step.name not in rows.steps:
            return
        self.touched.add(step.index)
        if step.kind == "item":
            return
        if step.name in rows.random:
            function = node.target if callable(node.target) else getattr(torch, str(node.target).rstrip("_"), None)
            target = drawing(step.word, function, rows.values[step.name], self.rank)
            assert target is not None, "the analysis leaves out what cannot be drawn in parts"
            self.aim(node, target)
            node.op = "call_function"
        else:
            for (at, path), size in rows.sizes.items():
                if at == step.name:
                    self.put(node, path, size)
        for path, name in list(flatten((step.args, dict(step.kwargs)))):
            where = (step.name, path[1:])
            if where in rows.sliced:
                layout = rows.sliced[where]
                weight = name.kind == "weight"
                what = f"the gradient of {name.name}"
                cut = Slice(layout, self.rank) if weight else Take(self.group, layout, self.rank, what)
                self.put(node, path[1:], self.before(node, argument(node, path[1:]), cut))
            elif where in rows.entered:
                enter = Enter(self.group, f"the gradient of {name.name}")
                self.put(node, path[1:], self.before(node, argument(node, path[1:]), enter))

    def gathers(self, walk: Sequence[Step]) -> None:
        """Give the whole to all other readers of rows."""
        order = {node: index for index, node in enumerate(self.code.nodes)}
        dull = {step for step, _ in self.rows.unread}
        read = {(step.name, name.name) for step in walk if step.name in dull
                for path, name in flatten((step.args, dict(step.kwargs)))
                if (step.name, path[1:]) not in self.rows.unread}  # fmt: skip
        for name, layout in self.rows.values.items():
            shared: dict[Any, fx.Node] = {}
            for user in sorted(self.nodes[name].users, key=order.__getitem__):
                if user.name not in self.ours and (user.name not in dull or (user.name, name) in read):
                    self.gather(user, self.nodes[name], layout, shared)

    def gather(self, user: fx.Node, node: fx.Node, layout: Layout, shared: dict[Any, fx.Node]) -> None:
        entry, gathered = user.target, None if node.name in self.rows.changing else self.gathered
        if isinstance(entry, Enter) and entry.group.group is self.group.group:
            self.aim(user, GatherEnter(self.group, layout, self.rank, entry.what, gathered))
            return
        key = self.place(user.meta["index"])
        if key not in shared or node.name in self.rows.changing:
            whole = Gather(self.group, layout, self.rank, f"the rows of {node.name}", gathered)
            shared[key] = self.before(user, node, whole)
        user.replace_input_with(node, shared[key])
        self.touched.add(user.meta["index"])

    def weights(self, summed: Collection[str], added: Collection[str]) -> None:
        """Make every use of a weight give what is done with its gradient at the end: partial, or whole."""
        for node in list(self.code.nodes):
            name = self.canonical.get(str(node.target), "") if node.op == "get_attr" else ""
            for user in list(node.users) if name and name not in added else ():
                if name in summed and user.name not in self.ours:
                    user.replace_input_with(node, self.before(user, node, Scale(1, self.group.degree)))
                elif name in self.rows.weights and name not in summed and user.name in self.ours:
                    enter = Enter(self.group, f"the gradient of {name}")
                    user.replace_input_with(node, self.before(user, node, enter))

    def before(self, user: fx.Node, operand: fx.Node, target: Target) -> fx.Node:
        with self.code.inserting_before(user):
            made = self.code.call_function(target, (operand,))  # type: ignore[arg-type]
        made.meta.update(meta_of(user))
        self.touched.add(user.meta["index"])
        if user.name in self.ours:
            self.ours.add(made.name)
        return made

    def aim(self, node: fx.Node, target: Target) -> None:
        node.target = target  # type: ignore[assignment]
        self.touched.add(node.meta["index"])

    def put(self, node: fx.Node, path: tuple[Any, ...], value: Any) -> None:
        if isinstance(path[0], str):
            node.kwargs = {**node.kwargs, path[0]: inside(node.kwargs[path[0]], path[1:], value)}
        else:
            node.args = inside(node.args, path, value)
