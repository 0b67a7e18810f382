"""All sessions of a host, in memory and on disk: opening, finding and giving them back.

folder/<session>/step-N/     a client's checkpoints; any host that has the folder can go on with them
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from merak_like.partitioner.tracer import trace
from merak_like.runtime.batches import split
from merak_like.split import checkpoint
from merak_like.split.crew import Crew
from merak_like.split.cut import Cut
from merak_like.split.enduring import Enduring
from merak_like.split.exchange import Exchange
from merak_like.split.half import Source
from merak_like.split.halves import halve
from merak_like.split.helper import build_together
from merak_like.split.limits import Ledger, Limits, NoRoom, memory_of
from merak_like.split.messages import Hello, Task
from merak_like.split.narrow import narrow, same
from merak_like.split.outline import blank
from merak_like.split.session import Refused, Session
from merak_like.split.training import Training
from merak_like.split.turn import Turn

UNKNOWN = "There is no such session."
"""For a session of nobody and for one of somebody else alike."""


class Registry:
    """Sessions by id."""

    def __init__(
        self, source: Source, cut: Cut, folder: Path, limits: Limits, turn: Turn, device: torch.device, crew: Crew
    ) -> None:
        self.source, self.cut, self.folder, self.limits = source, cut, folder, limits
        self.turn, self.device, self.crew = turn, device, crew
        self.ledger = Ledger(limits.memory)
        self.live: dict[str, Session] = {}
        self._lock = threading.Lock()

    def open(self, hello: Hello, owner: str) -> Session:
        """The session a client asks for: a new one, one in memory, or one from disk.

        Raises Refused for what this client may not have, NoRoom where the host is full.
        """
        if str(self.cut) != hello.task.cut:
            raise Refused(f"this host serves the cut {self.cut}, not {hello.task.cut}")
        with self._lock:
            if hello.session is None:
                return self._new(hello, owner)
            session = self.live.get(hello.session) or self._from_disk(hello, owner)
        if session.owner != owner:
            raise Refused(UNKNOWN)
        if session.task != hello.task or session.example != hello.example:
            raise Refused("the session was opened with another task or batch: begin a new session for this one")
        return session

    def _new(self, hello: Hello, owner: str) -> Session:
        if hello.step:
            raise Refused("a new session begins at step 0: name the session to go on with")
        self.make_room()
        mine = sum(session.owner == owner for session in self.live.values())
        if mine >= self.limits.sessions_per_client or len(self.live) >= self.limits.sessions:
            raise NoRoom(
                f"{mine} of {self.limits.sessions_per_client} sessions of this client and {len(self.live)} of "
                f"{self.limits.sessions} of this host are open"
            )
        id_ = secrets.token_hex(16)
        session = self._build(id_, hello, owner)
        session.training.save(session.facts())
        return session

    def _from_disk(self, hello: Hello, owner: str) -> Session:
        assert hello.session is not None
        folder = self.folder / hello.session
        steps = checkpoint.whole(folder) if re.fullmatch(r"[0-9a-f]{32}", hello.session) else []
        if not steps:
            raise Refused(UNKNOWN)
        state = checkpoint.load(folder, steps[-1])
        if state.facts.get("owner") != owner:
            raise Refused(UNKNOWN)
        saved = Hello(
            task=Task.model_validate(state.facts["task"], strict=False), example=state.facts["example"],
            digest=hello.digest, probe=hello.probe,
        )  # fmt: skip
        self.make_room()
        if len(self.live) >= self.limits.sessions:
            raise NoRoom(f"{len(self.live)} of {self.limits.sessions} sessions of this host are open")
        session = self._build(hello.session, saved, owner)
        with self.turn.held():
            session.training.restore(state)
        return session

    def _build(self, id_: str, hello: Hello, owner: str) -> Session:
        task, example = hello.task, blank(hello.example)
        try:
            with self.turn.held():  # it traces: two threads cannot at once
                needs = self._needs(hello, example)
            self.ledger.reserve(id_, needs)
            # One rank lets others compute while it waits for its edge; several would lose step.
            kind, away = (Exchange, self.turn.away) if self.crew.world.alone else (Enduring, nullcontext)
            exchange = kind(
                {"up": task.codec, "down": task.back_codec}, task.seed, self.device, away, self.limits.most,
                task.frozen_edge,
            )  # fmt: skip
            order = {"session": id_, "task": task.model_dump(mode="json"), "example": hello.example}
            with self.turn.held(), self.crew.together("open", **order):
                made = build_together(self.source, task, example, exchange, self.device, self.crew)
            training = Training(made, exchange, task.optimizer, self.folder / id_, task.checkpoint_every, self.crew)
            session = Session(id_, owner, hello, training, self.turn, self.crew)
            try:
                self._accept(session, same(made.probe, hello.probe))
            except Refused:
                session.close()  # on the crew's other ranks too
                raise
        except BaseException:
            self.ledger.release(id_)
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

    def _needs(self, hello: Hello, example: Any) -> int:
        """Bytes of a session, from a trace without weights; refuses another model or cut before any are made."""
        model = self.source.build().to("meta") if self.source.weights is not None else self.source.build()
        model.train()
        micro = split(example, hello.task.micro_batches)[0]
        if self.cut.rank is not None and self.source.weights is None:
            narrow(model, micro, self.cut, self.source, skip=hello.task.skip, side="host")
        elif self.cut.rank is not None:
            return sum(p.nbytes for p in model.parameters()) * 4  # an upper bound: the changed layer has fewer
        return memory_of(halve(trace(model, micro, self.source.loss_fn), self.cut), hello.task)

    def make_room(self) -> None:
        """Write sessions that nobody has used for long to disk and give their memory back."""
        for id_, session in list(self.live.items()):
            if time.monotonic() - session.used > self.limits.lease and not session.busy:
                self.put_away(id_)

    def put_away(self, id_: str) -> None:
        """Write one session to disk and give its memory back."""
        session = self.live.pop(id_)
        if session.training.step not in session.training.saved():
            session.training.save(session.facts())
        session.close()
        self.ledger.release(id_)

    def close(self) -> None:
        """Put every session away."""
        with self._lock:
            for id_ in list(self.live) if self.crew.broken is None else ():
                self.put_away(id_)
        self.crew.close()
