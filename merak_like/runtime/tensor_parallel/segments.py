"""A stage as segments between collectives, and the order in which they run.

::

    segment    a ─Enter─ b ─Reduce─ c ─Enter─ d ─Reduce─ e        (a, c, e: norms, residuals; b, d: products)
    forward    b(0) b(1)  c(0)d(0) c(1)d(1)  e(0) e(1)            b(0)'s sum runs under b(1), b(1)'s under c(0)d(0)
    backward   d(1) d(0)  c(1)b(1) c(0)b(0)  a(1) a(0)            the same, the other way

On rows a gather stands for each ``Enter`` and is waited for in both directions, as its ``Scatter`` is:

    forward    b(0) b(1)  c(0) c(1)  d(0) d(1)  e(0) e(1)
    backward   d(1) d(0)  c(1) c(0)  b(1) b(0)  a(1) a(0)

This is the order of Merak's cross-layer sub-pipelining (Lai et al., arXiv 2206.04959): within a stage only the first
and the last sum are not hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merak_like.runtime.stage_code import Piece
from merak_like.runtime.tensor_parallel.collectives import Collective


@dataclass(frozen=True)
class Converted:
    """A value that a collective makes of another."""

    name: str
    source: str
    nodes: tuple[Collective, ...]
    """One for all samples, or one for each share of them."""

    def node(self, share: int | None) -> Collective:
        return self.nodes[share or 0]


@dataclass(frozen=True)
class Segment:
    """A run of nodes without a collective between them."""

    pieces: tuple[Piece, ...]
    """One for all samples, or one for each share of them."""
    entries: tuple[Converted, ...]
    """What it reads of values made before it: ``Enter``, ``GatherEnter``, ``Gather``, ``Take``."""
    sums: tuple[Converted, ...]
    """What becomes of its summands: ``Reduce``, ``Scatter``."""
    changed: frozenset[str]
    """What it is given and changes in place."""
    borders: frozenset[str]
    """For which of ``forward`` and ``backward`` it and the segment before wait for one another's values."""

    @property
    def shared(self) -> bool:
        """Whether it runs for all samples at once."""
        return len(self.pieces) == 1


@dataclass(frozen=True)
class PhasedCode:
    """One stage as segments."""

    index: int
    segments: tuple[Segment, ...]
    shares: tuple[tuple[int, int], ...]
    """The samples ``start <= i < stop`` of each share."""
    dims: Mapping[str, int | None]
    """The dimension of a value along which its samples lie, None if it is the same for all samples."""
    inputs: tuple[str, ...]
    received: tuple[str, ...]
    sent: tuple[str, ...]
    results: Mapping[str, str]
    """The model's outputs it makes, to the names of their values."""

    @property
    def samples(self) -> int:
        """In a micro-batch."""
        return self.shares[-1][1]

    def after(self, at: int) -> Segment | None:
        """The segment after this one, if it runs for the same samples at a time."""
        return self._alike(at, at + 1)

    def before(self, at: int) -> Segment | None:
        """The segment before this one, if it runs for the same samples at a time."""
        return self._alike(at, at - 1)

    def _alike(self, at: int, other: int) -> Segment | None:
        there = 0 <= other < len(self.segments) and self.segments[at].shared == self.segments[other].shared
        return self.segments[other] if there else None

    def forward(self) -> tuple[tuple[int, int | None], ...]:
        """(segment, share) in the order they run; a share is None where all samples run at once."""
        return tuple(turn for run in self._runs("forward") for turn in run)

    def backward(self) -> tuple[tuple[int, int | None], ...]:
        """In the order their backward runs: the last share first."""
        return tuple(turn for run in reversed(self._runs("backward")) for turn in reversed(run))

    def _runs(self, border: str) -> list[list[tuple[int, int | None]]]:
        """Segments that run one after the other for each share; a new run begins where a sum is waited for."""
        runs: list[list[int]] = []
        for at, segment in enumerate(self.segments):
            apart = not at or border in segment.borders or segment.shared or self.segments[at - 1].shared
            runs.append([at]) if apart else runs[-1].append(at)
        shares = range(len(self.shares))
        return [
            [(at, None) for at in run] if self.segments[run[0]].shared else [(at, j) for j in shares for at in run]
            for run in runs
        ]
