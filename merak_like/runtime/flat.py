"""Some parameters as flat tensors: their weights, their gradients, and the part of both that this rank updates.

    weights   | w0 w0 w0 | w1 w1 w1 w1 | w2 w2 .. |    in the dtype of the computation; the parameters are views
    sums      | g0 g0 g0 | g1 g1 g1 g1 | g2 g2 .. |    gradients, in the dtype of the sum
              |--- rank 0 ----|--- rank 1 --------|    each rank's own run (here two share a bucket)

A weight that lies across two runs is updated in two pieces: what the optimizer does must not depend on where a number
stands (``ELEMENTWISE``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like.runtime.data_parallel import BUCKET_BYTES
from merak_like.runtime.groups import Group
from merak_like.runtime.optimizer import Slot

Dtypes = Callable[[Tensor], tuple[torch.dtype, torch.dtype]]

SPREAD_BYTES = 4 * 2**20
"""Of a bucket: its reduce-scatter and all-gather shall hide behind work on others, so there must be several."""


@dataclass
class Kind:
    """What the parameters of one bucket have in common."""

    group: Any
    """Ranks that hold the same parameters; None for this rank alone."""
    stages: Set[int]
    """Stages of this rank that read them."""
    ways: int
    """Among how many ranks they are spread; 1 if every rank updates all of them."""
    mine: int
    """This rank's place among those."""
    compute: torch.dtype
    """Of the weights in the model."""
    full: torch.dtype
    """Of the sums of gradients and of the weights that the optimizer updates."""
    every: bool
    """Whether gradients are summed over the ranks after every backward, and only the own run is kept."""
    counted: bool
    """Whether this rank counts them in the norm where they are not spread."""


class FlatBucket:
    """Takes over the memory of some parameters."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], kind: Kind) -> None:
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.kind = kind
        *self._starts, used = accumulate((p.numel() for p in self.parameters), initial=0)
        self.length = -(-used // kind.ways)
        """Numbers in one rank's run."""
        self.size = self.length * kind.ways
        device = self.parameters[0].device
        self.hooked = kind.every or kind.compute != kind.full
        """Whether gradients are added by hand: they have another dtype than autograd's, or no place of their own."""
        self.touched: set[int] = set()
        """Parameters with a gradient in this step."""
        self.arrived: set[int] = set()
        """Parameters whose gradient is whole, but not summed over the ranks yet."""
        self.weights = torch.empty(0)
        self.master = torch.empty(0)
        with torch.no_grad():
            targets = self._spread(device) if kind.ways > 1 else self._together()
        self.slots = [
            Slot(self.names[i], target, tuple(self.parameters[i].shape), run, kind.ways > 1 or kind.counted)
            for i, target, run in targets
        ]
        self._indices = [i for i, _, _ in targets]
        self.own = torch.zeros(0, dtype=kind.full, device=device)
        """Gradients of this rank's run."""
        self.sums: Tensor | None = None
        if kind.every:
            self.own = torch.zeros(self.length, dtype=kind.full, device=device)
        else:
            self.sums = torch.zeros(self.size, dtype=kind.full, device=device)
            self.own = self._mine(self.sums)

    def _mine(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.kind.mine * self.length, self.length)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [flat.narrow(0, a, p.numel()).view(p.shape) for a, p in zip(self._starts, self.parameters, strict=True)]

    def _together(self) -> list[tuple[int, nn.Parameter, None]]:
        """Every rank updates all: the parameters themselves, or copies of them in full precision."""
        if self.kind.compute == self.kind.full:
            return [(i, p, None) for i, p in enumerate(self.parameters)]
        copies = [nn.Parameter(p.detach().to(self.kind.full, copy=True)) for p in self.parameters]
        for parameter in self.parameters:
            parameter.data = parameter.data.to(self.kind.compute)
        return [(i, copy, None) for i, copy in enumerate(copies)]

    def _spread(self, device: torch.device) -> list[tuple[int, nn.Parameter, tuple[int, int]]]:
        """Each rank updates its run; the weights lie in one piece, so that the runs can be gathered in place."""
        full = torch.zeros(self.size, dtype=self.kind.full, device=device)
        for view, parameter in zip(self._views(full), self.parameters, strict=True):
            view.copy_(parameter.detach())
        same = self.kind.compute == self.kind.full
        self.weights = full if same else full.to(self.kind.compute)
        self.master = self._mine(full) if same else self._mine(full).clone()
        for view, parameter in zip(self._views(self.weights), self.parameters, strict=True):
            parameter.data = view
        first = self.kind.mine * self.length
        found: list[tuple[int, nn.Parameter, tuple[int, int]]] = []
        for index, (start, parameter) in enumerate(zip(self._starts, self.parameters, strict=True)):
            a, b = max(start, first), min(start + parameter.numel(), first + self.length)
            if a < b:
                found.append((index, nn.Parameter(self.master.narrow(0, a - first, b - a)), (a - start, b - start)))
        return found

    def begin(self) -> None:
        """Forget the last step's gradients."""
        self.touched.clear()
        self.arrived.clear()
        self.own.zero_()
        if self.kind.every:
            self.sums = None
        elif self.sums is not None:
            self.sums.zero_()
            if not self.hooked:
                for parameter, view in zip(self.parameters, self._views(self.sums), strict=True):
                    parameter.grad = view
        for slot in self.slots:
            if self.hooked or self.kind.ways > 1:
                slot.target.grad = None

    def take(self, index: int) -> None:
        """A parameter has got a gradient."""
        self.touched.add(index)
        parameter = self.parameters[index]
        if self.hooked and parameter.grad is not None:
            flat = self.flat()
            flat.narrow(0, self._starts[index], parameter.numel()).view(parameter.shape).add_(parameter.grad)
            parameter.grad = None

    def flat(self) -> Tensor:
        """The sums of gradients of all ranks' runs; made where they are not kept."""
        if self.sums is None:
            self.sums = torch.zeros(self.size, dtype=self.kind.full, device=self.own.device)
        return self.sums

    def settle(self, counts: Sequence[float]) -> None:
        """Give every target its gradient, or None where no rank has one."""
        for parameter, count in zip(self.parameters, counts, strict=True):
            if self.kind.ways > 1 or self.hooked or not count:
                parameter.grad = None
        views = None if self.kind.ways > 1 or self.sums is None else self._views(self.sums)
        place = 0
        for index, slot in zip(self._indices, self.slots, strict=True):
            if views is not None:
                slot.target.grad = views[index] if counts[index] else None
            else:
                size = slot.target.numel()
                slot.target.grad = self.own.narrow(0, place, size) if counts[index] else None
                place += size

    def gradients(self, flat: Tensor, counts: Sequence[float]) -> dict[str, Tensor]:
        """Whole gradients by name, from all ranks' runs."""
        views = zip(self.names, self._views(flat), counts, strict=True)
        return {name: view for name, view, count in views if count}

    @torch.no_grad()
    def publish(self) -> None:
        """Round what the optimizer updated to the dtype of the computation."""
        if self.kind.ways > 1:
            if self.kind.compute != self.kind.full:
                self._mine(self.weights).copy_(self.master)
            return
        for parameter, slot in zip(self.parameters, self.slots, strict=True):
            if slot.target is not parameter:
                parameter.copy_(slot.target)


def buckets_of(
    parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Group], readers: Mapping[str, Set[int]], zero: int,
    dtypes: Dtypes, counted: Set[str], dp: Group, whole: Set[str] = frozenset(),
) -> list[FlatBucket]:  # fmt: skip
    """Last layers first, as the backward meets them; parameters of several stages in buckets of their own, last.

    Those in ``whole`` are not spread.
    """
    by_kind: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    kinds: dict[Any, Kind] = {}
    for name in reversed(list(parameters)):
        group, stages = groups.get(name), frozenset(readers[name])
        compute, full = dtypes(parameters[name])
        spread = zero > 0 and group is not None and name not in whole
        every = zero > 1 and spread and group is dp and len(stages) == 1
        key = (group is not dp, id(group), compute, full, stages if every else None, name in counted, spread)
        ways, mine = (dist.get_world_size(group), dist.get_rank(group)) if spread else (1, 0)
        kind = kinds.setdefault(key, Kind(group, stages, ways, mine, compute, full, every, name in counted))
        kind.stages = kind.stages | stages
        by_kind.setdefault(key, []).append((name, parameters[name]))
    found: list[FlatBucket] = []
    for key in sorted(by_kind, key=lambda key: key[0]):
        found.extend(
            FlatBucket(part, kinds[key]) for part in _parts(by_kind[key], SPREAD_BYTES if zero else BUCKET_BYTES)
        )
    return found


def _parts(named: Sequence[tuple[str, nn.Parameter]], limit: int) -> list[list[tuple[str, nn.Parameter]]]:
    parts: list[list[tuple[str, nn.Parameter]]] = [[]]
    size = 0
    for name, parameter in named:
        nbytes = parameter.numel() * parameter.element_size()
        if parts[-1] and size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append((name, parameter))
        size += nbytes
    return [part for part in parts if part]
