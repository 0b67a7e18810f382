"""The ranks that have the first part of a half: one of them talks to the edge, and the others do through it.

    edge ◄──► (0,0,0) ──same values──► (0,0,1)      a replica's tensor-parallel ranks take what its first one takes
                 │
                 └──asks, brings── (1,0,0) ──► (1,0,1)      another replica's first one asks for its micro-batches

So codecs and what they remember are in one place, and all micro-batches pass it in their order, whichever replica runs
them. What breaks on the way to the edge is kept there; everybody else gets zeros and goes on.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.mesh import Coord
from merak_like.runtime.groups import Group
from merak_like.runtime.links import Spec
from merak_like.runtime.watch import PeerError
from merak_like.split.crew import Crew
from merak_like.split.enduring import Enduring
from merak_like.split.exchange import Channel, Exchange, Link, Way
from merak_like.split.messages import Task
from merak_like.split.order import dealt
from merak_like.split.pooled import AtCut
from merak_like.split.row import Row
from merak_like.split.spoken import blank, give, given, heard, raw, say, typed


def door(crew: Crew, task: Task, device: torch.device) -> Enduring:
    """What the stages of one of a host's other ranks exchange with the edge, or believe to."""
    mine = dealt(task.micro_batches, crew.coord.dp, crew.mesh.dp)
    if crew.coord.pp:
        return Enduring({}, task.seed, device)
    return Follows(crew, device) if crew.coord.tp else Asks(crew, mine, device)


class Desk(Enduring):
    """Of the rank that talks to the edge, for all replicas."""

    reception: Reception
    """Who does what other replicas ask of this desk; of this one alone unless several steps go side by side."""
    shared: AtCut | None
    """What gradients at the cut become on their way to the edge; None: they stay what they are."""

    def __init__(self, *args: Any, crew: Crew, mine: Sequence[int]) -> None:
        """``mine`` are the micro-batches of a step that this replica runs; all else is an exchange's."""
        super().__init__(*args)
        self.crew, self.mine = crew, mine
        self._done: Counter[tuple[Link, Way]] = Counter()
        """The micro-batches that are through, by what passes."""
        self._through = 0
        """Other replicas that are, with the step."""
        self._change = threading.Condition()
        self._coding = threading.Lock()
        self._gone: PeerError | None = None

    def begin(self, channel: Channel, step: int, samples: Sequence[tuple[int, ...]], *, training: bool = True) -> None:
        """As any exchange, with nothing through yet."""
        super().begin(channel, step, samples, training=training)
        self._done.clear()
        self._through, self.reception, self.shared = 0, Reception((self,)), None

    def put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        """Send when it is this micro-batch's turn."""
        if link == "own":  # a mean of the edges' layers is between two steps, and rank 0's alone
            return Exchange.put(self, link, way, micro_batch, values, specs)
        self._put(link, way, self.mine[micro_batch], values, specs)

    def take(self, link: Link, way: Way, micro_batch: int, specs: Sequence[Spec]) -> dict[str, Tensor]:
        """Receive, and hand on to this replica's tensor-parallel ranks."""
        if link == "own":
            return Exchange.take(self, link, way, micro_batch, specs)
        self.reception.begin()  # with the step's first value: from now on other replicas ask too
        return handed(self.crew, way, specs, self._take(link, way, self.mine[micro_batch], specs), self.device)

    def over(self) -> None:
        """Wait until the other replicas are through. Raises PeerError where one is gone."""
        if self.reception.begun:
            self._until(lambda: self._through == len(self.crew.desks), "a replica is not through")

    def left(self) -> None:
        """Another replica is."""
        with self._change:
            self._through += 1
            self._change.notify_all()

    def lost(self, error: PeerError) -> None:
        """Another replica is gone."""
        with self._change:
            self._gone = error
            self._change.notify_all()

    def _put(self, link: Link, way: Way, number: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        if self.shared is None or not specs or (link, way) != ("up", "backward"):
            return self._send(link, way, number, values, specs)
        if (mean := self.shared.bring(self, number, values)) is not None:
            for desk in self.shared.exchanges:
                assert isinstance(desk, Desk)
                desk._send(link, way, number, mean, specs)

    def _send(self, link: Link, way: Way, number: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        with self._turn(link, way, number):
            super().put(link, way, number, values, specs)

    def _take(self, link: Link, way: Way, number: int, specs: Sequence[Spec]) -> dict[str, Tensor]:
        with self._turn(link, way, number):
            return super().take(link, way, number, specs)

    def _encoded(self, *args: Any) -> bytes:
        with self._coding:
            return super()._encoded(*args)

    def _decoded(self, *args: Any) -> dict[str, Tensor]:
        with self._coding:
            return super()._decoded(*args)

    @contextmanager
    def _turn(self, link: Link, way: Way, number: int) -> Iterator[None]:
        """Both ends code micro-batches in one order, or a sample that is in two of them would be remembered twofold."""
        key: tuple[Link, Way] = (link, way)
        self._until(lambda: self._done[key] >= number, f"micro-batch {number - 1} did not pass ({link}, {way})")
        try:
            yield
        finally:
            with self._change:
                self._done[key] = number + 1
                self._change.notify_all()

    def _until(self, so: Callable[[], bool], else_: str) -> None:
        limit = self.crew.world.timeout.total_seconds()
        with self._change:
            there = self._change.wait_for(lambda: self._gone is not None or so(), limit)
            if self._gone is not None or not there:
                raise self._gone or PeerError(f"{else_} in {limit:.0f} s")


class Reception:
    """Does for other replicas what they ask of some desks, a thread for each replica, until their steps are over."""

    def __init__(self, desks: Sequence[Desk]) -> None:
        self.desks, self.begun = desks, False

    def begin(self) -> None:
        """Be there from now on."""
        if not self.begun:
            self.begun = True
            for desk in self.desks[0].crew.desks.items():
                threading.Thread(target=self._serve, args=desk, name="merak-desk", daemon=True).start()

    def _serve(self, replica: int, group: Group) -> None:
        rank = self.desks[0].crew.mesh.rank(Coord(replica, 0, 0))
        try:
            for _ in self.desks:
                while self._did(heard(rank, group), rank, group):
                    pass
        except RuntimeError as error:
            gone = PeerError(f"replica {replica} (rank {rank}) was lost in the middle of a step: {error}")
            for desk in self.desks:
                desk.lost(gone)

    def _did(self, word: Mapping[str, Any], rank: int, group: Group) -> bool:
        """Do what was asked; False where a step is over by that."""
        desk = self.desks[word["place"]]
        if word["do"] == "over":
            desk.left()
            return False
        link, way, number = word["link"], word["way"], word["number"]
        specs = [Spec(n, tuple(shape), getattr(torch, dtype), grad) for n, shape, dtype, grad in word["specs"]]
        if word["do"] == "put":
            values = {s.name: given(s.dtype, s.shape, rank, group).to(desk.device) for s in specs}
            desk._put(link, way, number, values, specs)
        else:
            found = desk._take(link, way, number, specs)
            for spec in specs:
                give(found[spec.name], rank, group)
        return True


def side_by_side(crew: Crew, desks: Sequence[Desk], sharing: Sequence[Desk]) -> Row:
    """A row of these desks' steps, some of which share their gradients at the cut."""
    reception, at_cut = Reception(desks), AtCut(sharing)
    for desk in desks:
        desk.reception, desk.shared = reception, at_cut if any(desk is one for one in sharing) else None
    return Row(len(desks), crew.breaks, crew.patience)


class Asks(Enduring):
    """Of another replica's first rank."""

    def __init__(self, crew: Crew, mine: Sequence[int], device: torch.device) -> None:
        """``mine`` are the micro-batches of a step that this replica runs."""
        super().__init__({}, 0, device)
        self.crew, self.mine, self.group = crew, mine, crew.desks[crew.coord.dp]

    def put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        """Bring them to the desk."""
        with self.crew.watch.waiting("rank 0 to take what goes to the edge"):
            self._say("put", link, way, micro_batch, specs)
            for spec in specs:
                give(values[spec.name], 0, self.group)

    def take(self, link: Link, way: Way, micro_batch: int, specs: Sequence[Spec]) -> dict[str, Tensor]:
        """Have them from the desk."""
        with self.crew.watch.waiting("what rank 0 has from the edge"):
            self._say("take", link, way, micro_batch, specs)
            found = {spec.name: given(spec.dtype, spec.shape, 0, self.group) for spec in specs}
        return handed(self.crew, way, specs, found, self.device)

    def over(self) -> None:
        """Tell the desk."""
        with self.crew.watch.waiting("rank 0 to hear that a step is over"):
            say({"do": "over", "place": self.place}, 0, self.group)

    def _say(self, do: str, link: Link, way: Way, micro_batch: int, specs: Sequence[Spec]) -> None:
        told = [[s.name, list(s.shape), str(s.dtype).removeprefix("torch."), s.requires_grad] for s in specs]
        said = {"do": do, "place": self.place, "link": link, "way": way, "number": self.mine[micro_batch]}
        say({**said, "specs": told}, 0, self.group)


class Follows(Enduring):
    """Of a tensor-parallel rank beside a replica's first."""

    def __init__(self, crew: Crew, device: torch.device) -> None:
        super().__init__({}, 0, device)
        self.crew = crew

    def put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        """The first one has the same, and sends it."""

    def take(self, link: Link, way: Way, micro_batch: int, specs: Sequence[Spec]) -> dict[str, Tensor]:
        """What the first one has taken."""
        return handed(self.crew, way, specs, None, self.device)


def handed(
    crew: Crew, way: Way, specs: Sequence[Spec], found: Mapping[str, Tensor] | None, device: torch.device
) -> dict[str, Tensor]:
    """What the first of some tensor-parallel ranks found, on all of them."""
    first, made = crew.mesh.rank(crew.coord._replace(tp=0)), dict[str, Tensor]()
    for spec in specs:
        x = None if found is None else found[spec.name].detach()
        if crew.peers is not None:
            row = blank(spec.dtype, spec.shape) if x is None else raw(x)
            with crew.watch.waiting(f"{spec.name} from rank {first}, or its other ranks to take it"):
                dist.broadcast(row, first, group=crew.peers)
            x = typed(row, spec.dtype, spec.shape)
        assert x is not None
        made[spec.name] = x.to(device).requires_grad_(spec.requires_grad and way == "forward")
    return made
