"""Tensor-parallel ranks as threads of one process that take turns at collectives: every number of a rank, without jobs.

Only one thread runs at a time, with random numbers of its own, and hands on at each collective.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from merak_like._compat import StorageWeakRef, TorchDispatchMode, tree_leaves
from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.runtime import rng
from merak_like.runtime.exchange import MAX, SUM
from merak_like.runtime.groups import Groups, spanned
from merak_like.runtime.optimizer import Slot
from merak_like.runtime.tensor_parallel import collectives, scatter
from merak_like.runtime.tensor_parallel.sharding import Sharded
from tests.training import Subject


class Free:
    """A watch that watches nothing."""

    def waiting(self, *what: object) -> Any:
        return nullcontext()

    def wait(self, work: Any, *what: object) -> None:
        pass


@dataclass
class Ring:
    """The threads, of which one runs."""

    count: int
    turn: int = 0
    failed: bool = False
    change: threading.Condition = field(default_factory=threading.Condition)
    states: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def await_turn(self, rank: int) -> None:
        with self.change:
            assert self.change.wait_for(lambda: self.turn == rank or self.failed, timeout=120), "nobody goes on"
            if self.failed:
                raise RuntimeError("another rank failed")
        if rank in self.states:
            torch.set_rng_state(self.states[rank])

    def hand_on(self, rank: int) -> None:
        self.states[rank] = torch.get_rng_state()
        with self.change:
            self.turn = (rank + 1) % self.count
            self.change.notify_all()


class Fake:
    """A process group of some of them, and what its members gave to the collective at hand."""

    def __init__(self, ring: Ring, ranks: list[int], rank: int, box: dict[tuple[int, int], Tensor]) -> None:
        self.ring, self.ranks, self.rank, self.box, self.number = ring, ranks, rank, box, 0

    def exchange(self, given: Tensor) -> list[Tensor]:
        """What all gave; everybody else runs until it has given too."""
        number, self.number = self.number, self.number + 1
        self.box[number, self.rank] = given.detach().clone()
        while not all((number, rank) in self.box for rank in self.ranks):
            self.ring.hand_on(self.rank)
            self.ring.await_turn(self.rank)
        return [self.box[number, rank] for rank in self.ranks]


def all_reduce(tensor: Tensor, group: Any, op: Any = SUM) -> None:
    found = torch.stack(group.exchange(tensor))
    tensor.copy_(found.amax(0) if op == MAX else found.sum(0))


def all_gather(into: Tensor, given: Tensor, group: Any) -> None:
    into.copy_(torch.cat(group.exchange(given)))


def reduce_scatter(into: Tensor, given: Tensor, group: Any) -> None:
    into.copy_(torch.stack(group.exchange(given)).sum(0).chunk(len(group.ranks))[group.ranks.index(group.rank)])


@dataclass
class Ran:
    """One micro-batch on all ranks."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of rank 0's view, put together from all ranks' parts, summed where they are partial."""
    kept: list[int]
    """Bytes that are there on each rank between forward and backward, weights apart."""
    code: list[str]
    """Of each rank: the names of what its code calls, in order."""
    calls: list[int]
    """Collectives that each rank took part in, forward and backward."""


def in_lockstep(
    one: Subject, batch: Any, tp: int, sequence_parallel: bool = True, planned: Any = None, thrifty: bool = False,
    shares: int = 1, fuse: bool = True, around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Ran:  # fmt: skip
    """Forward and backward; ``planned`` is the batch that decided how weights lie and which gradients are summed.

    ``thrifty``: everything is computed again for the backward, and gradients of weights are put off.
    ``around``: what a rank's thread does it in.
    """
    ring, mesh = Ring(tp), Mesh(1, 1, tp)
    boxes: dict[Any, dict[Any, Any]] = {}
    models, sums = [copy.deepcopy(one.model) for _ in range(tp)], [dict[str, Tensor]() for _ in range(tp)]
    losses, kept, code, errors = [0.0] * tp, [0] * tp, [""] * tp, list[BaseException]()
    calls = [0] * tp
    parts = Sharded(one.model, tp, one.loss_fn, shares, sequence_parallel, fuse)

    def work(rank: int) -> None:
        ring.await_turn(rank)
        mine = Sharded(models[rank], tp, one.loss_fn, shares, sequence_parallel, fuse)
        first = mine.trace(batch if planned is None else planned, "cpu")
        mine.graph(first)
        traced = first if planned is None else mine.trace(batch, "cpu")
        made = dict[Any, Fake]()
        for span in mine.spans():
            ranks = sorted(spanned(rank, (span,)))
            made[span] = Fake(ring, ranks, rank, boxes.setdefault((span, ranks[0]), {}))
        groups = Groups(mesh, Coord(0, 0, rank), (0,), {}, made)
        shards = mine.shards(rank)
        for name, tensor in [*models[rank].named_parameters(), *models[rank].named_buffers()]:
            tensor.data = shards.cut(name, tensor.data)
        stop = len(traced.graph.ops)
        ready = mine.prepare(groups, Free())(traced, (0, stop), batch)  # type: ignore[arg-type]
        own = ready.trace
        code[rank] = " ".join(getattr(node.target, "__name__", str(node.target)) for node in own.code.nodes)
        stage = ready.make(0, [(0, stop)] if thrifty else (), torch.device("cpu"), None)
        rng.start(3, 0, 0)
        with counting(models[rank]) as living:
            out = stage.forward(0, batch, {}, put_off=thrifty)
        losses[rank], kept[rank] = out["loss"].item(), living([t for box in boxes.values() for t in box.values()])
        stage.backward(0, {"loss": torch.ones_like(out["loss"])})
        if thrifty:
            stage.weight(0)
        calls[rank] = sum(group.number for group in made.values())
        slots = [Slot(name, p, tuple(p.shape)) for name, p in models[rank].named_parameters()]
        mine.copies(slots, groups, Free()).add_up()  # type: ignore[arg-type]
        for name, parameter in models[rank].named_parameters():
            if parameter.grad is not None:
                sums[rank][name] = parameter.grad
                for span in mine.partial(name):
                    all_reduce(sums[rank][name], made[span])
        if rank == 0:
            parts.__dict__.update(mine.__dict__)

    def guarded(rank: int) -> None:
        try:
            with around():
                work(rank)
        except BaseException as error:
            errors.append(error)
            ring.failed = True
        with ring.change:
            ring.turn = (rank + 1) % tp
            ring.change.notify_all()

    with (
        mock.patch.object(collectives, "all_reduce", all_reduce), mock.patch.object(scatter, "all_gather", all_gather),
        mock.patch.object(scatter, "reduce_scatter", reduce_scatter), torch.random.fork_rng(),
    ):  # fmt: skip
        threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(tp)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
    if errors:
        raise errors[0]
    whole = {name: parts.shards(0).assemble(name, [each[name] for each in sums]) for name in sums[0]}
    return Ran(losses, whole, kept, code, calls)


class Making(TorchDispatchMode):
    """Notes the memory of all that is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out


@contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[Iterable[Tensor]], int]]:
    """A function that tells, while what was returned is still there, the bytes of all that was made and lives, weights
    and buffers apart, and some others."""
    with Making() as making:
        yield lambda others: sum(
            size
            for storage, size in making.made.items()
            if not storage.expired()
            and storage not in {StorageWeakRef(t.untyped_storage())
                                for t in (*model.parameters(), *model.buffers(), *others)}
        )  # fmt: skip


def kept_by_plain(one: Subject, batch: Any) -> int:
    """Bytes that are kept for the backward in one process."""
    model = copy.deepcopy(one.model)
    with counting(model) as living:
        loss = one.loss(model, batch)
    return living([loss])


def plain(one: Subject, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process."""
    model = copy.deepcopy(one.model)
    with torch.random.fork_rng():
        rng.start(3, 0, 0)
        loss = one.loss(model, batch)
        loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
