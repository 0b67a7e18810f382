"""From a proven derivation to what a plan says of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.sharding import GroupBytes, ShardedBlock
from merak_like.partitioner.tensor_parallel.derive import derive
from merak_like.partitioner.tensor_parallel.layout import Axis, Factors, Layout
from merak_like.partitioner.tensor_parallel.local import local_graph
from merak_like.partitioner.tensor_parallel.prove import Proven, prove
from merak_like.partitioner.tracer import LossFn
from merak_like.partitioner.tracer.fine import fine_trace, steps


def sharded(
    model: nn.Module, example: Any, loss_fn: LossFn | None, tp: int
) -> tuple[ProxyGraph, tuple[ShardedBlock, ...]]:
    """The graph of one of ``tp`` ranks, and how it was made: traced down to torch functions, derived and proven."""
    traced = fine_trace(model, example, loss_fn)
    code = steps(traced)
    proven = prove(model, traced, derive(traced.graph, code, tp, constants=traced.constants), example)
    return local_graph(traced.graph, code, proven.derived), described(proven, traced.graph)


def described(proven: Proven, graph: ProxyGraph) -> tuple[ShardedBlock, ...]:
    """Each distinct block of a derivation once, in order; ``graph`` is the whole model's."""
    derived, rows = proven.derived, list[ShardedBlock]()
    for index in dict.fromkeys(derived.kinds):
        block, found = derived.blocks[index], proven.blocks[index]
        like = [b.name for b, kind in zip(derived.blocks, derived.kinds, strict=True) if kind == index]
        rows.append(
            ShardedBlock(
                name=block.name,
                like=tuple(like[1:]),
                weights={name: layout_text(layout) for name, layout in block.weights.items()},
                whole=dict(block.whole),
                values=len(block.values),
                matrix_elements=block.matrix_elements,
                sharded_elements=block.sharded_elements,
                groups=tuple(
                    GroupBytes(
                        group.degree, group.repeat, group.forward_bytes, group.backward_bytes,
                        sum(graph.parameter(name).nbytes for name in group.partial_gradients),
                    )
                    for group in block.groups
                ),
                unknown=dict(block.unknown),
                error=found.worst,
                probe=found.way,
            )
        )  # fmt: skip
    return tuple(rows)


def layout_text(layout: Layout) -> str:
    """A layout in words; see ``ShardedBlock.weights``."""
    return ", ".join(map(_dimension, layout))


def _dimension(factors: Factors) -> str:
    return " x ".join(map(_factor, factors)) or "1"


def _factor(factor: Any) -> str:
    if not isinstance(factor, Axis):
        return f"({' | '.join(map(_dimension, factor.parts))})"
    apart = f"@{factor.repeat}" if factor.repeat > 1 else ""
    return f"{factor.size}/{factor.degree}{apart}" if factor.degree > 1 else str(factor.size)
