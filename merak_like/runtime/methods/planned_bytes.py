"""What a planner shall count where layers keep their inputs in few bits: fewer bytes, more seconds.

The recorded ops say who keeps a value first and pays for it. A layer's input that the layer itself or a ReLU keeps is
packed; one that another op keeps as well, as a GELU keeps its own input, is not. Then each unit of a stage is either
kept so, or computed again: the planner's search over recompute weighs the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

from merak_like.partitioner.graph import Op, Packing, Plain, ProxyGraph, Value
from merak_like.runtime.methods.quantiser import SLICE


@dataclass(frozen=True)
class Coder:
    """What it takes to pack a tensor and to read it again, for each of its numbers. Measured: benchmarks/methods."""

    bits: float
    """That are kept."""
    pack: float
    """Bytes that could be read or written meanwhile."""
    unpack: float


PACK_KERNELS, UNPACK_KERNELS = 80, 45
"""Torch functions of a slice of a tensor: counted."""


def coder(bound: float, *, entropy: bool) -> Coder:
    """At this bound, relative to about the range. A bound half as large takes one bit more (``quantiser``)."""
    plain = log2(1 / bound) + 0.8
    return Coder(plain * 0.56, 750.0, 115.0) if entropy else Coder(plain, 550.0, 55.0)


FLOATING = frozenset(("float64", "float32", "float16", "bfloat16"))


def with_packed_inputs(
    graph: ProxyGraph, smallest: int, coder: Coder, inside: tuple[str, ...] | None = None
) -> ProxyGraph:  # fmt: skip
    """The graph with fewer bytes kept, and more work, where layers in these modules (None: all) keep their inputs;
    values of fewer than ``smallest`` numbers stay."""
    payer = {name: index for index, op in enumerate(graph.ops) for name in op.keeps}
    ops, packed = list(graph.ops), set[str]()
    relus = {call.first for call in graph.calls if call.type == "ReLU" and call.stop == call.first + 1}
    relus |= {i for i, op in enumerate(graph.ops) if op.kind != "module" and op.target.rpartition(".")[2] == "relu"}
    for index, op in enumerate(graph.ops):
        value = _input(op, graph)
        if value is None or value.name in packed or value.numel < smallest or value.dtype not in FLOATING:
            continue
        if not _within(op, inside):
            continue
        first = payer.get(value.name)
        if first is None or first not in relus | {index}:
            continue
        less = min(ops[first].saved_bytes, value.nbytes) - int(value.numel * coder.bits / 8)
        if less <= 0:
            continue
        packed.add(value.name)
        slices = -(-value.numel // SLICE)
        work = Packing(
            coder.pack * value.numel, coder.unpack * value.numel, PACK_KERNELS * slices, UNPACK_KERNELS * slices
        )
        ops[first] = replace(ops[first], saved_bytes=ops[first].saved_bytes - less, plain=_plain(ops[first]))
        ops[index] = replace(ops[index], packing=work)
    return replace(graph, ops=tuple(ops))


def with_kept_elsewhere(
    graph: ProxyGraph, inside: tuple[str, ...] | None, smallest: int, bandwidth: float
) -> ProxyGraph:  # fmt: skip
    """The graph where what ops of these modules (None: all) keep goes to another memory, over a link of so many bytes a
    second; ops that keep fewer than ``smallest`` bytes do not."""
    ops = tuple(
        replace(op, saved_bytes=0, keeps=(), copied_seconds=op.saved_bytes / bandwidth, plain=_plain(op))
        if op.saved_bytes >= smallest and _within(op, inside)
        else op
        for op in graph.ops
    )
    return replace(graph, ops=ops)


def _plain(op: Op) -> Plain:
    return op.plain or Plain(op.saved_bytes, op.keeps)


def _within(op: Op, inside: tuple[str, ...] | None) -> bool:
    path = op.target if op.kind == "module" else op.scope
    return inside is None or any(path == one or not one or path.startswith(f"{one}.") for one in inside)


def _input(op: Op, graph: ProxyGraph) -> Value | None:
    """Of an op that multiplies a weight with its first input."""
    weights = [name for name in op.params if len(graph.parameter(name).shape) > 1]
    if op.kind not in ("module", "function") or not weights or not op.flops or len(op.inputs) != 1:
        return None
    return graph.values[op.inputs[0]]
