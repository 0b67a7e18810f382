"""One connection: an asyncio stream whose messages threads send and wait for.

    engine's thread   send ─► outbox ─► writer's task ─► socket          at most `window` bytes wait in the outbox
                      receive ◄─ inbox ◄─ reader's task ◄─ socket        at most `room` bytes wait in the inbox

Every wait has a limit and says what it waits for. Whatever comes that may not come ends the connection.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from merak_like.split.messages import Failed, parse
from merak_like.split.wire import BEGINNINGS, CHUNK, HEADER, Assembler, Key, Kind, WireError, frames, wire_bytes


class Lost(ConnectionError):
    """The connection is gone, or nothing came in time. The session is not: connect again."""


class Told(RuntimeError):
    """The other end said why it stops."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


@dataclass(frozen=True)
class Waits:
    """Seconds that things may take."""

    hello: float = 10.0
    """Until the other end has said who it is."""
    idle: float = 60.0
    """Without a byte, pings included: then the other end is gone, whatever the socket says."""
    step: float = 600.0
    """For one message of a step."""
    drain: float = 120.0
    """For the other end to take a frame."""


class Connection:
    """Messages over one stream. Made inside its event loop; ``send`` and ``receive`` are for other threads."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowed: frozenset[Kind], waits: Waits,
        *, window: int = 8 * CHUNK, rate: float = 0.0,
    ) -> None:  # fmt: skip
        """``rate`` limits received bytes per second; 0: it does not."""
        self.waits, self.window, self.rate = waits, window, rate
        self.assembler = Assembler(allowed)
        self.room = 0
        """Most bytes of tensors that may wait here to be used."""
        self.micro_batches = 0
        self.pieces = 0
        """Of an edge's own layers; 0: they are not taken here."""
        self.bytes: Counter[str] = Counter()
        """"sent" and "received", headers included."""
        self.by_kind: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self._reader, self._writer = reader, writer
        self._inbox: dict[Key, bytes] = {}
        self._seen: set[Key] = set()
        self._outbox: deque[tuple[Key, bytes]] = deque()
        self._out, self._in = 0, 0
        self._error: BaseException | None = None
        self._turn = threading.Condition()
        self._wake = asyncio.Event()
        self._step: Key | None = None
        """The beginning of the step under way."""
        self._tasks = [self._loop.create_task(job()) for job in (self._read, self._write, self._ping)]

    # --- for the threads of engines ---------------------------------------------------------------------------------

    def send(self, key: Key, body: bytes) -> None:
        """Start sending; waits while too much is under way. Raises Lost."""
        size = wire_bytes(len(body))
        with self._turn:
            self._wait(lambda: not self._out or self._out + size <= self.window, self.waits.drain, f"to send {key}")
            self._out += size
            self._outbox.append((key, body))
        self._loop.call_soon_threadsafe(self._wake.set)

    def receive(self, key: Key, timeout: float | None = None) -> bytes:
        """Wait for a message. Raises Lost, or Told with what the other end said instead."""
        with self._turn:
            self._wait(lambda: key in self._inbox, timeout or self.waits.step, f"for {key}")
            body = self._inbox.pop(key)
            if key.kind.tensors:
                self._in -= len(body)
        return body

    def begun(self, timeout: float = 1.0) -> tuple[Key, bytes] | None:
        """Wait a while for the beginning of any step; None where none came. Raises Lost."""
        with self._turn:
            self._turn.wait_for(lambda: self._error is not None or self._begin() is not None, timeout)
            if (key := self._begin()) is not None:
                return key, self._inbox.pop(key)
            if self._error is not None:
                raise self._error
            return None

    def _begin(self) -> Key | None:
        return next((key for key in self._inbox if key.kind in BEGINNINGS), None)

    def ended(self) -> None:
        """The step under way is over: another may begin."""
        with self._turn:
            self._step = None

    def flush(self, timeout: float) -> None:
        """Wait until everything was handed to the socket. Raises Lost."""
        with self._turn:
            self._wait(lambda: not self._out, timeout, "until all is sent")

    def close(self, error: BaseException | None = None) -> None:
        """End the connection; whoever waits is told."""
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._end, error or Lost("the connection was closed"))

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self._error is not None

    def _wait(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not ready():
            if self._error is not None:
                raise self._error
            left = end - time.monotonic()
            if left <= 0:
                raise Lost(f"waited {timeout:.0f} s {what}: the other end is silent or too slow")
            self._turn.wait(min(left, 1.0))

    # --- in the event loop ------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while True:
                fixed = await self._exactly(HEADER.size, self.waits.idle)
                head = self.assembler.head(fixed)
                self._allow(head.key, head.chunk)
                payload = await self._exactly(head.length, self.waits.drain) if head.length else b""
                self.bytes["received"] += len(fixed) + len(payload)
                self.by_kind[f"received {head.key.kind.name}"] += len(fixed) + len(payload)
                body = self.assembler.add(fixed, head, payload)
                if body is not None:
                    self._deliver(head.key, body)
                if self.rate:
                    await asyncio.sleep((len(fixed) + len(payload)) / self.rate)
        except (WireError, Told, Lost) as error:
            self._end(error)
        except TimeoutError:
            self._end(Lost(f"nothing came for {self.waits.idle:.0f} s"))
        except ssl.SSLError as error:  # the other end's verdict on our certificate comes with the first bytes
            self._end(PermissionError(f"Authentication failed: {error.reason}"))
        except (asyncio.IncompleteReadError, OSError) as error:
            self._end(Lost(f"the connection broke: {type(error).__name__}"))

    async def _exactly(self, count: int, timeout: float) -> bytes:
        async with asyncio.timeout(timeout):
            return await self._reader.readexactly(count)

    def _allow(self, key: Key, chunk: int) -> None:
        """Refuse what is not due before it is read: of no step under way, of no micro-batch, or a second time."""
        if key.kind.tensors:
            step = self._step
            most = self.pieces if step is not None and step.kind is Kind.GATHER else self.micro_batches
            if step is None or key.step != step.step or key.micro_batch >= most:
                raise WireError(f"{key} is not due")
            if chunk == 0 and key in self._seen:
                raise WireError(f"{key} came before: a replayed frame")
            self._seen.add(key)
        elif key.kind in BEGINNINGS:
            if key.kind is Kind.GATHER and not self.pieces:
                raise WireError(f"{key}: layers are not averaged here")
            if self._step is not None:
                raise WireError(f"{key} begins while step {self._step.step} is under way")
        elif key.kind is not Kind.PING and (key in self._inbox or key.micro_batch):
            raise WireError(f"{key} is not due")

    def _deliver(self, key: Key, body: bytes) -> None:
        if key.kind is Kind.PING:
            return
        if key.kind is Kind.ERROR:
            raise Told(parse(Failed, body))
        if key.kind is Kind.BYE:
            raise Lost("the other end has closed the session's connection")
        with self._turn:
            if key.kind in BEGINNINGS:
                self.expect(key)
            if key.kind.tensors:
                self._in += len(body)
                if self._in > self.room:
                    raise WireError(f"{key}: more than {self.room} bytes wait to be used")
            self._inbox[key] = body
            self._turn.notify_all()

    def expect(self, key: Key) -> None:
        """Tensors of this step may come from now on."""
        with self._turn:
            self._step, self._seen = key, set()

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._outbox:
                    key, body = self._outbox.popleft()
                    for frame in frames(key, body):
                        self._writer.write(frame)
                        async with asyncio.timeout(self.waits.drain):
                            await self._writer.drain()
                        self.bytes["sent"] += len(frame)
                        self.by_kind[f"sent {key.kind.name}"] += len(frame)
                    with self._turn:
                        self._out -= wire_bytes(len(body))
                        self._turn.notify_all()
        except TimeoutError:
            self._end(Lost(f"the other end took nothing for {self.waits.drain:.0f} s"))
        except (OSError, RuntimeError) as error:
            self._end(Lost(f"the connection broke: {type(error).__name__}"))

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self.waits.idle / 3)
            if not self._outbox:
                with self._turn:
                    self._out += wire_bytes(0)
                    self._outbox.append((Key(Kind.PING), b""))
                self._wake.set()

    def _end(self, error: BaseException) -> None:
        if self._error is None:
            with self._turn:
                self._error = error
                self._outbox.clear()
                self._turn.notify_all()
            for task in self._tasks:
                if task is not asyncio.current_task(self._loop):
                    task.cancel()
            with suppress(OSError, RuntimeError):
                if isinstance(error, WireError):
                    self._writer.writelines(frames(Key(Kind.ERROR), Failed(code="bad", message=str(error)).body()))
                self._writer.close()

    async def wait_closed(self) -> None:
        """Wait until the connection is over and its tasks are."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(2.0):
                await self._writer.wait_closed()
