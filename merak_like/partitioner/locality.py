"""What stays where it is used, and so never crosses a cut: the batch, parameters, buffers and constants.

A later stage loads the batch itself, and a parameter or constant is read again by each stage that uses it. Only what is
computed travels. Parameters are known here by their first name (``graph.canonical``), so tied names count as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from merak_like.partitioner.graph import Op, ProxyGraph

STAYS = frozenset({"input", "attribute"})
"""Kinds of ops whose values are made again in each stage that reads them."""


def travels(op: Op) -> bool:
    """Whether the values of this op are sent to the later stages that read them."""
    return op.kind not in STAYS


def accesses(graph: ProxyGraph) -> dict[str, tuple[int, ...]]:
    """For each value that may travel: its producer, then the ops that read it, in order and each once."""
    uses = graph.uses
    return {value.name: uses[value.name] for op in graph.ops if travels(op) for value in op.outputs}


def residents(graph: ProxyGraph) -> tuple[tuple[str, ...], ...]:
    """For each op: the parameters and buffers (first names) that its stage must hold because of it.

    An attribute read counts where its value is used. What no op uses stays with the parameter before it in the model,
    so that all stages together hold the whole model.
    """
    canonical = graph.canonical
    behind = _behind_attributes(graph)
    needs: list[tuple[str, ...]] = []
    for op in graph.ops:
        names = () if op.kind == "attribute" else (*op.params, *op.buffers)
        read = [held for value in op.inputs for held in behind.get(value, ())]
        needs.append(tuple(dict.fromkeys([*(canonical[name] for name in names), *read])) if names or read else ())
    return _with_unused(graph, needs)


def _behind_attributes(graph: ProxyGraph) -> dict[str, tuple[str, ...]]:
    """First names of the parameters and buffers behind each value that is an attribute read."""
    behind: dict[str, tuple[str, ...]] = {}
    for op in graph.ops:
        if op.kind == "attribute":
            own = [graph.canonical[name] for name in (*op.params, *op.buffers)]
            held = (*own, *(name for value in op.inputs for name in behind.get(value, ())))
            behind.update((value.name, tuple(dict.fromkeys(held))) for value in op.outputs)
    return behind


def _with_unused(graph: ProxyGraph, needs: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    last_reader = {name: index for index, names in enumerate(needs) for name in names}
    place = 0
    for parameter in graph.parameters:
        if parameter.name in last_reader:
            place = last_reader[parameter.name]
        elif needs:
            needs[place] = (*needs[place], parameter.name)
    return tuple(needs)


def unused(graph: ProxyGraph) -> tuple[str, ...]:
    """First names of the parameters and buffers that no op reads: they get no gradient and no optimizer state."""
    behind = _behind_attributes(graph)
    read = {graph.canonical[name] for op in graph.ops if op.kind != "attribute" for name in (*op.params, *op.buffers)}
    read.update(name for op in graph.ops for value in op.inputs for name in behind.get(value, ()))
    return tuple(p.name for p in graph.parameters if p.name not in read)


def held_by(needs: Sequence[tuple[str, ...]], start: int, stop: int) -> tuple[str, ...]:
    """Distinct first names that ops ``start <= i < stop`` need, in order of first use (see ``residents``)."""
    return tuple(dict.fromkeys(name for index in range(start, stop) for name in needs[index]))
