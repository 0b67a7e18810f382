"""What each op costs, estimated from its flops and bytes by the roofline model (Williams et al. 2009). Never measured.

======== ======================================================================== ====================================
forward  max(flops / reached peak, moved bytes / memory bandwidth)                 + launch seconds per torch function
backward matmul-like: max(gradients * flops / reached peak, twice the bytes / ..)  + the launches for each gradient
         others: the forward with twice the bytes                                  + the launches once
         all of it times the hardware's factor, measured by ``merak calibrate``
======== ======================================================================== ====================================

To both are added what the call's other kernels stream through memory (twice as much backward) and its sums over
tensor-parallel ranks, and what it takes to put what it keeps into few bits and back.

An op is matmul-like if it does more flops than it moves bytes. The gradients counted, at most 2, are those of the
inputs that need one and that of the weights: a linear layer's backward is twice its forward, but only once if it is the
first or is frozen. Where no output needs a gradient there is no backward. Of the backward of an op that can put off
the gradient of its weight (see ``puts_off``), that gradient's share is its weight half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

import numpy as np
from numpy.typing import NDArray

from merak_like.partitioner.graph import Op, ProxyGraph
from merak_like.partitioner.hardware import PRESETS, Hardware, Link, hardware_named

__all__ = ["PRESETS", "Cost", "CostTable", "Hardware", "Link", "hardware_named", "op_cost", "op_costs"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cost:
    """One op and one micro-batch."""

    forward_seconds: float
    backward_seconds: float
    """The whole backward."""
    weight_seconds: float
    """The part of the backward that can be put off: gradients of weights."""
    flops: int
    """Of the forward."""
    param_bytes: int
    """Of the distinct parameters read."""
    saved_bytes: int
    """Kept for the backward."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


def op_cost(op: Op, graph: ProxyGraph, hardware: Hardware, *, scale: float = 1.0) -> Cost:
    """Estimate one op; ``scale`` is samples per micro-batch over samples in the traced example.

    Everything but the parameters grows with the samples.
    """
    read = [graph.parameter(name) for name in dict.fromkeys(graph.canonical[name] for name in op.params)]
    param_bytes = sum(p.nbytes for p in read)
    flops = op.flops * scale
    moved = param_bytes + max(op.moved_bytes - param_bytes, 0) * scale
    launch = op.kernels * hardware.launch_seconds
    dtype = _dtype(op)
    memory_seconds = hardware.streaming_seconds(moved)
    streaming = hardware.streaming_seconds(op.streamed_bytes * scale)
    compute_seconds = hardware.matmul_seconds(flops, dtype) if flops > moved else 0.0
    started = max if hardware.queued else add
    alone = started(max(compute_seconds, memory_seconds) + streaming, launch)
    reduced = [0.0, 0.0]
    for sum_ in op.collectives:
        reduced[sum_.backward] += hardware.exposed_seconds(sum_, scale, dtype)
    forward = alone + reduced[False]
    backward = weight = 0.0
    if any(value.requires_grad for value in op.outputs):
        values = graph.values
        inputs = sum(values[name].requires_grad for name in op.inputs)
        most = min(2, inputs + any(p.trainable for p in read))
        gradients = most if compute_seconds else 1
        run = max(gradients * compute_seconds, 2 * memory_seconds) + 2 * streaming
        backward = started(run, gradients * launch) * hardware.backward_factor
        weight = backward / most if puts_off(op, graph) else 0.0
        backward += alone * op.replayed + reduced[True]
    if op.packing is not None:
        there, back, start = op.packing.forward_bytes, op.packing.backward_bytes, hardware.launch_seconds
        forward += hardware.streaming_seconds(there * scale) + op.packing.forward_kernels * start
        backward += hardware.streaming_seconds(back * scale) + op.packing.backward_kernels * start
    copied = op.copied_seconds * scale  # beside the op's own work, and no longer hidden than that lasts
    return Cost(
        max(forward, copied), max(backward, copied), weight, round(flops), param_bytes, round(op.saved_bytes * scale)
    )


WEIGHTED = frozenset({
    "linear", "matmul", "__matmul__", "addmm", "embedding", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
})  # fmt: skip
"""Functions whose gradient of a weight can be computed apart from that of the input."""


def puts_off(op: Op, graph: ProxyGraph) -> bool:
    """Whether the gradient of the op's weight can wait: one product, or look-up, with a trainable matrix or kernel.

    A vector (the scale of a norm, a bias) is not worth it. A leaf that runs several kernels does more than one product.
    """
    if op.kind == "module":
        held = op.params if op.kernels == 1 else ()
    elif op.target.rpartition(".")[2] in WEIGHTED:
        makers = (graph.ops[graph.producer[name]] for name in op.inputs)
        held = (*op.params, *(name for maker in makers if maker.kind == "attribute" for name in maker.params))
    else:
        held = ()
    return any(p.trainable and len(p.shape) > 1 for p in map(graph.parameter, held))


def _dtype(op: Op) -> str:
    """The dtype the op computes in: that of its first floating-point output."""
    kinds = [value.dtype for value in op.outputs]
    return next((kind for kind in kinds if "float" in kind), kinds[0] if kinds else "float32")


@dataclass(frozen=True)
class CostTable:
    """The costs of ops in a row; each array is a running sum, so a range costs one subtraction."""

    forward: Floats
    backward: Floats
    weight: Floats
    """The part of the backward that can be put off."""

    @classmethod
    def of(cls, costs: Sequence[Cost]) -> CostTable:
        """Sum up a row of costs: entry ``i`` is the sum of the first ``i``."""
        columns = np.array(
            [(c.forward_seconds, c.backward_seconds, c.weight_seconds) for c in costs], np.float64
        ).reshape(len(costs), 3)
        sums = np.vstack([np.zeros((1, 3)), np.cumsum(columns, axis=0)])
        return cls(*(np.ascontiguousarray(sums[:, column]) for column in range(3)))

    @property
    def seconds(self) -> Floats:
        """Forward and backward."""
        return self.forward + self.backward

    def at(self, positions: Sequence[int] | NDArray[np.int64]) -> CostTable:
        """The same sums at some positions only."""
        index = np.asarray(positions, np.int64)
        return CostTable(self.forward[index], self.backward[index], self.weight[index])


def op_costs(graph: ProxyGraph, hardware: Hardware, *, scale: float = 1.0) -> tuple[Cost, ...]:
    """The cost of every op; see ``op_cost``. Ops that are alike are looked at once."""
    kinds, alike = graph.alike
    known = [op_cost(graph.ops[index], graph, hardware, scale=scale) for index in kinds]
    return tuple(known[kind] for kind in alike)
