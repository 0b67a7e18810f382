"""Every way to run a step on so many devices that is worth an estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from merak_like.partitioner.batches import divisors
from merak_like.partitioner.coding import Coding
from merak_like.partitioner.executable import ANYTHING, Executable
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.one_rank import Sources

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Samples of a micro-batch that are tried."""
CHUNKS = (2, 3, 4, 6)
"""Stages per rank that are tried."""


@dataclass(frozen=True)
class Layout:
    """One way to run a step."""

    mesh: Mesh
    micro_batch: int
    micro_batches: int
    schedule: str
    chunks: int
    recompute: str
    zero: int
    sequence_parallel: bool


@dataclass(frozen=True)
class Wanted:
    """What is asked for; None leaves it to the search."""

    world: int
    batch: int
    dp: int | None = None
    pp: int | None = None
    tp: int | None = None
    micro_batch: int | None = None
    micro_batches: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    recompute: str | None = None
    zero: int | None = None
    sequence_parallel: bool | None = None
    memory_limit: int | None = None
    executable: Executable = ANYTHING
    coding: Coding | None = None


def layouts(sources: Sources, wanted: Wanted, hardware: Hardware) -> Iterator[Layout]:
    """Every layout worth an estimate. tp stays inside a node unless it is given."""
    can, world = wanted.executable, wanted.world
    most = min(hardware.devices_per_node, world, can.tp or world)
    least = 2 if wanted.sequence_parallel else 1
    tps = [wanted.tp] if wanted.tp else [t for t in divisors(world) if least <= t <= most and sources.divides(t)]
    for tp in tps:
        for pp in [wanted.pp] if wanted.pp else divisors(world // tp):
            if world % (tp * pp) or (wanted.dp and wanted.dp * pp * tp != world):
                continue
            mesh = Mesh(world // tp // pp, pp, tp)
            if wanted.batch % mesh.dp:
                continue
            each = wanted.batch // mesh.dp
            sizes = MICRO_BATCHES
            if wanted.micro_batch or wanted.micro_batches:
                sizes = (wanted.micro_batch or each // (wanted.micro_batches or 1),)
            for size in sizes:
                if size > 0 and each % size == 0 and wanted.micro_batches in (None, each // size):
                    yield from _ways(Layout(mesh, size, each // size, "1f1b", 1, "none", 0, False), wanted, hardware)


def _ways(layout: Layout, wanted: Wanted, hardware: Hardware) -> Iterator[Layout]:
    mesh, can = layout.mesh, wanted.executable
    if wanted.schedule is not None:
        schedules = [(wanted.schedule, wanted.chunks or (2 if wanted.schedule == "interleaved" else 1))]
    else:
        turns = mesh.pp > 1 and layout.micro_batches % mesh.pp == 0
        tried = ((wanted.chunks,) if wanted.chunks else CHUNKS) if turns else ()
        schedules = [("1f1b", 1), *(("interleaved", c) for c in tried)]
    fused = hardware.kernels == "fused"
    again = ["none", *["selective"] * (fused and hardware.attention == "math"), "blocks" if fused else "auto"]
    zeros = [wanted.zero] if wanted.zero is not None else [1 if mesh.dp > 1 and 1 in can.zero else 0]
    parted = wanted.sequence_parallel
    form = (can.sequence_parallel if parted is None else parted) and mesh.tp > 1
    for (schedule, chunks), recompute, zero in product(
        schedules, again if wanted.recompute is None else [wanted.recompute], zeros
    ):
        yield replace(
            layout, schedule=schedule, chunks=chunks, recompute=recompute, zero=zero, sequence_parallel=form
        )  # fmt: skip
