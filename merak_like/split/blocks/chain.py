"""The hosts that a text goes through, and what takes their place when one is lost.

    client ── values ──► host 0     blocks 0:4   keys and values there
           ◄─ values ───
           ── values ──► host 1     blocks 4:8
           ◄─ values ───

What was sent to a host is kept here. Who takes its place is sent all of it again, and so has the same keys and values.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merak_like.runtime.links import Spec
from merak_like.split.blocks.rooms import by_place, real
from merak_like.split.blocks.route import Leg, route
from merak_like.split.blocks.runner import Runner
from merak_like.split.blocks.shapes import chunks, message_bytes, shape_of
from merak_like.split.blocks.words import Ask, Offer, Pass
from merak_like.split.connection import Connection, Lost, Told
from merak_like.split.dialler import Dialler
from merak_like.split.exchange import Exchange
from merak_like.split.messages import parse
from merak_like.split.wire import Key, Kind, WireError

LONGEST_BAN = 15.0
"""Seconds that a host which failed again and again is left alone."""


@dataclass
class Hop:
    """One host's part: its session, and all that was sent to it."""

    leg: Leg
    connection: Connection
    exchange: Exchange
    history: list[tuple[Tensor, ...]] = field(default_factory=list)
    """Of each pass the values sent, by place."""
    steps: int = 0


class Chain:
    """Sessions for one set of texts on the hosts that together have the blocks."""

    def __init__(
        self, runner: Runner, dialler: Dialler, blocks: tuple[int, int], ask: Ask, *, patience: float,
        prints: dict[int, str],
    ) -> None:  # fmt: skip
        """``ask`` has samples and length. ``prints`` are known fingerprints of blocks; those first seen are added.

        Raises ValueError where no hosts have the blocks, or none has room.
        """
        self.runner, self.dialler, self.ask, self.patience = runner, dialler, ask, patience
        self.prints = prints
        self.bytes: Counter[str] = Counter()
        self.replaced: list[str] = []
        """Why hosts were replaced, in order."""
        self._banned: dict[int, tuple[float, float]] = {}
        """Host -> until when it is left alone, and for how long."""
        self._why: dict[int, str] = {}
        self.hops: list[Hop] = []
        self.hops = self._found(*blocks, [])

    def run(self, start: int, values: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """One pass through all blocks: everything known before and made on the way, by name in this pass's trace."""
        known = dict(values)
        at = 0
        while at < len(self.hops):
            hop = self.hops[at]
            try:
                known |= self._through(hop, start, known, tokens)
            except (Lost, Told, WireError) as error:
                _raise_if_ours(error)
                self.replaced.append(f"{self._name(hop.leg.host)}: {error}")
                self._ban(hop.leg.host, str(error))
                self._let_go(hop)
                self.hops[at : at + 1] = self._found(hop.leg.first, hop.leg.stop, hop.history)
                continue
            at += 1
        return known

    def close(self) -> None:
        """End all sessions."""
        for hop in self.hops:
            self._let_go(hop)

    # --- one host -----------------------------------------------------------------------------------------------------

    def _through(self, hop: Hop, start: int, known: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """What a host makes of a pass, by name. Raises Lost, Told, or WireError for an answer that is none."""
        sent, returned = (real(specs, tokens) for specs in self._ends(hop.leg, start, tokens))
        key = Key(Kind.BEGIN, hop.steps)
        hop.connection.expect(key)
        hop.connection.send(key, Pass(start=start, tokens=tokens).body())
        hop.exchange.begin(hop.connection, hop.steps, [()], training=False)
        hop.exchange.put("up", "forward", 0, known, sent)
        try:
            found = hop.exchange.take("down", "forward", 0, returned)
        except FloatingPointError as error:
            raise WireError(str(error)) from None
        hop.steps += 1
        hop.history.append(tuple(known[spec.name] for spec in sent))
        self._count(hop.connection)
        return found

    def _ends(self, leg: Leg, start: int, tokens: int) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
        shape = shape_of(len(self.ask.pads), start, tokens, self.ask.length)
        its = self.runner.ends(shape, leg.first + 1, leg.stop + 1)
        return its.sent, its.returned

    def _open(self, leg: Leg) -> Hop:
        asked = self.ask.model_copy(update={"first": leg.first, "stop": leg.stop})
        connection = self.dialler.dial(leg.host)
        try:
            self._said(connection, asked)
        except BaseException:
            connection.close()
            raise
        most = message_bytes(len(self.ask.pads), self.runner.blocks.largest)
        connection.assembler.largest, connection.room, connection.micro_batches = most, 2 * most, 1
        codecs = {"up": self.ask.codec, "down": self.ask.back_codec}
        return Hop(leg, connection, Exchange(codecs, 0, torch.device("cpu"), frozen=True))  # type: ignore[arg-type]

    def _said(self, connection: Connection, ask: Ask) -> Offer:
        connection.send(Key(Kind.HELLO), ask.body())
        return parse(Offer, connection.receive(Key(Kind.WELCOME), 4 * self.dialler.waits.hello))

    # --- all hosts ----------------------------------------------------------------------------------------------------

    def _found(self, first: int, stop: int, history: Sequence[tuple[Tensor, ...]]) -> list[Hop]:
        """Hosts for these blocks that have seen what was sent for them before.

        Raises Lost after ``patience`` without, ValueError or PermissionError for what hosts refuse.
        """
        end, pause, given = time.monotonic() + self.patience, 0.05, _whole(history)
        while True:
            offers, hops, at = self._looked(), list[Hop](), -1
            try:
                for leg in route(first, stop, {host: (o.first, o.stop) for host, o in offers.items()}):
                    at = leg.host
                    hops.append(self._open(leg))
                for start, behind in chunks(len(self.ask.pads), given[0].shape[1]) if given else ():
                    known = by_place(
                        self._ends(Leg(-1, first, stop), start, behind - start)[0], [x[:, start:behind] for x in given]
                    )
                    for hop in hops:
                        at = hop.leg.host
                        known |= self._through(hop, start, known, behind - start)
                return hops
            except (Lost, Told, WireError, PermissionError, ValueError) as error:
                for hop in hops:
                    self._let_go(hop)
                if at >= 0:
                    _raise_if_ours(error)
                    self._ban(at, str(error))
                if time.monotonic() > end:
                    raise Lost(self._told(first, stop, error)) from None
            time.sleep(pause)
            pause = min(2.0, 2 * pause)

    def _looked(self) -> dict[int, Offer]:
        """What each host has that is not left alone, and has the same weights as those before it."""
        offers: dict[int, Offer] = {}
        for host in range(len(self.dialler.hosts)):
            if time.monotonic() < self._banned.get(host, (0.0, 0.0))[0]:
                continue
            try:
                connection = self.dialler.dial(host)
                try:
                    offer = self._said(connection, Ask(digest=self.ask.digest))
                finally:
                    self._count(connection)
                    connection.close()
            except (Lost, Told, WireError, PermissionError) as error:
                self._ban(host, str(error))
                continue
            seen = dict(zip(range(offer.first, offer.stop), offer.prints, strict=False))
            if other := [block for block, mark in seen.items() if self.prints.get(block, mark) != mark]:
                self._why[host] = f"its weights of block {other[0]} are not those of the other hosts"
                continue
            self.prints.update(seen)
            offers[host] = offer
        return offers

    def _ban(self, host: int, why: str) -> None:
        pause = min(LONGEST_BAN, 2 * self._banned.get(host, (0.0, 0.25))[1])
        self._banned[host] = time.monotonic() + pause, pause
        self._why[host] = why

    def _told(self, first: int, stop: int, error: Exception) -> str:
        hosts = "; ".join(f"{self._name(host)}: {why}" for host, why in self._why.items())
        return f"no hosts for blocks {first}:{stop} in {self.patience:.0f} s: {error}" + (
            f" ({hosts})" if hosts else ""
        )

    def _name(self, host: int) -> str:
        return str(self.dialler.hosts[host])

    def _let_go(self, hop: Hop) -> None:
        self._count(hop.connection)
        hop.connection.close()

    def _count(self, connection: Connection) -> None:
        self.bytes.update(connection.bytes)
        connection.bytes.clear()


def _raise_if_ours(error: Exception) -> None:
    """What a host refuses because of what it was asked, no other host will do."""
    if isinstance(error, Told) and error.failed.code in ("refused", "bad"):
        kind = PermissionError if "Authentication" in str(error) else ValueError
        raise kind(f"the host refuses: {error}") from None


def _whole(history: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The values of all passes, one behind the other by tokens."""
    return [torch.cat(parts, 1) for parts in zip(*history, strict=True)]
