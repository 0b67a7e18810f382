"""The host: listens, finds out who is there, and trains the cloud's half of each session.

asyncio thread   accepts, TLS, reads and writes frames
a thread for each connection   opens its session, runs its engine's steps when it is their turn
"""

from __future__ import annotations

import asyncio
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from merak_like.runtime.initialize import World
from merak_like.split.commons import Commons
from merak_like.split.connection import Connection, Lost, Told
from merak_like.split.crew import Crew
from merak_like.split.cut import Cut
from merak_like.split.group import Group
from merak_like.split.groups import GroupText
from merak_like.split.half import Source
from merak_like.split.limits import Limits, NoRoom
from merak_like.split.messages import Failed, Hello, Welcome, parse
from merak_like.split.metrics import Audit, Metrics
from merak_like.split.registry import Registry
from merak_like.split.rounds import Busy
from merak_like.split.session import Refused
from merak_like.split.status import serve_status
from merak_like.split.tls import REFUSED, Keys, address, identity, require_safe
from merak_like.split.transport import place, transport
from merak_like.split.turn import Turn
from merak_like.split.wire import FROM_EDGE, Key, Kind, WireError, frames


class Host:
    """Serves the cloud's half of one model, cut at one place: a half for each client, or for a group of them."""

    def __init__(
        self, source: Source, cut: str, *, listen: str, folder: str | Path, keys: Keys | None = None,
        insecure: bool = False, limits: Limits | None = None, status: str | None = None,
        device: torch.device | str = "cpu", crew: Crew | None = None, groups: Mapping[str, GroupText] | None = None,
    ) -> None:  # fmt: skip
        """``listen`` is HOST:PORT, or grpc://HOST:PORT. ``folder`` keeps sessions and the audit log. ``status`` is
        HOST:PORT for /healthz and /metrics. ``groups`` are those of clients that train one half together, by name.
        ``crew`` are the ranks that share the cloud's half, of which this is the first; the others run ``Helper``.

        Raises ValueError for a cut that is none, for an address beyond this machine without keys, and for groups that
        cannot be.
        """
        self.limits, self.keys = limits or Limits(), keys
        self.place = place(listen)
        require_safe(self.place.host, keys, insecure)
        self._transport = transport(self.place.scheme, keys, server=True)
        here = torch.device(device)
        self.crew = crew or Crew(World(0, 1, here, timedelta(seconds=600)))
        self._check(groups or {})
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics, self.audit = Metrics(), Audit(self.folder / "audit.jsonl")
        self.turn = Turn(here)
        self.draining = threading.Event()
        self.registry = self._sessions(source, cut, groups or {})
        self.port = 0
        """The port in use, once it listens."""
        self.status_port = 0
        self._status = status
        self._open: Counter[str] = Counter()
        self._now: set[Connection] = set()
        self._pool = ThreadPoolExecutor(self.limits.connections, "merak-session")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def _check(self, groups: Mapping[str, GroupText]) -> None:
        if groups and self.keys is None:
            raise ValueError("a group knows its members by their certificates: give the host keys (`merak keys init`)")
        for name, text in groups.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
                raise ValueError(f"a group's name is letters, digits, _ and -, found {name!r}")
            if text.wait > self.limits.waits.step:
                raise ValueError(
                    f"group {name} waits {text.wait:.0f} s, but edges wait {self.limits.waits.step:.0f} s for an answer"
                )

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> Host:
        """Listen in a thread; returns when it does."""
        self._thread = threading.Thread(target=self._main, name="merak-host", daemon=True)
        self._thread.start()
        self._listening.wait(30)
        if self._failed is not None:
            raise self._failed
        return self

    def run(self, ready: Callable[[Host], None] = lambda host: None) -> None:
        """Listen until ``drain`` was called and has ended."""
        self.start()
        ready(self)
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(0.2)  # in slices, so that signals are heard
        if self.crew.broken is not None:
            raise RuntimeError("the host's ranks fell out of step: sessions go on from their checkpoints") from (
                self.crew.broken
            )

    def drain(self) -> None:
        """Take no more clients, let steps under way end, write every session to disk, and stop."""
        self.draining.set()

    def close(self) -> None:
        """Drain and wait for the end."""
        self.drain()
        if self._thread is not None:
            self._thread.join(60)

    def __enter__(self) -> Host:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failed = error
            self._listening.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        door = await self._transport.listen(
            self.place.host, self.place.port, self._accept, hello=self.limits.waits.hello, most=self.limits.connections
        )
        self.port = door.port
        status = await serve_status(address(self._status), self._text, self.draining) if self._status else None
        self.status_port = status.sockets[0].getsockname()[1] if status else 0
        self._listening.set()
        while not self.draining.is_set() and self.crew.broken is None:
            await asyncio.sleep(0.05)
            self.metrics.set("merak_sessions", len(self.registry.live))
            self.metrics.set("merak_connections", len(self._now))
            self.metrics.set("merak_reserved_bytes", self.registry.ledger.held)
        self.draining.set()
        door.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.waits.step):
                while self._now:
                    await asyncio.sleep(0.02)
        for connection in list(self._now):
            connection.close()
        await self._loop.run_in_executor(None, self.registry.close)
        await door.ended()
        if status is not None:
            status.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.audit.note("stopped")
        self.audit.close()

    def _text(self) -> str:
        return self.metrics.text(list(self.turn.waited), self.turn.turns, self.turn.seconds)

    # --- one connection -----------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = str((writer.get_extra_info("peername") or ("?",))[0])
        try:
            owner = identity(writer.get_extra_info("ssl_object"), self.keys) if self.keys is not None else "anyone"
        except PermissionError:
            self.metrics.add("merak_refused_total", label='why="certificate"')
            self.audit.note("refused", peer=peer, why="certificate")
            told = Failed(code="refused", message=REFUSED).body()
            writer.writelines(frames(Key(Kind.ERROR), told))
            writer.close()
            return
        full = len(self._now) >= self.limits.connections or self._open[owner] >= self.limits.connections_per_client
        if full or self.draining.is_set():
            self.metrics.add("merak_refused_total", label='why="connections"')
            writer.close()
            return
        connection = Connection(reader, writer, FROM_EDGE, self.limits.waits, rate=self.limits.rate)
        self._now.add(connection)
        self._open[owner] += 1
        assert self._loop is not None
        try:
            await self._loop.run_in_executor(self._pool, self._talk, connection, owner, peer)
        finally:
            connection.close()
            await connection.wait_closed()
            self._now.discard(connection)
            self._open[owner] -= 1
            for way in ("sent", "received"):
                self.metrics.add("merak_bytes_total", connection.bytes[way], f'way="{way}"')

    def _talk(self, connection: Connection, owner: str, peer: str) -> None:
        facts: dict[str, Any] = {"owner": owner, "peer": peer}
        end = "closed"
        try:
            self._converse(connection, owner, facts)
            connection.send(Key(Kind.BYE), b"")
            connection.flush(5.0)
            end = "drained"
        except Lost as error:
            end = str(error)
        except Told as error:
            end = f"the edge said: {error}"
        except Exception as error:
            end = f"{type(error).__name__}: {error}"[:500]
            self._tell(connection, error)
        finally:
            self.audit.note("ended", why=end, **{w: connection.bytes[w] for w in ("sent", "received")}, **facts)

    def _sessions(self, source: Source, cut: str, groups: Mapping[str, GroupText]) -> Registry:
        """What is behind the door; another kind of host has other sessions."""
        crew = self.crew
        commons = Commons(source, crew, self.turn.device)
        known = {
            name: Group(
                name, text, self.folder / "groups" / name, self.turn, self.audit.note, self.draining.is_set, commons
            )
            for name, text in groups.items()
        }
        return Registry(
            source, Cut.parse(cut), self.folder / "sessions", self.limits, self.turn, self.turn.device, crew, known
        )

    def _converse(self, connection: Connection, owner: str, facts: dict[str, Any]) -> None:
        """A session, from its opening until this connection's part in it is over."""
        hello = parse(Hello, connection.receive(Key(Kind.HELLO), self.limits.waits.hello))
        session = self.registry.open(hello, owner)
        facts["session"] = session.id
        with session.taken_over(connection):
            step = session.agree(hello.step, hello.saved)
            self.audit.note("opened", step=step, **facts)
            heard = session.hearing is None or hello.step < step or session.hearing.hears(step)
            welcome = Welcome(
                session=session.id, step=step, largest=session.largest, owes=bool(session.owes), heard=heard
            )
            connection.send(Key(Kind.WELCOME), welcome.body())
            session.serve(connection, self.draining.is_set, self.metrics)

    def _tell(self, connection: Connection, error: Exception) -> None:
        """Say why, as far as it is the client's business."""
        table: tuple[tuple[type[Exception], str, float], ...] = (
            (NoRoom, "busy", 10.0), (Busy, "busy", 0.2), (Refused, "refused", 0.0), (WireError, "bad", 0.0),
            (ValueError, "bad", 0.0), (FloatingPointError, "not-finite", 0.0),
        )  # fmt: skip
        code, after = next(((c, a) for kind, c, a in table if isinstance(error, kind)), ("internal", 0.0))
        self.metrics.add("merak_refused_total", label=f'why="{code}"')
        if code == "internal":
            traceback.print_exception(error)
        told = str(error)[:2000] if code != "internal" else "the host failed; its log says why"
        with suppress(Lost, Told, WireError):
            connection.send(Key(Kind.ERROR), Failed(code=code, message=told or REFUSED, after=after).body())  # type: ignore[arg-type]
            connection.flush(5.0)
