"""What a host gives at most, asked before anything is allocated; and what a session will take, estimated."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from merak_like.split.connection import Waits
from merak_like.split.halves import Halves
from merak_like.split.layers import layers_of
from merak_like.split.messages import Task


@dataclass(frozen=True)
class Limits:
    """A host's limits; bytes, seconds and counts."""

    connections: int = 256
    connections_per_client: int = 8
    sessions: int = 64
    sessions_per_client: int = 4
    memory: int = 8 * 2**30
    """For all sessions together, reserved when each is opened."""
    message: int = 64 * 2**20
    together: int = 1
    """Most sessions with adapters whose micro-batches go through the frozen trunk in one pass; 1: each by itself."""
    rate: float = 0.0
    """Bytes a second taken from one connection; 0: any."""
    most: float = 1e6
    """Largest magnitude of a received number: beyond it a step is refused before weights are touched."""
    lease: float = 1800.0
    """After so long without a step a session is written to disk and its memory given back."""
    waits: Waits = field(default_factory=Waits)


class NoRoom(ValueError):
    """The host has no room for another session now."""


class Ledger:
    """Memory promised to sessions."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    def reserve(self, session: str, amount: int) -> None:
        """Promise memory. Raises NoRoom, with the numbers."""
        with self._lock:
            left = self.most - sum(self._held.values())
            if amount > left:
                raise NoRoom(f"this session needs about {amount / 1e6:.0f} MB, {left / 1e6:.0f} MB are left")
            self._held[session] = amount

    def release(self, session: str) -> None:
        """Take the promise back."""
        with self._lock:
            self._held.pop(session, None)

    @property
    def held(self) -> int:
        """Bytes promised."""
        return sum(self._held.values())


def weights_of(halves: Halves) -> int:
    """Bytes of the parameters and buffers of the cloud's half."""
    return sum(halves.trace.graph.parameter(name).nbytes for name in halves.params(1))


def memory_of(halves: Halves, task: Task, *, copies: int = 4) -> int:
    """Bytes of a session: ``copies`` of the weights, and the activations of the micro-batches under way.

    A half of one's own has weights, gradients and two moments; one that shares its weights has gradients alone.
    Activations are those the trace says the backward needs; the answers of the last step are kept as well.
    """
    graph = halves.trace.graph
    saved = sum(op.saved_bytes for op in graph.ops[halves.starts[1] : halves.starts[2]])
    values = graph.values
    across = sum(values[spec.name].nbytes for spec in (*halves.sent, *halves.returned))
    live = min(task.window + 1, task.micro_batches)
    layers = 2 * layers_of(halves).nbytes if task.average_edges else 0  # as they come, and until all are there
    return copies * weights_of(halves) + live * saved + 4 * task.micro_batches * across + layers
