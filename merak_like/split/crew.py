"""The ranks of one host: the first talks to the edges and says what is done, the others do it with it.

Orders are JSON over a group of their own, on the CPU. They never overlap, so that all ranks meet in the same
collectives; a sign of life goes out while there is nothing to do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.runtime.groups import Group, Groups, Span, Sum, files_group, make_groups
from merak_like.runtime.initialize import World
from merak_like.runtime.watch import PeerError, Watch
from merak_like.split.checkpoint import State
from merak_like.split.spoken import blank, give, given, heard, named, raw, say, typed

T = TypeVar("T")
IDLE = 15.0
"""Seconds after which a crew without an order gets a sign of life."""
WORD = 500


class Void(RuntimeError):
    """The step came to nothing on the rank that talks to the edge; nothing was changed here either."""


class Crew:
    """All ranks of a host; each has one. Alone, every method does at once what it is about."""

    def __init__(self, world: World, stage_rank: tuple[int, ...] = (0,), mesh: Mesh | None = None) -> None:
        """``stage_rank`` is the pipeline rank that runs each stage of the cloud's half, ``mesh`` how the ranks stand: a
        pipeline, unless told. Every rank makes its own at once."""
        self.world, self.mesh = world, mesh or Mesh(pp=world.size)
        self.coord, self.stage_rank = self.mesh.coord(world.rank), stage_rank
        self.broken: BaseException | None = None
        """What the ranks fell out of step with: then nothing more can be done together."""
        self._agreed = list[BaseException]()
        """The errors that all ranks raised in the last order, each its own."""
        self._known: dict[tuple[tuple[Sum, ...], tuple[Span, ...]], Groups] = {}
        self.peers: Group = None
        """The tensor-parallel ranks of this replica's first part, where this is one of several."""
        self.desks: dict[int, Group] = {}
        """By replica, the first one apart: its first rank, and the rank that talks to the edges."""
        if world.alone:
            return
        self.watch = Watch(world.rank, world.timeout, world.pulse)
        self._group = files_group(world)
        for dp in range(self.mesh.dp):
            doors = [self.mesh.rank(Coord(dp, 0, tp)) for tp in range(self.mesh.tp)]
            if dp and (found := files_group(world, [0, doors[0]])) is not None:
                self.desks[dp] = found
            if len(doors) > 1 and (found := files_group(world, doors)) is not None:
                self.peers = found
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        if world.rank == 0:
            threading.Thread(target=self._live, name="merak-crew", daemon=True).start()

    def groups(self, sums: Collection[Sum], spans: Collection[Span]) -> Groups:
        """Those of the mesh that sum and talk so, made once; every rank asks for the same."""
        key = tuple(sorted(set(sums))), tuple(sorted(set(spans)))
        if key not in self._known:
            alone = Groups(self.mesh, self.coord, self.stage_rank)
            made = alone if self.world.alone else make_groups(self.mesh, self.world, self.stage_rank, *key)
            self._known[key] = made
        return self._known[key]

    # --- orders -----------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, do: str, **facts: Any) -> Iterator[None]:
        """On rank 0: let the others do this too, and what is inside here. On the others: inside is what they do."""
        if self.world.alone or self.world.rank:
            yield
            return
        with self._lock:
            if self.broken is not None:
                raise PeerError(f"the host's ranks are out of step: {self.broken}")
            try:
                self._send({"do": do, **facts})
                self._agreed.clear()
                yield
            except BaseException as error:
                if self.breaks(error):
                    self.broken = error
                raise

    @property
    def patience(self) -> float:
        """Seconds that no single action takes: twice the limit of a wait for another rank."""
        return 2 * self.world.timeout.total_seconds()

    def breaks(self, error: BaseException) -> bool:
        """Whether ranks are out of step with an error: all others are raised by each of them at the same place."""
        return not (self.agreed(error) or isinstance(error, FloatingPointError))

    def agreed(self, error: BaseException) -> bool:
        """Whether all ranks have raised an error, each its own."""
        return any(error is one for one in self._agreed)

    def hear(self) -> dict[str, Any]:
        """What rank 0 tells all next: an order. Raises PeerError where it is gone."""
        self._spread(size := torch.zeros(1, dtype=torch.int64))
        self._spread(body := torch.empty(int(size), dtype=torch.uint8))
        self._agreed.clear()
        return json.loads(body.numpy().tobytes())

    def agree(self, error: Exception | None) -> None:
        """Raise an error on every rank where any rank has one: here its own, else what the others said."""
        if self.world.alone:
            if error is not None:
                raise error
            return
        word = (f"{type(error).__name__}: {error}"[:WORD] if error is not None else "").encode()[:WORD]
        told = torch.zeros(WORD, dtype=torch.uint8)
        told[: len(word)] = torch.frombuffer(bytearray(word or b"\0"), dtype=torch.uint8)[: len(word)]
        everyone = [torch.zeros(WORD, dtype=torch.uint8) for _ in range(self.world.size)]
        with self.watch.waiting("whether all ranks could do it"):
            dist.all_gather(everyone, told, group=self._group)
        said = [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in everyone]
        if not any(said):
            return
        others = "; ".join(f"rank {i}: {text}" for i, text in enumerate(said) if text)
        self._agreed.append(error if error is not None else Void(others))
        raise self._agreed[-1]

    def each(self, make: Callable[[], T]) -> T:
        """What every rank makes for itself. Where one cannot, none has, and all raise."""
        made: list[T] = []
        failed: Exception | None = None
        try:
            made.append(make())
        except Exception as error:
            failed = error
        self.agree(failed)
        return made[0]

    def add_up(self, tensor: Tensor, groups: Groups) -> None:
        """Sum a tensor over the replicas, in place."""
        with self.watch.waiting("the sum of a buffer over the replicas"):
            dist.all_reduce(tensor, group=groups.sums[(), ()])

    def close(self) -> None:
        """Let the others go home, and give the groups back."""
        if self.world.alone or self._stopped.is_set():
            return
        self._stopped.set()
        if self.world.rank == 0 and self.broken is None:
            with self.together("stop"):
                pass
        self.watch.close()
        if self.broken is None:
            for group in (self._group, *self.desks.values(), self.peers):
                if group is not None:
                    dist.destroy_process_group(group)
            for groups in self._known.values():
                groups.close()

    def _live(self) -> None:
        while not self._stopped.wait(min(IDLE, self.world.timeout.total_seconds() / 4)):
            if self._lock.acquire(blocking=False):
                try:
                    if self._stopped.is_set() or self.broken is not None:
                        return
                    with self.together("live"):
                        pass
                except PeerError:
                    return
                finally:
                    self._lock.release()

    # --- states -----------------------------------------------------------------------------------------------------

    def gather(self, mine: State, whole: Callable[[str, Sequence[Tensor]], Tensor]) -> State:
        """On rank 0 the tensors and facts of the first replica in one; elsewhere an empty one.

        ``whole`` puts together what tensor-parallel ranks have under one name.
        """
        if self.world.alone:
            return mine
        if self.coord.dp:
            return State({}, {})
        if self.world.rank:
            with self.watch.waiting("rank 0 to hear what this rank has"):
                say({"tensors": _head(mine), "facts": dict(mine.facts)}, 0, self._group)
            for name, tensor in mine.tensors.items():
                with self.watch.waiting(f"rank 0 to take {name}"):
                    give(tensor, 0, self._group)
            return State({}, {})
        parts, facts = {name: {0: [tensor]} for name, tensor in mine.tensors.items()}, dict(mine.facts)
        for rank in range(1, self.mesh.pp * self.mesh.tp):
            with self.watch.waiting(f"what rank {rank} has"):
                told = heard(rank, self._group)
            for name, dtype, shape in told["tensors"]:
                of = parts.setdefault(name, {}).setdefault(self.mesh.coord(rank).pp, [])
                with self.watch.waiting(f"{name} from rank {rank}"):
                    of.append(given(dtype, shape, rank, self._group))
            facts = _merged(facts, told["facts"])
        # what several parts of the half have is the same in each: the first one's counts
        return State({name: whole(name, next(iter(each.values()))) for name, each in parts.items()}, facts)

    def share(self, state: State | None) -> State:
        """What rank 0 has, on every rank."""
        if self.world.alone:
            assert state is not None
            return state
        if self.world.rank == 0:
            assert state is not None
            self._send({"tensors": _head(state), "facts": dict(state.facts)})
            for tensor in state.tensors.values():
                self._spread(raw(tensor))
            return state
        told, tensors = self.hear(), dict[str, Tensor]()
        for name, dtype, shape in told["tensors"]:
            self._spread(found := blank(dtype, shape))
            tensors[name] = typed(found, dtype, shape)
        return State(tensors, told["facts"])

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _send(self, said: Mapping[str, Any]) -> None:
        body = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        for tensor in (torch.tensor([body.numel()]), body):
            self._spread(tensor)

    def _spread(self, tensor: Tensor) -> None:
        with self.watch.waiting("an order of rank 0" if self.world.rank else "the other ranks to hear an order"):
            dist.broadcast(tensor, 0, group=self._group)


def _head(state: State) -> list[tuple[Any, ...]]:
    return [(name, *named(tensor)) for name, tensor in state.tensors.items()]


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of two ranks: mappings are joined, of all else the first that says something counts."""
    found = {**one, **other} | {k: v for k, v in one.items() if v not in (None, [], {})}
    both = [k for k in one.keys() & other.keys() if isinstance(one[k], Mapping) and isinstance(other[k], Mapping)]
    return found | {k: _merged(one[k], other[k]) for k in both}
