"""What a planner shall count where layers keep their inputs in few bits: fewer bytes, more seconds.

The recorded ops say who keeps a value first and pays for it. A layer's input that the layer itself or a ReLU keeps is
packed; one that another op keeps as well, as a GELU keeps its own input, is not. Then each unit of a stage is either
kept so, or computed again: the planner's search over recompute weighs the two.
"""

from __future__ import annotations

from dataclasses import replace

from merak_like.partitioner.graph import Op, ProxyGraph, Value

RATIO = 4.5
"""Bytes of a tensor to those of its codes, without the entropy coder: benchmarks/methods, bound 0.01."""
PASSES = 40
"""So many times the tensor's bytes could be read or written while it is packed and read again: measured likewise."""
FLOATING = frozenset(("float64", "float32", "float16", "bfloat16"))


def with_packed_inputs(graph: ProxyGraph, smallest: int, ratio: float = RATIO, passes: float = PASSES) -> ProxyGraph:
    """The graph with fewer bytes kept and more bytes moved; values of fewer than ``smallest`` numbers stay."""
    payer = {name: index for index, op in enumerate(graph.ops) for name in op.keeps}
    ops, packed = list(graph.ops), set[str]()
    relus = {call.first for call in graph.calls if call.type == "ReLU" and call.stop == call.first + 1}
    relus |= {i for i, op in enumerate(graph.ops) if op.kind != "module" and op.target.rpartition(".")[2] == "relu"}
    for index, op in enumerate(graph.ops):
        value = _input(op, graph)
        if value is None or value.name in packed or value.numel < smallest or value.dtype not in FLOATING:
            continue
        first = payer.get(value.name)
        if first is None or first not in relus | {index}:
            continue
        packed.add(value.name)
        less = min(ops[first].saved_bytes, value.nbytes) * (1 - 1 / ratio)
        ops[first] = replace(ops[first], saved_bytes=ops[first].saved_bytes - int(less))
        ops[index] = replace(ops[index], streamed_bytes=ops[index].streamed_bytes + int(passes * value.nbytes))
    return replace(graph, ops=tuple(ops))


def with_kept_elsewhere(
    graph: ProxyGraph, inside: tuple[str, ...] | None, smallest: int, bandwidth: float
) -> ProxyGraph:  # fmt: skip
    """The graph where what ops of these modules (None: all) keep goes to another memory, over a link of so many bytes a
    second; ops that keep fewer than ``smallest`` bytes do not."""

    def away(op: Op) -> bool:
        path = op.target if op.kind == "module" else op.scope
        return inside is None or any(path == one or not one or path.startswith(f"{one}.") for one in inside)

    ops = tuple(
        replace(op, saved_bytes=0, keeps=(), copied_seconds=op.saved_bytes / bandwidth)
        if op.saved_bytes >= smallest and away(op)
        else op
        for op in graph.ops
    )
    return replace(graph, ops=ops)


def _input(op: Op, graph: ProxyGraph) -> Value | None:
    """Of an op that multiplies a weight with its first input."""
    weights = [name for name in op.params if len(graph.parameter(name).shape) > 1]
    if op.kind not in ("module", "function") or not weights or not op.flops or len(op.inputs) != 1:
        return None
    return graph.values[op.inputs[0]]
