"""A host's sessions of generation: keys and values of some blocks, promised before anything is allocated.

A session lasts as long as its connection. Who loses it opens another, here or elsewhere, and sends again what it had
sent: so nothing is written to disk, and memory is given back at once.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from merak_like.runtime.links import Spec
from merak_like.split.blocks.runner import Caches, Runner, bytes_of
from merak_like.split.blocks.shapes import GRAIN, message_bytes, most_tokens, shape_of
from merak_like.split.blocks.words import Ask, Offer, Pass
from merak_like.split.connection import Connection
from merak_like.split.exchange import Exchange
from merak_like.split.limits import Ledger, Limits, NoRoom
from merak_like.split.messages import parse
from merak_like.split.session import Refused
from merak_like.split.turn import Turn
from merak_like.split.wire import WireError


@dataclass(frozen=True)
class Session:
    """One client's keys and values."""

    id: str
    owner: str
    ask: Ask
    caches: Caches


class Rooms:
    """Sessions by id, of a host with blocks ``first <= i < stop``."""

    def __init__(self, runner: Runner, first: int, stop: int, limits: Limits, turn: Turn) -> None:
        """Raises ValueError for blocks that the model does not have."""
        if not 0 <= first < stop <= runner.blocks.count:
            raise ValueError(
                f"blocks {first}:{stop} of a model with {runner.blocks.count}: give FIRST:STOP with "
                f"0 <= FIRST < STOP <= {runner.blocks.count}"
            )
        self.runner, self.first, self.stop = runner, first, stop
        self.limits, self.turn = limits, turn
        runner.load([(first + 1, stop + 1)])
        self.prints = tuple(runner.print_of(block) for block in range(first, stop))
        self.ledger = Ledger(limits.memory)
        self.live: dict[str, Session] = {}
        self._lock = threading.Lock()

    def offer(self, session: str | None = None) -> Offer:
        """What there is now."""
        rooms = self.runner.blocks.rooms[self.first : self.stop]
        return Offer(
            first=self.first, stop=self.stop, prints=self.prints, left=max(0, self.ledger.most - self.ledger.held),
            token=sum(room.token_bytes for room in rooms), session=session,
        )  # fmt: skip

    def admit(self, session: Session, connection: Connection) -> None:
        """Let this session's values come, from before its welcome on: the first may follow at once."""
        connection.micro_batches = 1
        connection.assembler.largest = message_bytes(len(session.ask.pads), self.runner.blocks.largest)
        connection.room = 2 * connection.assembler.largest

    @contextmanager
    def opened(self, ask: Ask, owner: str) -> Iterator[Session]:
        """A session for as long as this lasts. Raises Refused for what cannot be, NoRoom for what cannot be now."""
        self._check(ask)
        id_ = secrets.token_hex(16)
        with self._lock:
            mine = sum(session.owner == owner for session in self.live.values())
            if mine >= self.limits.sessions_per_client or len(self.live) >= self.limits.sessions:
                raise NoRoom(
                    f"{mine} of {self.limits.sessions_per_client} sessions of this client and {len(self.live)} of "
                    f"{self.limits.sessions} of this host are open"
                )
            self._reserve(id_, ask)
        try:
            rooms = {i: self.runner.blocks.rooms[i] for i in range(ask.first, ask.stop)}
            session = Session(id_, owner, ask, Caches(rooms, len(ask.pads), ask.length, self.runner.device))
            self.live[id_] = session
            yield session
        finally:
            self.live.pop(id_, None)
            self.ledger.release(id_)

    def _check(self, ask: Ask) -> None:
        if ask.digest != self.runner.blocks.digest:
            raise Refused("this host serves another model, or other releases of torch and transformers")
        if not self.first <= ask.first < ask.stop <= self.stop:
            raise Refused(f"this host serves blocks {self.first}:{self.stop}, not {ask.first}:{ask.stop}")
        most = self.runner.cached.longest
        if not 0 < ask.length <= (most or 2**20) or max(ask.pads) >= ask.length:
            raise Refused(f"texts of {ask.length} tokens do not fit: at most {most or 2**20} do")
        largest = message_bytes(len(ask.pads), self.runner.blocks.largest)
        if largest > self.limits.message:
            raise Refused(
                f"a pass of {len(ask.pads)} samples can be a message of {largest} bytes, "
                f"{self.limits.message} are allowed: use fewer samples"
            )

    def _reserve(self, id_: str, ask: Ask) -> None:
        rooms = self.runner.blocks.rooms[ask.first : ask.stop]
        needs, left = bytes_of(rooms, len(ask.pads), ask.length), self.ledger.most - self.ledger.held
        if needs > left:
            token = bytes_of(rooms, 1, 1) // GRAIN
            fits = [f"{n} x {most} tokens" for n in sorted({len(ask.pads), 1}, reverse=True)
                    if (most := left // (token * n) // GRAIN * GRAIN)]  # fmt: skip
            raise NoRoom(
                f"keys and values of {len(ask.pads)} x {ask.length} tokens in blocks {ask.first}:{ask.stop} take "
                f"{needs} bytes, {left} are left: {' or '.join(fits) or 'nothing'} would fit"
            )
        self.ledger.reserve(id_, needs)

    def serve(
        self, session: Session, connection: Connection, stop: Callable[[], bool], told: Callable[[int], None]
    ) -> None:
        """Run passes until the connection ends, nobody asks for long, or ``stop`` says so between two."""
        ask = session.ask
        exchange = Exchange(
            {"up": ask.codec, "down": ask.back_codec}, 0, self.runner.device, self.turn.away, self.limits.most, True
        )
        idle, due = 0.0, 0
        while not stop():
            if (found := connection.begun(WAIT)) is None:
                idle += WAIT
                if idle > self.limits.lease:
                    raise NoRoom(f"nothing was asked for {idle:.0f} s: the session is over, open another")
                continue
            key, body = found
            idle = 0.0
            asked = parse(Pass, body)
            # What comes again is written again; a gap would be read as zeros.
            behind = asked.start + asked.tokens
            if asked.start > due or behind > ask.length or asked.tokens > most_tokens(len(ask.pads)):
                raise WireError(f"a pass of tokens {asked.start} to {behind}, {due} of {ask.length} were before")
            exchange.begin(connection, key.step, [()], training=False)
            with self.turn.held():
                self._pass(session, connection, exchange, asked)
            due = behind
            told(asked.tokens * len(ask.pads))

    def _pass(self, session: Session, connection: Connection, exchange: Exchange, asked: Pass) -> None:
        ask, runner = session.ask, self.runner
        shape = shape_of(len(ask.pads), asked.start, asked.tokens, ask.length)
        its = runner.ends(shape, ask.first + 1, ask.stop + 1)
        came = exchange.take("up", "forward", 0, real(its.sent, asked.tokens))
        made = runner.run((ask.first + 1, ask.stop + 1), session.caches, ask.pads, ask.length, asked.start, came)
        connection.ended()  # before the answer, which the next pass may follow at once
        back = real(its.returned, asked.tokens)
        exchange.put("down", "forward", 0, {spec.name: made[spec.name] for spec in back}, back)

    def close(self) -> None:
        """Nothing is kept: clients go on elsewhere with what they have."""


WAIT = 0.25
"""Seconds between two looks at whether the host shall stop."""


def real(specs: Sequence[Spec], tokens: int) -> list[Spec]:
    """As the values travel: without what is filled up."""
    return [Spec(s.name, (s.shape[0], tokens, *s.shape[2:]), s.dtype, False) for s in specs]


def by_place(specs: Sequence[Spec], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Values in the order of their specs: traces of other shapes name the same value otherwise."""
    return {spec.name: x for spec, x in zip(specs, values, strict=True)}
