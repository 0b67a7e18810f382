"""What a step costs after its last backward: gradients over replicas and over tied stages, the optimizer, the host.

A ring all-reduce over d replicas moves ``2 (d-1)/d`` of the gradients, which travel as they are kept (Thakur et al.
2005); with ZeRO (Rajbhandari et al. 2020, sec. 7) it is a reduce-scatter of the gradients and an all-gather of the
weights. Level 3 gathers the weights for every forward and backward instead, and scatters every gradient. Unless the
software reduces behind the last backward (level 3: talks behind every pass), nothing is hidden. The optimizer streams
its state twice, the gradients and the weights once.

The engine sums gradients in flat memory. There each is cleared, and the first micro-batch's is added like the others',
where a rank with weights of its own keeps what autograd made: four times its bytes more. Fused kernels always do so.
"""

from __future__ import annotations

from collections.abc import Sequence

from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.placement import replica_stride
from merak_like.partitioner.plan import StageMemory


def after_seconds(
    mesh: Mesh,
    hardware: Hardware,
    ranks: Sequence[StageMemory],
    tied_bytes: int,
    *,
    zero: int,
    hidden: float,
    micro_batches: int = 1,
) -> dict[str, float]:
    """Seconds by kind, of the slowest pipeline rank; ``ranks`` is what each holds, ``tied_bytes`` gradients of ties.

    ``hidden`` are seconds of one backward (of level 3, with its forward), behind which the hardware's software talks.
    """
    times = micro_batches if zero >= 3 else 1
    dp, stride = mesh.dp, replica_stride(mesh, hardware)
    reduction = flat = optimizer = 0.0
    for held in ranks:
        weights = held.weights * (dp if zero >= 3 else 1) * bool(held.gradients)
        gradients = held.gradients * (dp if zero >= 2 else 1)
        moved = gradients if not zero else (gradients + weights) / 2 if zero < 3 else weights + gradients / 2
        reduction = max(reduction, times * hardware.all_reduce_seconds(moved, dp, stride))
        flat = max(flat, flat_seconds(hardware, gradients) if dp > 1 and zero < 3 else 0.0)
        optimizer = max(optimizer, hardware.stepping_seconds(stepped_bytes(mesh, held, zero)))
    return {
        "reduction": max(reduction - times * hidden * hardware.overlap, 0.0) + flat,
        "ties": hardware.all_reduce_seconds(tied_bytes, 2, mesh.tp) + flat_seconds(hardware, tied_bytes),
        "optimizer": optimizer,
        "host": hardware.step_seconds + micro_batches * hardware.micro_batch_seconds,
    }


def flat_seconds(hardware: Hardware, gradients: float) -> float:
    """What it costs more that so many bytes of gradients lie in flat memory: written, then read twice and written."""
    return hardware.streaming_seconds(4 * gradients) if hardware.kernels == "torch" else 0.0


def stepped_bytes(mesh: Mesh, held: StageMemory, zero: int) -> float:
    """What the optimizer of a rank streams in a step."""
    weights = held.weights * (mesh.dp if zero >= 3 else 1) * bool(held.gradients)
    gradients = held.gradients * (mesh.dp if zero >= 2 else 1)
    return 2 * held.optimizer + (gradients + weights) / (mesh.dp if zero else 1)
