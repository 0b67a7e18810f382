"""The edge's side of the network: an event loop in a thread, and connections that are dialled from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from merak_like.split.connection import Connection, Lost, Waits
from merak_like.split.tls import Keys, require_safe
from merak_like.split.transport import place, transport
from merak_like.split.wire import FROM_HOST

T = TypeVar("T")


class Dialler:
    """Dials the hosts of a list, one after the other."""

    def __init__(self, hosts: Sequence[str], keys: Keys | None, insecure: bool, waits: Waits, window: int) -> None:
        """``hosts`` are HOST:PORT or grpc://HOST:PORT. Raises ValueError for one beyond this machine without keys."""
        if not hosts:
            raise ValueError("no host to dial: give at least one HOST:PORT")
        self.hosts = [place(host) for host in hosts]
        for each in self.hosts:
            require_safe(each.host, keys, insecure)
        self.waits, self.window = waits, window
        self._transports = {one.scheme: transport(one.scheme, keys, server=False) for one in self.hosts}
        self._at = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="merak-edge", daemon=True)
        self._thread.start()

    def dial(self, at: int | None = None) -> Connection:
        """Connect to the present host, or to that of a place in the list.

        Raises Lost, or PermissionError for a host that is not who it should be.
        """
        where = self.hosts[self._at if at is None else at]

        async def connect() -> Connection:
            async with asyncio.timeout(self.waits.hello):
                reader, writer = await self._transports[where.scheme].dial(where.host, where.port)
            return Connection(reader, writer, FROM_HOST, self.waits, window=self.window)

        try:
            return self._run(connect())
        except PermissionError as error:
            raise PermissionError(f"{where} is not the host it should be: {error}") from None
        except (OSError, TimeoutError) as error:
            raise Lost(f"{where} does not answer: {str(error) or type(error).__name__}") from None

    def next(self) -> None:
        """Dial the next host from now on."""
        self._at = (self._at + 1) % len(self.hosts)

    def close(self) -> None:
        """Stop the loop."""
        if self._loop.is_running():
            self._run(_finish(self._loop))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
        if not self._loop.is_running():
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(4 * self.waits.hello)


async def _finish(loop: asyncio.AbstractEventLoop) -> None:
    tasks = [task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
