"""All sessions of a host, in memory and on disk: opening, finding and giving them back.

folder/<session>/step-N/     a client's checkpoints; any host that has the folder can go on with them
groups/<group>/step-N/       a group's, with all its sessions
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from merak_like.partitioner.tracer import trace
from merak_like.runtime.batches import split
from merak_like.split import checkpoint
from merak_like.split.adapters import bytes_of
from merak_like.split.checkpoint import State
from merak_like.split.crew import Crew
from merak_like.split.cut import Cut
from merak_like.split.doors import Desk
from merak_like.split.exchange import Exchange
from merak_like.split.group import Group
from merak_like.split.half import Source
from merak_like.split.halves import halve
from merak_like.split.helper import own_half
from merak_like.split.joined import Pool
from merak_like.split.layers import layers_of
from merak_like.split.limits import Ledger, Limits, NoRoom, memory_of, weights_of
from merak_like.split.membership import require_fitting
from merak_like.split.messages import Hello, Task
from merak_like.split.narrow import narrow, same
from merak_like.split.order import dealt
from merak_like.split.outline import blank
from merak_like.split.pooled import Pooled
from merak_like.split.rounds import Busy
from merak_like.split.session import Refused, Session
from merak_like.split.training import Training
from merak_like.split.trunk import Trunk
from merak_like.split.turn import Turn

UNKNOWN = "There is no such session."
"""For a session of nobody and for one of somebody else alike."""
TRUNK = "trunk"
"""The frozen weights, in the ledger."""
NO_GROUP = "There is no such group."
"""For a group that is none and for one that this client may not join alike."""


class Registry:
    """Sessions by id."""

    def __init__(
        self, source: Source, cut: Cut, folder: Path, limits: Limits, turn: Turn, device: torch.device, crew: Crew,
        groups: Mapping[str, Group],
    ) -> None:  # fmt: skip
        self.groups = groups
        self.source, self.cut, self.folder, self.limits = source, cut, folder, limits
        self.turn, self.device, self.crew = turn, device, crew
        self.ledger = Ledger(limits.memory)
        self.trunk = Trunk(source, crew, device, Pool(turn, limits.together) if limits.together > 1 else None)
        self.live: dict[str, Session] = {}
        self._lock = threading.Lock()

    def open(self, hello: Hello, owner: str) -> Session:
        """The session a client asks for: a new one, one in memory, or one from disk.

        Raises Refused for what this client may not have, NoRoom where the host is full.
        """
        if str(self.cut) != hello.task.cut:
            raise Refused(f"this host serves the cut {self.cut}, not {hello.task.cut}")
        if hello.task.local is not None and hello.task.group is None:
            raise Refused("an edge that learns at home is heard by a group whose mode is chosen: name one")
        if hello.task.lora is not None and hello.task.group is not None:
            raise Refused("adapters are trained by a session of its own: leave group away")
        if hello.task.micro_batches % (replicas := self.crew.mesh.dp):
            raise Refused(
                f"this host deals micro-batches out to {replicas} replicas: say micro_batches: "
                f"{-(-hello.task.micro_batches // replicas) * replicas}, not {hello.task.micro_batches}"
            )
        with self._lock:  # sessions of a group come and go in it
            group = None if hello.task.group is None else self._group(hello.task, owner)
            if hello.session is None:
                return self._new(hello, owner, group)
            known = self.live.get(hello.session)
            session = known or self._from_disk(hello, owner, group)
        if session.owner != owner:
            raise Refused(UNKNOWN)
        if session.task != hello.task or session.example != hello.example:
            raise Refused("the session was opened with another task or batch: begin a new session for this one")
        return session

    def _group(self, task: Task, owner: str) -> Group:
        group = self.groups.get(task.group or "")
        if group is None or owner not in group.text.members:
            raise Refused(NO_GROUP)
        require_fitting(task, owner, group)
        return group

    def _new(self, hello: Hello, owner: str, group: Group | None) -> Session:
        begins = hello.task.local.alone if hello.task.local is not None else 0
        if hello.step != begins:
            raise Refused(f"a new session begins at step {begins}: name the session to go on with")
        if group is not None:  # a member that begins anew has one place, as before
            for session in [s for s in group.live.values() if s.owner == owner]:
                if session.busy:
                    raise Busy(f"the session of {owner} before this one is at work in group {group.name}: try again")
                self.drop(session.id)
        self.make_room()
        mine = sum(session.owner == owner for session in self.live.values())
        if mine >= self.limits.sessions_per_client or len(self.live) >= self.limits.sessions:
            raise NoRoom(
                f"{mine} of {self.limits.sessions_per_client} sessions of this client and {len(self.live)} of "
                f"{self.limits.sessions} of this host are open"
            )
        id_ = secrets.token_hex(16)
        session = self._build(id_, hello, owner, group)
        if group is not None:
            group.join(session)
        else:
            session.training.save(session.facts())
        return session

    def _from_disk(self, hello: Hello, owner: str, group: Group | None) -> Session:
        assert hello.session is not None
        state = self._saved(hello.session) if group is None else group.known(hello.session)
        if state is None or state.facts.get("owner") != owner:
            raise Refused(UNKNOWN)
        saved = Hello(
            task=Task.model_validate(state.facts["task"], strict=False), example=state.facts["example"],
            digest=hello.digest, probe=hello.probe,
        )  # fmt: skip
        self.make_room()
        if len(self.live) >= self.limits.sessions:
            raise NoRoom(f"{len(self.live)} of {self.limits.sessions} sessions of this host are open")
        session = self._build(hello.session, saved, owner, group)
        try:
            if group is not None:
                group.join(session)
            else:
                with self.turn.held():
                    session.training.restore(state)
        except BaseException:  # a half that is not where its client left it must not stay
            self.drop(session.id)
            raise
        return session

    def _saved(self, id_: str) -> State | None:
        folder = self.folder / id_
        steps = checkpoint.whole(folder) if re.fullmatch(r"[0-9a-f]{32}", id_) else []
        return checkpoint.load(folder, steps[-1]) if steps else None

    def _build(self, id_: str, hello: Hello, owner: str, group: Group | None) -> Session:
        task, example = hello.task, blank(hello.example)
        try:
            with self.turn.held():
                once, needs = self._needs(hello, example, group)
            if group is not None and group.common is None:
                self.ledger.reserve(f"group {group.name}", once)
            if task.lora is not None and self.trunk.weights is None:
                self.ledger.reserve(TRUNK, once)
            self.ledger.reserve(id_, needs)
            # One rank lets others compute while it waits for its edge; several would lose step.
            kind, away = Exchange, self.turn.away
            if not self.crew.world.alone:
                mine = dealt(task.micro_batches, 0, self.crew.mesh.dp)
                kind, away = partial(Desk, crew=self.crew, mine=mine), nullcontext
            elif group is not None and group.text.phi:
                kind = Pooled
            exchange = kind(
                {"up": task.codec, "down": task.back_codec}, task.seed, self.device, away, self.limits.most,
                task.frozen_edge,
            )  # fmt: skip
            text = None if group is None else group.text.model_dump(mode="json")
            order = {"session": id_, "task": task.model_dump(mode="json"), "example": hello.example}
            order |= {"group": text, "member": owner}
            with self.turn.held(), self.crew.together("open", **order):
                if task.lora is not None:
                    build = partial(self.trunk.build, task, example, exchange)
                elif group is None:
                    build = partial(own_half, self.source, task, example, exchange, self.device, self.crew)
                else:
                    build = partial(group.commons.build, group.name, group.text, task, example, exchange)
                made = self.crew.each(build)
            training = Training(made, exchange, task.optimizer, self.folder / id_, task.checkpoint_every, self.crew)
            session = Session(id_, owner, hello, training, self.turn, self.crew, group)
            try:
                self._accept(session, same(made.probe, hello.probe))
                if group is not None:
                    group.wake()
            except ValueError:
                session.close()  # on the crew's other ranks too
                raise
        except BaseException:
            self.ledger.release(id_)
            if group is not None and group.common is None:
                self.ledger.release(f"group {group.name}")
            if task.lora is not None and self.trunk.weights is None:
                self.ledger.release(TRUNK)
            raise
        self.live[id_] = session
        return session

    def _accept(self, session: Session, alike: bool) -> None:
        if not alike:
            raise Refused(
                "edge and host factored the changed layer differently: change the model once, save it, and give "
                "both sides that checkpoint"
            )
        if session.largest > self.limits.message:
            raise Refused(
                f"a message of this session can take {session.largest} bytes, {self.limits.message} are allowed: "
                "use smaller micro-batches"
            )

    def _needs(self, hello: Hello, example: Any, group: Group | None) -> tuple[int, int]:
        """Bytes of a group or the trunk, and of a session, from a trace without weights.

        Refuses another model or cut before any weights are made.
        """
        lora, copies = hello.task.lora, 4 if group is None else 6 if group.text.mode == "chosen" else 1
        model = self.source.build().to("meta") if self.source.weights is not None else self.source.build()
        model.train()
        micro = split(example, hello.task.micro_batches)[0]
        if self.cut.rank is not None and self.source.weights is None:
            narrow(model, micro, self.cut, self.source, hello.task, "host")
        elif self.cut.rank is not None:
            whole = sum(p.nbytes for p in model.parameters())  # an upper bound: the changed layer has fewer
            return whole * 3, whole * copies
        halves = halve(trace(model, micro, self.source.loss_fn), self.cut)
        if lora is not None:
            return weights_of(halves), 4 * bytes_of(halves, model, lora) + memory_of(halves, hello.task, copies=0)
        mean = layers_of(halves).nbytes if hello.task.average_edges else 0
        return 3 * weights_of(halves) + mean, memory_of(halves, hello.task, copies=copies)

    def make_room(self) -> None:
        """Write sessions that nobody has used for long to disk and give their memory back."""
        for id_, session in list(self.live.items()):
            if time.monotonic() - session.used > self.limits.lease and not session.busy:
                self.put_away(id_)

    def put_away(self, id_: str) -> None:
        """Write one session to disk and give its memory back."""
        session = self.live[id_]
        if session.group is not None:
            session.group.rest(session)
        elif session.training.step not in session.training.saved():
            session.training.save(session.facts())
        self.drop(id_)

    def drop(self, id_: str) -> None:
        """Let go of a session as it is in memory."""
        session = self.live.pop(id_)
        if session.group is not None:
            session.group.leave(session)
        session.close()
        self.ledger.release(id_)

    def close(self) -> None:
        """Put every session away."""
        with self._lock:
            for id_ in list(self.live) if self.crew.broken is None else ():
                self.put_away(id_)
            for group in self.groups.values() if self.crew.broken is None else ():
                group.close()
        self.crew.close()
