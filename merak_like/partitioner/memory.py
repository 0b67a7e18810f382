"""Bytes on one rank of a stage, at its fullest moment. Estimated from shapes; nothing is allocated.

=========== ===========================================================================================================
weights     parameters and buffers the stage reads, each storage once; one that several stages read counts on each
gradients   of the trainable ones                                                             (``StateBytes``)
optimizer   of the trainable ones                                                             (``StateBytes``)
activations what the ops keep for the backward, for each live micro-batch
boundary    values received and sent, for each live micro-batch, and the gradients of one micro-batch's
workspace   the largest outputs of one op with their gradients
=========== ===========================================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from merak_like.partitioner.balance import Ints, beyond, span
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import accesses, held_by, residents, unused
from merak_like.partitioner.plan import StageMemory


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What training keeps for each trainable parameter, in multiples of the parameter's own bytes."""

    name: str
    gradients: float
    optimizer: float


STATES: Mapping[str, StateBytes] = {
    s.name: s
    for s in (
        StateBytes("adamw", 1, 2),  # fp32: weights 4 + gradients 4 + two moments 8 bytes per element
        StateBytes("adamw-mixed", 1, 6),  # bf16: weights 2 + gradients 2 + fp32 master and moments 12 bytes per element
        StateBytes("momentum", 1, 1),
        StateBytes("sgd", 1, 0),
    )
}
"""By optimizer."""
ADAMW = STATES["adamw"]


@dataclass(frozen=True)
class Bands:
    """Bytes of every range of a band (see ``balance``): ``fixed + live micro-batches * per_micro_batch``."""

    fixed: Ints
    per_micro_batch: Ints

    def total(self, live: int) -> Ints:
        """Bytes with so many live micro-batches."""
        return self.fixed + live * self.per_micro_batch


class MemoryModel:
    """The bytes of any range of ops of one graph; ``scale`` is samples per micro-batch over samples traced."""

    def __init__(self, graph: ProxyGraph, states: StateBytes = ADAMW, *, scale: float = 1.0) -> None:
        size = len(graph.ops)
        self._needs = residents(graph)
        idle = set(unused(graph))
        self._bytes: dict[str, tuple[int, int, int]] = {}
        for p in graph.parameters:
            trained = p.nbytes if p.trainable and not p.buffer and p.name not in idle else 0
            self._bytes[p.name] = (p.nbytes, ceil(trained * states.gradients), ceil(trained * states.optimizer))
        saved = np.fromiter((ceil(op.saved_bytes * scale) for op in graph.ops), np.int64, size)
        self._saved = np.concatenate([[0], np.cumsum(saved)])
        largest = (sum(ceil(v.nbytes * scale) * (1 + v.requires_grad) for v in op.outputs) for op in graph.ops)
        self._largest = np.fromiter(largest, np.int64, size)
        values = graph.values
        self._values = [
            (uses, ceil(values[name].nbytes * scale), values[name].requires_grad)
            for name, uses in accesses(graph).items()
            if len(uses) > 1
        ]
        self._reads: dict[str, list[int]] = {}
        for index, names in enumerate(self._needs):
            for name in names:
                self._reads.setdefault(name, []).append(index)

    def stage(self, start: int, stop: int, live: int) -> StageMemory:
        """Bytes of a stage of ops ``start <= i < stop`` with so many live micro-batches."""
        held = [self._bytes[name] for name in held_by(self._needs, start, stop)]
        boundary = 0
        for uses, nbytes, requires_grad in self._values:
            if uses[0] >= stop or uses[-1] < start:
                continue
            received = uses[0] < start and any(start <= use < stop for use in uses)
            sent = start <= uses[0] < stop <= uses[-1]
            if received or sent:
                boundary += nbytes * (live + requires_grad)
        return StageMemory(
            weights=sum(b[0] for b in held),
            gradients=sum(b[1] for b in held),
            optimizer=sum(b[2] for b in held),
            activations=live * int(self._saved[stop] - self._saved[start]),
            boundary=boundary,
            workspace=int(self._largest[start:stop].max(initial=0)),
        )

    def least(self, positions: Ints) -> Ints:
        """Bytes that each segment adds to its stage at least: what it is the first to read, and what it keeps."""
        added = np.diff(self._saved)
        for name, reads in self._reads.items():
            added[reads[0]] += sum(self._bytes[name])
        return np.add.reduceat(added, positions[:-1])

    def bands(self, positions: Ints, width: int) -> Bands:
        """The same for all ranges of up to ``width`` segments between positions (which include both ends), at once."""
        size = len(positions) - 1
        first, stop = span(size, width)
        segment = np.searchsorted(positions, np.arange(len(self._needs)), side="right") - 1
        saved = self._saved[positions]
        sent: Counter[tuple[int, int, bool]] = Counter()
        received: Counter[tuple[int, int, bool]] = Counter()
        for uses, nbytes, requires_grad in self._values:
            places = _distinct(segment[uses].tolist())
            if len(places) > 1:
                sent[places[0], places[-1], requires_grad] += nbytes
                for before, after in pairwise(places):
                    received[before, after, requires_grad] += nbytes
        crossing = {
            grad: _live(size, sent, grad)[first] - _spanning(size, width, received, grad)
            + _live(size, sent, grad)[stop] - _spanning(size, width, sent, grad)
            for grad in (False, True)
        }  # fmt: skip
        fixed = self._resident_bands(segment, size, width) + crossing[True]
        fixed += _largest_bands(np.maximum.reduceat(self._largest, positions[:-1]), width)
        per_micro_batch = saved[stop] - saved[first] + crossing[False] + crossing[True]
        outside = beyond(size, width)
        fixed[outside] = per_micro_batch[outside] = 0
        return Bands(fixed, per_micro_batch)

    def _resident_bands(self, segment: Ints, size: int, width: int) -> Ints:
        """Weights, gradients and optimizer: each read counts, less those that follow a read inside the same range."""
        own = np.zeros(size + 1, np.int64)
        repeats: Counter[tuple[int, int]] = Counter()
        for name, reads in self._reads.items():
            nbytes = sum(self._bytes[name])
            places = _distinct(segment[reads].tolist())
            np.add.at(own, [place + 1 for place in places], nbytes)
            for before, after in pairwise(places):
                repeats[before, after] += nbytes
        sums = np.cumsum(own)
        first, stop = span(size, width)
        table = sums[stop] - sums[first]
        for (before, after), nbytes in repeats.items():
            # Ranges that begin at or before the first read and end after the second: rows of one skewed corner.
            for row in range(max(after - width + 1, 0), before + 1):
                table[row, after - row :] -= nbytes
        return table


def _distinct(ordered: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ordered))


def _live(size: int, pairs: Counter[tuple[int, int, bool]], grad: bool) -> Ints:
    """Bytes of the values made before each position and read at or after it."""
    change = np.zeros(size + 2, np.int64)
    for (first, last, requires_grad), nbytes in pairs.items():
        if requires_grad == grad:
            change[first + 1] += nbytes
            change[last + 1] -= nbytes
    return np.cumsum(change)[: size + 1]


def _spanning(size: int, width: int, pairs: Counter[tuple[int, int, bool]], grad: bool) -> Ints:
    """Bytes of the pairs that begin before a range and end after it, so pass it by."""
    table = np.zeros((size, width), np.int64)
    begin: dict[int, list[tuple[int, int]]] = {}
    for (first, last, requires_grad), nbytes in pairs.items():
        if requires_grad == grad and last > first + 1:
            begin.setdefault(first + 1, []).append((last, nbytes))
    passing = np.zeros(size + width + 1, np.int64)  # by the stop of the range
    for row in range(size):
        for last, nbytes in begin.get(row, ()):
            passing[: last + 1] += nbytes
        table[row] = passing[row + 1 : row + 1 + width]
    return table


def _largest_bands(largest: Ints, width: int) -> Ints:
    size = len(largest)
    padded = np.concatenate([largest, np.zeros(width, np.int64)])
    table = np.empty((size, width), np.int64)
    table[:, 0] = largest
    for column in range(1, width):
        np.maximum(table[:, column - 1], padded[column : column + size], out=table[:, column])
    return table
