"""What a step costs after its last backward: gradients over replicas and over tied stages, the optimizer, the host.

A ring all-reduce over d replicas moves ``2 (d-1)/d`` of the gradients, which travel in the dtype of the weights (Thakur
et al. 2005); with ZeRO (Rajbhandari et al. 2020, sec. 7) it is a reduce-scatter of the gradients and an all-gather of
the weights, from level 3 one more gather in the forward. Unless the software reduces behind the last backward, nothing
is hidden. The optimizer streams its state twice, the gradients and the weights once.
"""

from __future__ import annotations

from collections.abc import Sequence

from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import StageMemory


def after_seconds(
    mesh: Mesh, hardware: Hardware, ranks: Sequence[StageMemory], tied_bytes: int, *, zero: int, hidden: float
) -> dict[str, float]:
    """Seconds by kind, of the slowest pipeline rank; ``ranks`` is what each holds, ``tied_bytes`` gradients of ties.

    ``hidden`` are seconds of the last backward, behind which the reduction runs where the hardware's software does so.
    """
    dp, stride = mesh.dp, mesh.pp * mesh.tp
    reduction = optimizer = 0.0
    for held in ranks:
        weights = held.weights * (dp if zero >= 3 else 1) * bool(held.gradients)
        gradients = held.gradients * (dp if zero >= 2 else 1)
        moved = weights * (1.5 if zero >= 3 else 1.0)
        reduction = max(reduction, hardware.all_reduce_seconds(moved, dp, stride))
        share = dp if zero else 1
        streamed = 2 * held.optimizer + (gradients + weights) / share
        optimizer = max(optimizer, hardware.streaming_seconds(streamed))
    return {
        "reduction": max(reduction - hidden * hardware.overlap, 0.0),
        "ties": hardware.all_reduce_seconds(tied_bytes, 2, mesh.tp),
        "optimizer": optimizer,
        "host": hardware.step_seconds,
    }
