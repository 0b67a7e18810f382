"""The ranks of one host: the first talks to the edges and says what is done, the others do it with it.

Orders are JSON over a group of their own, on the CPU. They never overlap, so that all ranks meet in the same
collectives; a sign of life goes out while there is nothing to do.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.runtime.groups import Groups, files_group, make_groups
from merak_like.runtime.initialize import World
from merak_like.runtime.watch import PeerError, Watch
from merak_like.split.checkpoint import State

IDLE = 15.0
"""Seconds after which a crew without an order gets a sign of life."""
WORD = 500


class Void(RuntimeError):
    """The step came to nothing on the rank that talks to the edge; nothing was changed here either."""


class Crew:
    """All ranks of a host; each has one. Alone, every method does at once what it is about."""

    def __init__(self, world: World, stage_rank: tuple[int, ...] = (0,)) -> None:
        """``stage_rank`` is the rank that runs each stage of the cloud's half. Every rank makes its own at once."""
        from merak_like.partitioner.mesh import Coord, Mesh

        self.world = world
        self.broken: BaseException | None = None
        """What the ranks fell out of step with: then nothing more can be done together."""
        mesh = Mesh(pp=world.size)
        if world.alone:
            self.groups = Groups(mesh, Coord(0, 0, 0), stage_rank)
            return
        self.watch = Watch(world.rank, world.timeout, world.pulse)
        self.groups = make_groups(mesh, world, stage_rank, (), ())
        self._group = files_group(world)
        self._lock = threading.RLock()
        self.agreed: BaseException | None = None
        """The error that all ranks raised last, each its own."""
        self._stopped = threading.Event()
        if world.rank == 0:
            threading.Thread(target=self._live, name="merak-crew", daemon=True).start()

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
                yield
            except BaseException as error:
                if error is not self.agreed and not isinstance(error, FloatingPointError):
                    self.broken = error
                raise

    def hear(self) -> dict[str, Any]:
        """The next order. Raises PeerError where rank 0 is gone."""
        return json.loads(self._receive(0))

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
        self.agreed = error if error is not None else Void(others)
        raise self.agreed

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
            dist.destroy_process_group(self._group)
            self.groups.close()

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

    def gather(self, mine: State) -> State:
        """On rank 0 everybody's tensors and facts in one; elsewhere an empty one."""
        if self.world.alone:
            return mine
        if self.world.rank:
            head = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in mine.tensors.items()]
            self._send({"tensors": head, "facts": dict(mine.facts)}, to=0)
            for name, tensor in mine.tensors.items():
                with self.watch.waiting(f"rank 0 to take {name}"):
                    dist.send(_raw(tensor.detach().cpu()), 0, group=self._group)
            return State({}, {})
        tensors, facts = dict(mine.tensors), dict(mine.facts)
        for rank in range(1, self.world.size):
            told = json.loads(self._receive(rank))
            for name, dtype, shape in told["tensors"]:
                raw = torch.empty(_size(dtype, shape), dtype=torch.uint8)
                with self.watch.waiting(f"{name} from rank {rank}"):
                    dist.recv(raw, rank, group=self._group)
                tensors.setdefault(name, _typed(raw, dtype, shape))
            facts = _merged(facts, told["facts"])
        return State(tensors, facts)

    def share(self, state: State | None) -> State:
        """What rank 0 has, on every rank."""
        if self.world.alone:
            assert state is not None
            return state
        if self.world.rank == 0:
            assert state is not None
            head = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.tensors.items()]
            self._send({"tensors": head, "facts": dict(state.facts)})
            for tensor in state.tensors.values():
                self._spread(_raw(tensor))
            return state
        told, tensors = json.loads(self._receive(0)), dict[str, Tensor]()
        for name, dtype, shape in told["tensors"]:
            raw = torch.empty(_size(dtype, shape), dtype=torch.uint8)
            self._spread(raw)
            tensors[name] = _typed(raw, dtype, shape)
        return State(tensors, told["facts"])

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _send(self, said: Mapping[str, Any], to: int | None = None) -> None:
        """To one rank, or to all from rank 0."""
        body = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        size = torch.tensor([body.numel()])
        for tensor in (size, body):
            if to is None:
                self._spread(tensor)
            else:
                with self.watch.waiting(f"rank {to} to listen"):
                    dist.send(tensor, to, group=self._group)

    def _receive(self, source: int) -> bytes:
        """From one rank; on another than rank 0 what rank 0 says to all."""
        size = torch.zeros(1, dtype=torch.int64)
        body = torch.zeros(0, dtype=torch.uint8)
        for number in range(2):
            tensor = size if number == 0 else body
            if self.world.rank:
                self._spread(tensor)
            else:
                with self.watch.waiting(f"what rank {source} has to tell"):
                    dist.recv(tensor, source, group=self._group)
            body = torch.empty(int(size), dtype=torch.uint8) if number == 0 else body
        return body.numpy().tobytes()

    def _spread(self, tensor: Tensor) -> None:
        with self.watch.waiting("an order of rank 0" if self.world.rank else "the other ranks to hear an order"):
            dist.broadcast(tensor, 0, group=self._group)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _typed(raw: Tensor, dtype: str, shape: list[int]) -> Tensor:
    return raw.view(getattr(torch, dtype)).reshape(shape)


def _size(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of two ranks: mappings are joined, of all else the first that says something counts."""
    found = dict(other) | {k: v for k, v in one.items() if v not in (None, [], {})}
    both = [k for k in one.keys() & other.keys() if isinstance(one[k], Mapping) and isinstance(other[k], Mapping)]
    return found | {k: _merged(one[k], other[k]) for k in both}
