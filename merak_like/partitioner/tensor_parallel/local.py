"""The proxy graph of one tensor-parallel rank: the same ops on the parts of values and weights that a rank has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from merak_like.partitioner.graph import Op, ProxyGraph
from merak_like.partitioner.one_rank import sums_of
from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tensor_parallel.derived import Derived
from merak_like.partitioner.tensor_parallel.layout import Layout, local_size
from merak_like.partitioner.tensor_parallel.rows import Rows
from merak_like.partitioner.tracer.fine import Step

Shapes = Mapping[str, tuple[int, ...]]


def local_graph(graph: ProxyGraph, steps: Iterable[Step], derived: Derived, rows: Rows | None = None) -> ProxyGraph:
    """Shapes, flops, bytes and sums over ranks of one rank; all ranks have equal parts, so it is the same for all.

    A step does the share of its flops that its most divided operand or result is of the whole (a contraction divides
    by the same degree all that it touches), and moves and keeps the share of bytes that its tensors are. A step that
    gathers what has ``rows`` moves the whole, and keeps the rows.
    """
    rows = rows or Rows()
    layouts: dict[str, Layout] = {}
    for block in derived.blocks:
        layouts |= block.values
    weights = derived.weights
    shapes = {name: _local(layout) for name, layout in {**layouts, **weights}.items()}
    whole = {name: value.shape for name, value in graph.values.items()} | {p.name: p.shape for p in graph.parameters}
    ops, sums = list(graph.ops), sums_of(graph, derived, parted=bool(rows.values))
    touching: dict[int, dict[str, tuple[int, ...]]] = {}
    for step in steps:
        read = [name.name for _, name in flatten((step.args, dict(step.kwargs)))]
        there = touching.setdefault(step.index, {})
        there.update((name, shapes[name]) for name in [*read, step.name, *step.weights] if name in shapes)
        on_rows = [step.name, *(read if step.name in rows.steps else ())]
        there.update((name, _local(rows.values[name])) for name in on_rows if name in rows.values)
    for index, there in touching.items():
        if there:
            kept = {name: _local(rows.values[name]) for name in ops[index].keeps if name in rows.values}
            ops[index] = _shrunk(ops[index], there, there | kept, whole)
    for index, op in enumerate(ops):
        if op.name in sums:
            ops[index] = replace(op, collectives=sums[op.name])
    parameters = tuple(replace(p, shape=shapes.get(p.name, p.shape)) for p in graph.parameters)
    return replace(graph, ops=tuple(ops), parameters=parameters)


def _local(layout: Layout) -> tuple[int, ...]:
    return tuple(local_size(factors) for factors in layout)


def _shrunk(op: Op, shapes: Shapes, kept: Shapes, whole: Shapes) -> Op:
    """``kept``: shapes of what is kept, where these are not those of what is touched."""

    def share(tensors: Iterable[str], shapes: Shapes) -> float:
        there = [name for name in tensors if name in whole]
        total = sum(prod(whole[name]) for name in there)
        return sum(prod(shapes.get(name, whole[name])) for name in there) / total if total else 1.0

    smallest = min(prod(shapes[name]) / max(1, prod(whole[name])) for name in shapes if name in whole)
    made = [value.name for value in op.outputs]
    touched = [*op.inputs, *op.params, *op.buffers, *made]
    return replace(
        op,
        outputs=tuple(replace(v, shape=shapes.get(v.name, v.shape)) for v in op.outputs),
        flops=round(op.flops * smallest),
        moved_bytes=round(op.moved_bytes * share(touched, shapes)),
        saved_bytes=round(op.saved_bytes * share(op.keeps or made, kept)),
    )
