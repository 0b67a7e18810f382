"""A model over tensor-parallel ranks, or whole: how it is traced, which weights a rank has, what its code becomes."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.sharding import ShardedBlock
from merak_like.partitioner.tensor_parallel import Derived, derive
from merak_like.partitioner.tensor_parallel.describe import described
from merak_like.partitioner.tensor_parallel.layout import Layout, same_parts
from merak_like.partitioner.tensor_parallel.local import local_graph
from merak_like.partitioner.tensor_parallel.prove import prove
from merak_like.partitioner.tensor_parallel.rows import Rows, rows_of
from merak_like.partitioner.tracer import LossFn, Trace, trace
from merak_like.partitioner.tracer.fine import fine_trace, steps
from merak_like.runtime.batches import rows, samples
from merak_like.runtime.groups import Groups, Span
from merak_like.runtime.optimizer import Slot
from merak_like.runtime.prepared import Prepared
from merak_like.runtime.tensor_parallel.blueprint import on_meta
from merak_like.runtime.tensor_parallel.collectives import TensorGroup
from merak_like.runtime.tensor_parallel.copies import Copies, Copy
from merak_like.runtime.tensor_parallel.gathered import Gathered
from merak_like.runtime.tensor_parallel.overlap import alone, of_samples, overlapped, same_steps
from merak_like.runtime.tensor_parallel.rewrite import shard
from merak_like.runtime.tensor_parallel.sequence import on_rows
from merak_like.runtime.tensor_parallel.shards import WHOLE, Shards
from merak_like.runtime.watch import Watch

Prepare = Callable[[Trace, Sequence[int], Any], Prepared]
"""From a trace, its stage starts and a micro-batch like it to what this rank runs."""


@dataclass(frozen=True)
class Proof:
    """What the plan says of tensor parallelism, and the weights that stay whole because a probe failed."""

    sharding: tuple[ShardedBlock, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict[str, str])


class Sharding(Protocol):
    """What the engine asks of a model before and while it runs."""

    def trace(self, batch: Any, device: torch.device | str) -> Trace:
        """Record a micro-batch, with the whole model's shapes, in the model's present mode."""
        ...

    def prove(self, traced: Trace, batch: Any) -> Proof:
        """Run each distinct block of the model whole and in parts, and compare."""
        ...

    def believe(self, proof: Proof) -> None:
        """From now on shard what this proof, the same on every rank, has found right."""
        ...

    def graph(self, traced: Trace) -> ProxyGraph:
        """What one rank computes, for the planner; the first one decides how weights lie."""
        ...

    def shards(self, rank: int) -> Shards:
        """The weights of a tensor-parallel rank."""
        ...

    def spans(self) -> tuple[Span, ...]:
        """The spans of tensor-parallel ranks that talk."""
        ...

    def partial(self, name: str) -> tuple[Span, ...]:
        """Over which spans the gradients of a weight add up though all ranks have the weight."""
        ...

    def prepare(self, groups: Groups, watch: Watch) -> Prepare:
        """What makes a trace this rank's own."""
        ...

    def copies(self, slots: Sequence[Slot], groups: Groups, watch: Watch) -> Copies:
        """The parts of sharded weights that several ranks have."""
        ...


def sharding(
    model: nn.Module, tp: int, loss_fn: LossFn | None, shares: int = 1, sequence_parallel: bool = False,
    fuse: bool = True,
) -> Sharding:  # fmt: skip
    """How a model lies over ``tp`` ranks; ``fuse`` as in ``trace``.

    ``shares``: micro-batches are run in so many parts, one's collectives under another's compute.
    ``sequence_parallel``: what lies between the sharded products runs on each rank's rows only.
    Raises ValueError for either without tensor-parallel ranks.
    """
    if tp == 1 and shares > 1:
        raise ValueError(f"{shares} parts of a micro-batch hide the sums over tensor-parallel ranks, but tp is 1")
    if tp == 1 and sequence_parallel:
        raise ValueError("sequence_parallel=True divides rows among tensor-parallel ranks, but tp is 1")
    if tp == 1:
        return Unsharded(model, loss_fn, fuse)
    return Sharded(model, tp, loss_fn, shares, sequence_parallel, fuse)


class Unsharded:
    """One tensor-parallel rank: everything is as it is."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, fuse: bool = True) -> None:
        self.model, self.loss_fn, self.fuse = model, loss_fn, fuse

    def trace(self, batch: Any, device: torch.device | str) -> Trace:
        return trace(self.model, batch, self.loss_fn, device=device, fuse=self.fuse)

    def prove(self, traced: Trace, batch: Any) -> Proof:
        return Proof()

    def believe(self, proof: Proof) -> None:
        pass

    def graph(self, traced: Trace) -> ProxyGraph:
        return traced.graph

    def shards(self, rank: int) -> Shards:
        return WHOLE

    def spans(self) -> tuple[Span, ...]:
        return ()

    def partial(self, name: str) -> tuple[Span, ...]:
        return ()

    def prepare(self, groups: Groups, watch: Watch) -> Prepare:
        return lambda traced, starts, batch: Prepared.plainly(traced, self.model, starts)

    def copies(self, slots: Sequence[Slot], groups: Groups, watch: Watch) -> Copies:
        return Copies(())


class Sharded:
    """Several ranks. The trace goes down to torch functions and is made of a copy of the model without memory, since
    the model itself will have parts of weights only."""

    def __init__(
        self, model: nn.Module, tp: int, loss_fn: LossFn | None, shares: int = 1, sequence_parallel: bool = False,
        fuse: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.tp, self.loss_fn, self.count = model, tp, loss_fn, shares
        self.sequence_parallel, self.fuse = sequence_parallel, fuse
        self.blueprint = on_meta(model)
        self._kept: Mapping[str, str] = {}
        self._latest: tuple[ProxyGraph, Derived] | None = None  # several ask of each trace
        self._derived: Derived | None = None
        self._of: ProxyGraph | None = None
        self._summed: frozenset[str] = frozenset()
        """Weights whose gradients add up over all ranks because each sees its rows only."""
        self._told = False

    @property
    def derived(self) -> Derived:
        assert self._derived is not None, "the graph for the planner comes first"
        return self._derived

    def trace(self, batch: Any, device: torch.device | str) -> Trace:
        for ours, theirs in zip(self.model.modules(), self.blueprint.modules(), strict=True):
            theirs.training = ours.training
        return fine_trace(self.blueprint, batch, self.loss_fn, device=device, fuse=self.fuse)

    def prove(self, traced: Trace, batch: Any) -> Proof:
        proven = prove(self.blueprint, traced, self._derive(traced), batch)
        return Proof(described(proven, traced.graph), dict(proven.derived.kept))

    def believe(self, proof: Proof) -> None:
        self._kept = proof.kept
        self._latest = None

    def graph(self, traced: Trace) -> ProxyGraph:
        found = self._derive(traced)
        if self._derived is None:
            self._derived, self._of = found, traced.graph
            self._summed = frozenset(self._rows(traced, found).weights - self._added())
        return local_graph(traced.graph, steps(traced), found, self._rows(traced, found))

    def _rows(self, traced: Trace, derived: Derived) -> Rows:
        return rows_of(traced.graph, steps(traced), derived, traced.constants) if self.sequence_parallel else Rows()

    def _added(self) -> set[str]:
        """Weights whose gradients add up over all ranks in the plain form too."""
        groups = [group for block in self.derived.blocks for group in block.groups if group.degree == self.tp]
        return {name for group in groups for name in group.partial_gradients}

    def _derive(self, traced: Trace) -> Derived:
        graph = traced.graph
        if self._latest is None or self._latest[0] is not graph:
            self._latest = graph, derive(graph, steps(traced), self.tp, constants=traced.constants, whole=self._kept)
        return self._latest[1]

    def _like(self, traced: Trace, batch: Any, size: int) -> Trace | None:
        """The trace of fewer samples that runs the same steps; None if there is none.

        The model's Python may look at the data: the samples are to give it the answers that all together gave.
        """
        for start in range(min(TRIED, rows(batch) - size + 1)):
            found = self.trace(samples(batch, start, start + size), traced.device)
            if same_steps(traced, found):
                return found
        return None

    def shards(self, rank: int) -> Shards:
        return Shards(self.derived.weights, rank, self.tp)

    def spans(self) -> tuple[Span, ...]:
        return tuple(sorted({(g.degree, g.repeat) for block in self.derived.blocks for g in block.groups}))

    def partial(self, name: str) -> tuple[Span, ...]:
        groups = [group for block in self.derived.blocks for group in block.groups]
        spans = {(g.degree, g.repeat) for g in groups if name in g.partial_gradients}
        return tuple(sorted(spans | ({(self.tp, 1)} if name in self._summed else set())))

    def prepare(self, groups: Groups, watch: Watch) -> Prepare:
        ranks = {span: TensorGroup(group, span[0], watch) for span, group in groups.tensor.items()}
        gathered = Gathered()
        keeping = gathered.kept_as_rows if self.sequence_parallel else nullcontext

        def own(traced: Trace, starts: Sequence[int]) -> Trace:
            found = self.derived if traced.graph is self._of else self._derive(traced)
            if odd := sorted(n for n, layout in found.weights.items() if self.derived.weights.get(n) != layout):
                raise ValueError(
                    f"with these input shapes {odd[:3]} ({len(odd)} weights) would lie on the tensor-parallel ranks in "
                    "another way than with the example's: use an example of this shape, or batches of one shape"
                )
            rank, local, walk = groups.coord.tp, self._rows(traced, found), steps(traced)
            stage_of = partial(bisect_right, starts)
            code = shard(traced, found, ranks, rank, stage_of, local)
            if not self.sequence_parallel:
                return code
            if not local.values and not self._told and not any(groups.coord):
                self._told = True
                warnings.warn(
                    f"sequence_parallel: with these input shapes {self.tp} ranks divide no rows between the sums over "
                    "ranks, so tensor parallelism runs in its plain form",
                    stacklevel=2,
                )
            home = {step: number for number, block in enumerate(found.blocks) for step in block.steps}
            at = {step.index: (home.get(step.name), stage_of(step.index)) for step in walk}
            return on_rows(
                code, walk, local, ranks[self.tp, 1], rank, at.__getitem__, self._summed, self._added(), gathered
            )

        def parts(traced: Trace) -> dict[str, Layout]:
            found = self.derived if traced.graph is self._of else self._derive(traced)
            values = {name: layout for block in found.blocks for name, layout in block.values.items()}
            values |= self._rows(traced, found).values
            return {name: values[value] for name, value in traced.graph.outputs.items() if value in values}

        def prepared(traced: Trace, starts: Sequence[int], batch: Any) -> Prepared:
            lie = parts(traced)  # before the trace's code is changed
            return replace(made(traced, starts, batch), parts=lie)

        def made(traced: Trace, starts: Sequence[int], batch: Any) -> Prepared:
            total = rows(batch)
            ends = [total * i // self.count for i in range(self.count + 1)]
            shares = [share for share in pairwise(ends) if share[0] < share[1]]
            if len(shares) == 1:
                return Prepared.plainly(own(traced, starts), self.model, starts, keeping)
            some = {size: self._like(traced, batch, size) for size in {stop - start for start, stop in shares}}
            apart = alone(traced, some, total)
            if mixed := of_samples(self._rows(traced, self._derive(traced)).values, traced, some, total):
                apart = ()
                if not any(groups.coord):
                    warnings.warn(
                        f"tp_shares: with these input shapes a rank's rows of {mixed} are some of its samples, so "
                        "micro-batches run whole and their collectives are not hidden: use lengths that tp divides",
                        stacklevel=2,
                    )
            ready = {size: own(one, starts) for size, one in some.items() if one is not None}
            return overlapped(own(traced, starts), ready, self.model, starts, shares, apart, keeping)

        return prepared

    def copies(self, slots: Sequence[Slot], groups: Groups, watch: Watch) -> Copies:
        found, of = list[Copy](), {slot.name: slot for slot in slots}
        for block in self.derived.blocks:
            for name, layout in block.weights.items():
                for group in block.groups if name in of else ():
                    for dim, factors in enumerate(layout):
                        ranks = TensorGroup(groups.tensor[group.degree, group.repeat], group.degree, watch)
                        for start, stop in same_parts(factors, group.degree, group.repeat, self.tp):
                            found.append(Copy(of[name], dim, start, stop, ranks))
        return Copies(tuple(dict.fromkeys(found)))


TRIED = 8
"""Runs of samples tried to find some that the model treats as it does all."""
