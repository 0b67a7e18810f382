"""Which ranks of a mesh are near each other. tp ranks are neighbours; what comes next is up to the software.

======== ============= ==============================================================================================
torch    tp, then pp   the engine's order (``Mesh``): replicas are furthest apart
fused    tp, then dp   large-scale trainers': stages are furthest apart, and the ranks of a node that hold the same
                       weights share its adapters when these are reduced (Narayanan et al. 2021, sec. 3; Megatron-LM)
======== ============= ==============================================================================================
"""

from __future__ import annotations

from dataclasses import replace

from merak_like.partitioner.hardware import Hardware, Link
from merak_like.partitioner.mesh import Mesh


def replica_stride(mesh: Mesh, hardware: Hardware) -> int:
    """How many ranks apart neighbours of a data-parallel group are."""
    return mesh.tp if hardware.kernels == "fused" else mesh.tp * mesh.pp


def hop(mesh: Mesh, hardware: Hardware, source: int, target: int) -> Link:
    """The slowest link between two pipeline ranks over all replicas.

    With fused kernels each tensor-parallel rank sends its part (Narayanan et al. 2021, sec. 4.1).
    """
    fused = hardware.kernels == "fused"
    replica, stage = (1, mesh.dp) if fused else (mesh.pp, 1)
    several = range(min(mesh.dp, hardware.devices_per_node))  # then their places in nodes come again
    ranks = ((dp * replica + source * stage, dp * replica + target * stage) for dp in several)
    links = {hardware.link(first * mesh.tp, second * mesh.tp) for first, second in ranks}
    slowest = min(links, key=lambda link: link.bandwidth)
    return replace(slowest, bandwidth=slowest.bandwidth * (mesh.tp if fused else 1))
