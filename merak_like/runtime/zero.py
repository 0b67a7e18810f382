"""Optimizer state (ZeRO-1) and gradients too (ZeRO-2) spread over the ranks that hold the same parameters.

    backward      each bucket, as soon as its gradients are there: reduce-scatter, behind the backward of earlier layers
    update        each rank its own run of each bucket; then all-gather, behind the update of the next bucket

ZeRO-1 keeps a whole gradient through the step and sums once; ZeRO-2 sums after every micro-batch and keeps its own run
(Rajbhandari et al., SC 2020, section 5). Weights that several stages share are spread over all their ranks and summed
once. Without spreading, the same buckets keep weights in full precision beside those that compute (precision.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like._compat import has_step_hooks
from merak_like.runtime.exchange import all_gather, reduce_scatter
from merak_like.runtime.flat import Dtypes, FlatBucket, buckets_of
from merak_like.runtime.groups import Group
from merak_like.runtime.optimizer import Slot
from merak_like.runtime.tensor_parallel.copies import Copies
from merak_like.runtime.watch import Watch

ELEMENTWISE = frozenset("ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD".split())
"""Optimizers of torch that treat every number for itself; one of your own says so by ``elementwise = True``."""
FLYING = 3
"""Sums of ZeRO-2 on their way at once: each holds a whole bucket of gradients."""


def refuse_unsuited(optimizer: torch.optim.Optimizer, zero: int) -> None:
    """Raise ValueError for an optimizer that cannot work on shares of weights."""
    kind = type(optimizer)
    known = kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE
    known = known or (kind.__module__.startswith("deepspeed.") and kind.__name__ == "DeepSpeedCPUAdam")
    if not getattr(optimizer, "elementwise", known):
        raise ValueError(
            f"zero={zero} gives each rank runs of numbers, and {kind.__name__} may look at whole weights: use one of "
            f"{', '.join(sorted(ELEMENTWISE))}, set elementwise = True on your class if it treats every number for "
            "itself, or use zero=0"
        )


def retarget(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], slots: Sequence[Slot]) -> None:
    """Let an optimizer that was made for parameters update the slots instead."""
    name_of = {id(p): name for name, p in parameters.items()}
    by_name: dict[str, list[Slot]] = {}
    for slot in slots:
        by_name.setdefault(slot.name, []).append(slot)
    for parameter, state in list(optimizer.state.items()):  # some begin with state, such as Adagrad
        del optimizer.state[parameter]
        for slot in by_name.get(name_of[id(parameter)], ()):
            optimizer.state[slot.target] = {key: _like(slot, parameter, value) for key, value in state.items()}
    for group in optimizer.param_groups:
        group["params"] = [slot.target for p in group["params"] for slot in by_name.get(name_of[id(p)], ())]


def _like(slot: Slot, parameter: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or slot.target is parameter:
        return value.clone() if isinstance(value, Tensor) else value
    part = value if slot.run is None else value.flatten()[slot.run[0] : slot.run[1]]
    return part.to(slot.target.dtype, copy=True)


class FlatReducer:
    """Sums gradients in flat buckets, spreads what the optimizer has, and brings new weights back."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Group], watch: Watch,
        readers: Mapping[str, Set[int]], pending: Counter[int], *, zero: int,
        dtypes: Dtypes, counted: Set[str], dp: Group, whole: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        """``dtypes`` says in which dtype a parameter computes, and in which it is summed and updated.

        ``dp`` is the group of this rank's replicas: what is not shared between stages is summed behind the backward.
        ``whole`` are not spread: tensor-parallel ranks see parts of their gradients.
        """
        self.watch, self._pending = watch, pending
        self._passed: set[int] = set()
        self.copies: Copies | None = None
        """Parts of targets that some tensor-parallel ranks have beside their own."""
        self._stage: int | None = None
        """The stage that now runs a backward after which its buckets are summed (ZeRO-2)."""
        self._turn = 0
        self._next = 0
        self._works: list[tuple[Any, str, Callable[[], object]]] = []
        self._counts: list[list[float]] = []
        self._dp, self._readers = dp, {id(p): readers[name] for name, p in parameters.items()}
        self.buckets = buckets_of(parameters, groups, readers, zero, dtypes, counted, dp, whole)
        self.once = [b for b in self.buckets if not b.kind.every]
        self._place = {id(p): (b, i) for b in self.buckets for i, p in enumerate(b.parameters)}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for b in self.buckets for p in b.parameters]
        self.slots = [slot for bucket in self.buckets for slot in bucket.slots]

    # --- gradients -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget the last step's gradients."""
        self._works.clear()  # of a step that failed
        self._pending.clear()
        self._passed.clear()
        self._stage, self._next = None, 0
        for bucket in self.buckets:
            bucket.begin()

    def enter(self, stage: int, *, last: bool, whole: bool) -> None:
        """A backward of a stage begins: its last one, or one that leaves no weight gradient to a W."""
        self._flush()
        self._turn, self._stage = 0, stage if whole else None
        if last:
            self._passed.add(stage)

    def finish(self) -> None:
        """Sum what is left, wait, and give every target its gradient."""
        self._flush()
        while self._next < len(self.once):
            self._launch(self.once[self._next])
            self._next += 1
        counting = self._count()
        while self._works:
            self._land()
        self._counts = counting()
        for bucket, counts in zip(self.buckets, self._counts, strict=True):
            bucket.settle(counts)
        if self.copies is not None:
            self.copies.add_up()

    def gradients(self) -> dict[str, Tensor | None]:
        """The last step's gradients by name, whole; every rank asks."""
        found: dict[str, Tensor | None] = {}
        for bucket, counts in zip(self.buckets, self._counts, strict=True):
            flat = bucket.flat() if bucket.kind.ways == 1 else torch.empty(
                bucket.size, dtype=bucket.own.dtype, device=bucket.own.device
            )  # fmt: skip
            if bucket.kind.ways > 1:
                work = all_gather(flat, bucket.own, bucket.kind.group)
                self.watch.wait(work, "the gradients of a bucket", "from the ranks that hold the same parameters")
            found.update(bucket.gradients(flat, counts))
        return found

    def close(self) -> None:
        """Leave the parameters alone, and let go of the groups."""
        for hook in self._hooks:
            hook.remove()
        self.buckets.clear()
        self.once.clear()
        self._place.clear()

    def _arrived(self, parameter: Tensor) -> None:
        bucket, index = self._place[id(parameter)]
        bucket.take(index)
        if bucket.kind.every:
            bucket.arrived.add(index)
            self._sum_in_turn()
        elif self._readers[id(parameter)] <= self._passed and not self._pending[id(parameter)]:
            bucket.arrived.add(index)
            # all ranks must start their sums in one order: a bucket waits for the buckets before it
            while self._next < len(self.once) and self.once[self._next].kind.group is self._dp:
                if len(self.once[self._next].arrived) < len(self.once[self._next].parameters):
                    break
                self._launch(self.once[self._next])
                self._next += 1

    def _of_stage(self) -> list[FlatBucket]:
        return [b for b in self.buckets if b.kind.every and b.kind.stages == {self._stage}]

    def _sum_in_turn(self) -> None:
        if self._stage is None:
            return
        mine = self._of_stage()
        while self._turn < len(mine) and len(mine[self._turn].arrived) == len(mine[self._turn].parameters):
            self._launch(mine[self._turn])
            self._turn += 1

    def _flush(self) -> None:
        """After a backward every bucket of its stage is summed, on all ranks in one order, touched or not."""
        if self._stage is not None:
            for bucket in self._of_stage()[self._turn :]:
                self._launch(bucket)
        self._stage = None

    def _launch(self, bucket: FlatBucket) -> None:
        bucket.arrived.clear()
        kind, what = bucket.kind, f"the sum of gradient bucket {self.buckets.index(bucket)}"
        if kind.group is None:
            return
        flat = bucket.flat()
        done: Callable[[], object] = lambda: None  # noqa: E731
        with self.watch.waiting("the start of", what):
            if kind.ways == 1:
                work = dist.all_reduce(flat, group=kind.group, async_op=True)
            elif not kind.every:
                work = reduce_scatter(bucket.own, flat, kind.group)
            else:
                while len(self._works) >= FLYING:
                    self._land()
                mine = torch.empty_like(bucket.own)
                work = reduce_scatter(mine, flat, kind.group)
                bucket.sums, done = None, partial(_add, bucket.own, mine, flat)
        self._works.append((work, what, done))

    def _land(self) -> None:
        work, what, done = self._works.pop(0)
        self.watch.wait(work, what, "with the ranks that hold the same parameters")
        done()

    def _count(self) -> Callable[[], list[list[float]]]:
        """Start to ask how many ranks have a gradient, for each parameter of each bucket."""
        own = [torch.tensor([float(i in b.touched) for i in range(len(b.parameters))]) for b in self.buckets]
        by_group: dict[int, list[int]] = {}
        for number, bucket in enumerate(self.buckets):
            if bucket.kind.group is not None:
                by_group.setdefault(id(bucket.kind.group), []).append(number)
        flying: list[tuple[Any, Tensor, list[int]]] = []
        for numbers in by_group.values():
            bucket = self.buckets[numbers[0]]
            counts = torch.cat([own[n] for n in numbers]).to(bucket.own.device)
            flying.append((dist.all_reduce(counts, group=bucket.kind.group, async_op=True), counts, numbers))

        def wait() -> list[list[float]]:
            for work, counts, numbers in flying:
                self.watch.wait(work, "who has which gradient", "with the ranks that hold the same parameters")
                for number, part in zip(numbers, counts.split([len(own[n]) for n in numbers]), strict=True):
                    own[number] = part
            return [counts.tolist() for counts in own]

        return wait

    # --- weights -------------------------------------------------------------------------------------------------

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update bucket by bucket, while the weights of those before are on their way to the other ranks."""
        works: list[Any] = []
        if has_step_hooks(optimizer) or type(optimizer).__name__ not in ELEMENTWISE:
            optimizer.step()  # what hooks on it would see several steps
            works.extend(self._send(bucket) for bucket in self.buckets)
        else:
            with _portions(optimizer, self.buckets) as portions:
                for bucket, choose in zip(self.buckets, portions, strict=True):
                    choose()
                    optimizer.step()
                    works.append(self._send(bucket))
        self._wait(works)

    def publish(self) -> None:
        """Bring what the targets have into the parameters of all ranks."""
        self._wait([self._send(bucket) for bucket in self.buckets])

    def _send(self, bucket: FlatBucket) -> Any:
        bucket.publish()
        if bucket.kind.ways == 1:
            return None
        mine = bucket.weights.narrow(0, bucket.kind.mine * bucket.length, bucket.length)
        with self.watch.waiting("the start of gathering weights"):
            return all_gather(bucket.weights, mine, bucket.kind.group)

    def _wait(self, works: Sequence[Any]) -> None:
        for work in works:
            if work is not None:
                self.watch.wait(work, "new weights", "from the ranks that hold the same parameters")


def _add(into: Tensor, more: Tensor, needed: Tensor) -> None:
    """``needed`` by the sum until it is there."""
    into.add_(more)


@contextmanager
def _portions(optimizer: torch.optim.Optimizer, buckets: Sequence[FlatBucket]) -> Iterator[list[Callable[[], None]]]:
    """For each bucket, what makes the optimizer see its weights only; at the end it sees all again."""
    groups = optimizer.param_groups
    whole = [group["params"] for group in groups]

    def choose(bucket: FlatBucket) -> None:
        mine = {id(slot.target) for slot in bucket.slots}
        for group, params in zip(groups, whole, strict=True):
            group["params"] = [p for p in params if id(p) in mine]

    try:
        yield [lambda bucket=bucket: choose(bucket) for bucket in buckets]
    finally:
        for group, params in zip(groups, whole, strict=True):
            group["params"] = params
