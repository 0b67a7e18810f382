"""Bytes of the ops of a stage: what they hold all the time, and what each live micro-batch adds. Estimated from shapes.

fixed, throughout a step
    weights       parameters and buffers that are read, each storage once; one that several stages read counts on each
    gradients     of the trainable ones                                                           (``StateBytes``)
    optimizer     of the trainable ones                                                           (``StateBytes``)
    workspace     the largest outputs of one op with their gradients, and with weights that are gathered for it;
                  the gradients of one micro-batch's boundary
for each live micro-batch
    saved         what the ops keep for the backward
    boundary      values received and sent
    bare          those of them that no op of the graph saves
    sent          those of them that leave
    received_saved, sent_saved   those of them that are in ``saved`` as well
    inputs        of the batch: to run the ops again, these are kept instead of ``saved``
    logits        of ``saved``, by and after the output layer
    put_off       inputs and output gradients of the ops whose weight gradients wait for a W
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, product
from math import ceil

import numpy as np

from merak_like.partitioner.balance import Ints, beyond, span
from merak_like.partitioner.cost import puts_off
from merak_like.partitioner.cuts import Bools
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import accesses, held_by, residents, unused
from merak_like.partitioner.states import ADAMW, StateBytes


@dataclass(frozen=True)
class Bands:
    """Bytes of every range of a band (see ``balance``)."""

    fixed: Ints
    saved: Ints
    boundary: Ints
    bare: Ints
    inputs: Ints
    put_off: Ints

    def narrow(self, width: int) -> Bands:
        """Of the ranges up to a smaller width."""
        return Bands(*(getattr(self, one.name)[:, :width] for one in fields(self)))


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of one range of ops."""

    weights: int
    gradients: int
    optimizer: int
    workspace: int
    saved: int
    boundary: int
    bare: int
    inputs: int
    put_off: int
    received_saved: int
    sent_saved: int
    logits: int = 0
    sent: int = 0

    @property
    def fixed(self) -> int:
        """Held throughout a step."""
        return self.weights + self.gradients + self.optimizer + self.workspace


class MemoryModel:
    """The bytes of any range of ops of one graph; ``scale`` is samples per micro-batch over samples traced.

    ``gathered`` are bytes of weights that are there whole while an op runs (``gathering.py``).
    """

    def __init__(
        self, graph: ProxyGraph, states: StateBytes = ADAMW, *, scale: float = 1.0, gathered: Sequence[int] = ()
    ) -> None:
        size = len(graph.ops)
        self._needs = residents(graph)
        idle = set(unused(graph))
        self._bytes: dict[str, tuple[int, int, int]] = {}
        for p in graph.parameters:
            trained = p.nbytes if p.trainable and not p.buffer and p.name not in idle else 0
            weights = ceil(trained * states.weights) if trained else p.nbytes
            self._bytes[p.name] = (weights, ceil(trained * states.gradients), ceil(trained * states.optimizer))
        self._saved = _running(ceil(op.saved_bytes * scale) for op in graph.ops)
        self._put_off = _running(_waiting(graph, scale))
        matrices = (i for i, op in enumerate(graph.ops) if any(len(graph.parameter(n).shape) > 1 for n in op.params))
        self._output = max(matrices, default=size) + 1
        largest = (sum(ceil(v.nbytes * scale) * (1 + v.requires_grad) for v in op.outputs) for op in graph.ops)
        self._largest = np.fromiter(largest, np.int64, size) + np.array(gathered or [0] * size, np.int64)
        values = graph.values
        saver = {name: index for index, op in enumerate(graph.ops) for name in op.keeps}
        self._values = [
            (uses, ceil(values[name].nbytes * scale), values[name].requires_grad, saver.get(name, -1))
            for name, uses in accesses(graph).items()
            if len(uses) > 1
        ]
        self._ends = np.array(
            [(uses[0], uses[-1], n, grad, saver) for uses, n, grad, saver in self._values], np.int64
        ).reshape(-1, 5).T  # fmt: skip
        hops = [(*ends, at) for at, value in enumerate(self._values) for ends in pairwise(value[0])]
        self._hops = np.array(hops, np.int64).reshape(-1, 3).T
        self._inputs: dict[str, tuple[int, list[int]]] = {
            v.name: (ceil(v.nbytes * scale), []) for op in graph.ops if op.kind == "input" for v in op.outputs
        }
        for index, op in enumerate(graph.ops):
            for name in op.inputs:
                if name in self._inputs:
                    self._inputs[name][1].append(index)
        self._reads: dict[str, list[int]] = {}
        for index, names in enumerate(self._needs):
            for name in names:
                self._reads.setdefault(name, []).append(index)

    def parts(self, start: int, stop: int) -> Parts:
        """Bytes of ops ``start <= i < stop`` as a stage."""
        held = [self._bytes[name] for name in held_by(self._needs, start, stop)]
        first, last, nbytes, grad, saver = self._ends
        received = np.zeros(len(first), np.bool_)
        before, after, of = self._hops
        received[of[(before < start) & (start <= after) & (after < stop)]] = True
        sent = (start <= first) & (first < stop) & (stop <= last)
        saved_here, crosses = (start <= saver) & (saver < stop), received | sent

        def total(which: Bools) -> int:
            return int(nbytes[which].sum())

        return Parts(
            weights=sum(b[0] for b in held),
            gradients=sum(b[1] for b in held),
            optimizer=sum(b[2] for b in held),
            workspace=int(self._largest[start:stop].max(initial=0)) + total(crosses & (grad > 0)),
            saved=int(self._saved[stop] - self._saved[start]),
            boundary=total(crosses),
            bare=total(crosses & (saver < 0)),
            inputs=sum(nbytes for nbytes, reads in self._inputs.values() if any(start <= i < stop for i in reads)),
            put_off=int(self._put_off[stop] - self._put_off[start]),
            received_saved=total(received & saved_here),
            sent_saved=total(sent & saved_here),
            sent=total(sent),
            logits=int(self._saved[stop] - self._saved[min(max(start, self._output), stop)]),
        )

    def kept_by(self, borders: Sequence[int]) -> tuple[list[int], list[int], int]:
        """What the units between these borders, which together are a stage, save and read.

        For each unit, what it saves, and what only it reads of what the unit before it made. Then what is read further
        on than that, or by several, or comes from the batch. What is sent is held as part of the boundary anyway.
        """
        saved = np.diff(self._saved[list(borders)]).tolist()
        near, far = [0] * len(saved), 0
        inside = np.flatnonzero((borders[0] <= self._ends[0]) & (self._ends[1] < borders[-1]))
        for uses, nbytes, _, _ in (self._values[at] for at in inside.tolist()):
            units = _distinct(bisect_right(borders, use) - 1 for use in uses)
            if len(units) == 2 and units[1] == units[0] + 1:
                near[units[1]] += nbytes
            elif len(units) > 1:
                far += nbytes
        for nbytes, reads in self._inputs.values():
            far += nbytes * any(borders[0] <= read < borders[-1] for read in reads)
        return saved, near, far

    def least(self, positions: Ints) -> Ints:
        """Bytes that each segment adds to its stage at least: what it is the first to read, and what it saves."""
        added = np.diff(self._saved)
        for name, reads in self._reads.items():
            added[reads[0]] += sum(self._bytes[name])
        return np.add.reduceat(added, positions[:-1])

    def bands(self, positions: Ints, width: int) -> Bands:
        """The same for all ranges of up to ``width`` segments between positions (which include both ends), at once."""
        size = len(positions) - 1
        first, stop = span(size, width)
        segment = np.searchsorted(positions, np.arange(len(self._needs)), side="right") - 1
        crossing = {key: np.zeros((size, width), np.int64) for key in product((False, True), repeat=2)}
        placed: dict[tuple[bool, bool], list[tuple[list[int], int]]] = {}
        for uses, nbytes, requires_grad, saver in self._values:
            placed.setdefault((requires_grad, saver >= 0), []).append((_distinct(segment[list(uses)].tolist()), nbytes))
        crossing.update((key, _crossing(values, size, width)) for key, values in placed.items())
        held = {name: (sum(self._bytes[name]), reads) for name, reads in self._reads.items()}
        fixed = _reading_bands(held.values(), segment, size, width) + crossing[True, False] + crossing[True, True]
        fixed += _largest_bands(np.maximum.reduceat(self._largest, positions[:-1]), width)
        bare = crossing[False, False] + crossing[True, False]
        boundary = bare + crossing[False, True] + crossing[True, True]
        inputs = _reading_bands(self._inputs.values(), segment, size, width)
        saved, put_off = (sums[positions][stop] - sums[positions][first] for sums in (self._saved, self._put_off))
        outside = beyond(size, width)
        for table in (fixed, saved, boundary, bare, inputs, put_off):
            table[outside] = 0
        return Bands(fixed, saved, boundary, bare, inputs, put_off)


def _crossing(values: Iterable[tuple[Sequence[int], int]], size: int, width: int) -> Ints:
    """Bytes received and sent by every range, of values given by the segments that make and read them."""
    first, stop = span(size, width)
    sent: Counter[tuple[int, int]] = Counter()
    received: Counter[tuple[int, int]] = Counter()
    for places, nbytes in values:
        if len(places) > 1:
            sent[places[0], places[-1]] += nbytes
            for before, after in pairwise(places):
                received[before, after] += nbytes
    live = _live(size, sent)
    return live[first] - _spanning(size, width, received) + live[stop] - _spanning(size, width, sent)


def _waiting(graph: ProxyGraph, scale: float) -> Iterator[int]:
    """For each op, the bytes that wait for its W and that no earlier op already keeps for that."""
    values, paid = graph.values, set[str]()
    for op in graph.ops:
        nbytes = 0
        if any(value.requires_grad for value in op.outputs) and puts_off(op, graph):
            read = [n for n in op.inputs if n not in paid and graph.ops[graph.producer[n]].kind != "attribute"]
            paid.update(read)
            nbytes = sum(ceil(values[name].nbytes * scale) for name in read)
            nbytes += sum(ceil(value.nbytes * scale) for value in op.outputs)
        yield nbytes


def _running(amounts: Iterable[int]) -> Ints:
    return np.cumsum(np.array([0, *amounts], np.int64))


def _reading_bands(held: Iterable[tuple[int, Sequence[int]]], segment: Ints, size: int, width: int) -> Ints:
    """Bytes of what is read, given with its readers, each once in a range: all reads less those that follow another."""
    own = np.zeros(size + 1, np.int64)
    repeats: Counter[tuple[int, int]] = Counter()
    for nbytes, reads in held:
        places = _distinct(segment[list(reads)].tolist())
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


def _live(size: int, pairs: Counter[tuple[int, int]]) -> Ints:
    """Bytes of the values made before each position and read at or after it."""
    change = np.zeros(size + 2, np.int64)
    for (first, last), nbytes in pairs.items():
        change[first + 1] += nbytes
        change[last + 1] -= nbytes
    return np.cumsum(change)[: size + 1]


def _spanning(size: int, width: int, pairs: Counter[tuple[int, int]]) -> Ints:
    """Bytes of the pairs that begin before a range and end after it, so pass it by."""
    table = np.zeros((size, width), np.int64)
    begin: dict[int, list[tuple[int, int]]] = {}
    for (first, last), nbytes in pairs.items():
        if last > first + 1:
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
