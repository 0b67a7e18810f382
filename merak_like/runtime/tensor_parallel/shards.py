"""Which part of each weight a rank has, and which it answers for where several ranks have the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.layout import Layout, is_sharded, local_size, pieces, whole_size
from merak_like.partitioner.tensor_parallel.ranks import take

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Shards:
    """The weights of one rank of a tensor-parallel group of ``count`` ranks. Without layouts all are whole."""

    layouts: Mapping[str, Layout] = field(default_factory=dict[str, Layout])
    rank: int = 0
    count: int = 1

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part, with memory of its own; the tensor itself if it is on every rank."""
        layout = self.layouts.get(name)
        return whole if layout is None else take(whole, layout, self.rank).clone(memory_format=torch.contiguous_format)

    def shape(self, name: str, whole: Sequence[int]) -> tuple[int, ...]:
        """Of this rank's part."""
        layout = self.layouts.get(name)
        return tuple(whole) if layout is None else tuple(local_size(factors) for factors in layout)

    def whole_shape(self, name: str, local: Sequence[int]) -> tuple[int, ...]:
        """Of the whole tensor."""
        layout = self.layouts.get(name)
        return tuple(local) if layout is None else tuple(whole_size(factors) for factors in layout)

    def ranges(self, name: str) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each dimension the ranges of the whole tensor that this rank has, in its order."""
        return tuple(pieces(factors, self.rank) for factors in self.layouts[name])

    def blocks(self, name: str) -> Iterator[tuple[Slices, Slices]]:
        """Each run of this rank's part that is a run of the whole too: where it is in the part, and in the whole."""
        return _blocks(self.ranges(name))

    def read(self, name: str, whole: Any, into: Tensor) -> None:
        """Fill this rank's part of a sharded tensor from ``whole``, which is asked for nothing but slices."""
        for mine, theirs in self.blocks(name):
            into[mine].copy_(whole[theirs])

    def label(self, name: str) -> str:
        """The same for all ranks that have the same part."""
        return f"{name} {self.ranges(name)}" if name in self.layouts else name

    def answers(self, name: str, tensor: Tensor) -> Iterator[Tensor]:
        """The parts of this rank's tensor (a weight, its gradient) that no rank before it has too."""
        layout = self.layouts.get(name)
        if layout is None:
            if self.rank == 0:
                yield tensor
            return
        divided = [dim for dim, factors in enumerate(layout) if is_sharded(factors)]
        mine = [pieces(layout[dim], self.rank) for dim in divided]
        # ranks that have the same along all but one dimension can have the same elements along that one
        for number, dim in enumerate(divided):
            others = [
                pieces(layout[dim], rank)
                for rank in range(self.rank)
                if all(pieces(layout[d], rank) == mine[i] for i, d in enumerate(divided) if i != number)
            ]
            taken = {span for other in others for span in other}
            if taken:
                yield from _not_in(tensor, dim, mine[number], sorted(taken))
                return
        yield tensor

    def assemble(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks."""
        layout = self.layouts.get(name)
        if layout is None:
            return parts[0]
        whole = parts[0].new_empty(tuple(whole_size(factors) for factors in layout))
        for rank, piece in enumerate(parts):
            for mine, theirs in _blocks([pieces(factors, rank) for factors in layout]):
                whole[theirs] = piece[mine]
        return whole


WHOLE = Shards()
"""Every weight on every rank."""


def _not_in(
    tensor: Tensor, dim: int, mine: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """What is left of a tensor whose dimension is these ranges of the whole, without the taken ranges."""
    local = 0
    for start, stop in mine:
        at = start
        for first, last in taken:
            first, last = max(first, at), min(last, stop)
            if first < last:
                if at < first:
                    yield tensor.narrow(dim, local + at - start, first - at)
                at = last
        if at < stop:
            yield tensor.narrow(dim, local + at - start, stop - at)
        local += stop - start


def _blocks(ranges: Sequence[Sequence[tuple[int, int]]]) -> Iterator[tuple[Slices, Slices]]:
    """Each run of a part that is a run of the whole too: where it is in the part, and where in the whole."""
    dims = list[list[tuple[slice, slice]]]()
    for spans in ranges:
        ends = list(accumulate((stop - start for start, stop in spans), initial=0))
        dims.append([(slice(ends[i], ends[i + 1]), slice(*span)) for i, span in enumerate(spans)])
    for each in product(*dims):
        yield tuple(mine for mine, _ in each), tuple(theirs for _, theirs in each)
