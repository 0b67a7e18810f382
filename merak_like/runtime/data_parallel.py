"""Gradients that several ranks hold the same parameters for: summed in flat buckets behind their last backward.

A parameter's ``grad`` is a view into its bucket, so nothing is copied. A bucket is reduced as soon as all its
parameters have their whole gradient, while earlier layers are still at work: the last backward of each stage that reads
them has passed, and no weight gradient waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like.runtime.tensor_parallel.copies import Copies
from merak_like.runtime.watch import Watch

BUCKET_BYTES = 25 * 2**20
"""As large as PyTorch DDP's default: big enough for bandwidth, small enough to start early."""


@dataclass
class Bucket:
    """Some parameters of one dtype and group, and their gradients as one flat tensor."""

    parameters: list[nn.Parameter]
    group: Any
    early: bool
    """Whether it may be reduced before the step's last backward is over."""
    flat: Tensor = field(init=False)
    views: list[Tensor] = field(init=False)
    counts: Tensor = field(init=False)
    """The end of ``flat``: for each parameter, how many ranks have a gradient. It travels with the gradients."""
    touched: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        sizes = [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=first.dtype, device=first.device)
        *parts, self.counts = self.flat.split([*sizes, len(sizes)])
        self.views = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]


class Gradients(Protocol):
    """Brings the gradients of this rank and of those that hold the same parameters together."""

    def begin(self) -> None:
        """Forget the last step's gradients."""
        ...

    def enter(self, stage: int, *, last: bool, whole: bool) -> None:
        """A backward of a stage begins: its last one, or one that leaves no weight gradient to a W."""
        ...

    def finish(self) -> None:
        """Sum what is left, and wait."""
        ...

    def gradients(self) -> Mapping[str, Tensor | None]:
        """The last step's gradients by name, whole; every rank asks."""
        ...

    def close(self) -> None:
        """Leave the parameters alone, and let go of the groups."""
        ...


class Reducer:
    """Sums gradients over the ranks that hold the same parameters."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Any], watch: Watch,
        readers: Mapping[str, Set[int]] | None = None, pending: Counter[int] | None = None,
        copies: Copies | None = None,
    ) -> None:  # fmt: skip
        """``groups`` gives the process group of each parameter by name; parameters without one are left alone.

        ``readers`` are the stages of this rank that read each parameter (stage 0, if not told), ``pending`` counts the
        gradients that wait for a W by the ``id`` of the parameter. ``copies`` are parts of parameters that some ranks
        have beside their own; they are added up last.
        """
        self.watch, self._parameters, self._copies = watch, parameters, copies
        self._readers = {id(p): readers[name] if readers else {0} for name, p in parameters.items()}
        self._pending: Counter[int] = Counter() if pending is None else pending
        self._passed: set[int] = set()
        self.buckets = _buckets(parameters, groups)
        self.place = {id(p): (b, i) for b in self.buckets for i, p in enumerate(b.parameters)}
        self._next = 0
        self._works: list[tuple[Any, str]] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrived)
            for bucket in self.buckets
            for parameter in bucket.parameters
        ]

    def begin(self) -> None:
        """Forget the last step's gradients."""
        self._next = 0
        self._passed.clear()
        self._pending.clear()  # of a step that failed
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.touched.clear()
            bucket.waiting = set(range(len(bucket.parameters)))
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view

    def enter(self, stage: int, *, last: bool, whole: bool = True) -> None:
        """A backward of a stage begins: its last one, or one that leaves no weight gradient to a W."""
        if last:
            self._passed.add(stage)

    def finish(self) -> None:
        """Reduce what is left and wait; a parameter that no rank has a gradient for gets ``grad = None``."""
        while self._next < len(self.buckets):
            self._launch()
        for work, what in self._works:
            self.watch.wait(work, what, "with the ranks that hold the same parameters")
        self._works.clear()
        for bucket in self.buckets:
            for parameter, count in zip(bucket.parameters, bucket.counts.tolist(), strict=True):
                if not count:
                    parameter.grad = None
        if self._copies is not None:
            self._copies.add_up()

    def gradients(self) -> dict[str, Tensor | None]:
        """The last step's gradients by name, whole."""
        return {name: parameter.grad for name, parameter in self._parameters.items()}

    def close(self) -> None:
        """Leave the parameters alone, and let go of the groups."""
        for hook in self._hooks:
            hook.remove()
        self.buckets.clear()

    def _arrived(self, parameter: Tensor) -> None:
        bucket, index = self.place[id(parameter)]
        bucket.touched.add(index)
        if self._readers[id(parameter)] <= self._passed and not self._pending[id(parameter)]:
            bucket.waiting.discard(index)
            # all ranks must start their collectives in one order: a bucket waits for the buckets before it
            while self._next < len(self.buckets) and self.buckets[self._next].early:
                if self.buckets[self._next].waiting:
                    break
                self._launch()

    def _launch(self) -> None:
        bucket = self.buckets[self._next]
        if bucket.touched:
            bucket.counts[list(bucket.touched)] = 1
        what = f"the sum of gradient bucket {self._next}"
        with self.watch.waiting("the start of", what):
            self._works.append((dist.all_reduce(bucket.flat, group=bucket.group, async_op=True), what))
        self._next += 1


def _buckets(parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Any]) -> list[Bucket]:
    """Last layers first, as the backward meets them; parameters shared between stages in buckets of their own, last."""
    by_kind: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
    group_of: dict[int, Any] = {}
    own: list[Bucket] = []
    late: list[Bucket] = []
    common = _most_common(list(groups.values()))
    for name in reversed(list(parameters)):
        group = groups.get(name)
        if group is not None:
            group_of[id(group)] = group
            by_kind.setdefault((id(group), parameters[name].dtype), []).append(parameters[name])
    for (key, _), members in by_kind.items():
        group = group_of[key]
        into = own if group is common else late
        into.extend(Bucket(part, group, group is common) for part in _parts(members))
    return own + late


def _most_common(groups: Sequence[Any]) -> Any:
    return max(groups, key=lambda g: sum(g is other for other in groups), default=None)


def _parts(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    parts: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.element_size()
        if parts[-1] and size + nbytes > BUCKET_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size += nbytes
    return [part for part in parts if part]
