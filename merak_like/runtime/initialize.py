"""From torchrun's environment to a joined world: the only reader of ``os.environ``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.pulse import Pulse
from merak_like.runtime.rendezvous import agree_on_name, begin, begun_before


@dataclass(frozen=True)
class World:
    """This process among the processes of the job."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta
    """How long any wait may last before it is an error."""
    pulse: Pulse | None = None
    """None alone, and where the caller made the process group without torchrun's environment."""
    again: bool = False
    """Whether torchrun says that it started ranks before these; where its store is there, that knows more."""
    job: Any = field(default=None, repr=False, compare=False)
    """Torchrun's store, which lives as long as the job."""

    def restarted(self, work: str) -> bool:
        """Whether ranks that torchrun started before, on these nodes or others, had begun this work of the job."""
        return begun_before(self.job, work) if self.job is not None else self.again

    def begin(self, work: str) -> None:
        """Let a later start of this job know that this one has begun this work; every rank calls."""
        if self.job is not None:
            begin(self.job, work)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.size == 1


def world_size() -> int:
    """How many ranks torchrun (or the caller's own process group) started; 1 without either."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def devices() -> int:
    """The accelerators of this machine, or 1: the processes that make sense on it."""
    return max(torch.cuda.device_count(), 1)


def rank() -> int:
    """This process's number among them; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def variables(*starts: str) -> dict[str, str]:
    """The environment variables whose names start so, for a report."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(starts)}


def join(
    mesh: Mesh, *, timeout: float, device: torch.device | str | None = None, grouped: bool = False
) -> World:  # fmt: skip
    """Join the job that torchrun started, or use the process group that already exists.

    ``grouped``: a single process has one too, for those who do not work without.

    Raises ValueError unless the job has as many ranks as the mesh.
    """
    size = world_size()
    if mesh.size != size:
        raise ValueError(
            f"dp * pp * tp = {mesh.dp} * {mesh.pp} * {mesh.tp} = {mesh.size}, but "
            + (f"torchrun started {size} ranks" if size > 1 else "this is a single process")
            + f": use torchrun --nproc-per-node {mesh.size} (or nodes x processes = {mesh.size}), or change a degree"
        )
    limit = timedelta(seconds=timeout)
    where = torch.device(device) if device is not None else _device()
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = _store(limit) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    again = start != "0"
    if size == 1:
        if grouped and not dist.is_initialized():
            backend = "nccl" if where.type == "cuda" else "gloo"
            alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=limit)
        return World(0, 1, where, limit, again=again, job=store)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        if store is not None:
            rank = int(os.environ["RANK"])
            start = agree_on_name(store, rank, size, limit)
            own = dist.PrefixStore(f"merak/{start}", store)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
        else:
            dist.init_process_group(backend, timeout=limit)
    return World(dist.get_rank(), size, where, limit, _pulse(limit, start), again, store)


def _store(limit: timedelta) -> Any:
    """A connection of its own to the job's store; None if nothing says where that is."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return None
    return dist.TCPStore(host, int(port), is_master=False, timeout=limit)  # pyright: ignore[reportPrivateImportUsage]


def _pulse(limit: timedelta, start: str) -> Pulse | None:
    """The watch's thread uses a connection of its own while the rank waits elsewhere."""
    store = _store(limit)
    if store is None:
        return None
    own = dist.PrefixStore(f"merak/pulse/{start}", store)  # pyright: ignore[reportPrivateImportUsage]
    return Pulse(own, dist.get_rank(), dist.get_world_size())


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")
