"""/healthz and /metrics over plain HTTP, for whoever watches the host; nothing of a client's is in them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress


async def serve_status(where: tuple[str, int], metrics: Callable[[], str], draining: threading.Event) -> asyncio.Server:
    """Answer GET on an address: 200 on /healthz, 503 once the host drains."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            async with asyncio.timeout(5):
                line = (await reader.readline()).decode("latin-1").split()
                path = line[1] if len(line) == 3 and line[0] == "GET" else ""
                healthy = not draining.is_set()
                pages = {
                    "/healthz": (
                        "200 OK" if healthy else "503 Service Unavailable",
                        "ok\n" if healthy else "draining\n",
                    ),
                    "/metrics": ("200 OK", metrics()),
                }
                state, body = pages.get(path, ("404 Not Found", "there are /healthz and /metrics\n"))
                writer.write(
                    f"HTTP/1.1 {state}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n"
                    f"Connection: close\r\n\r\n{body}".encode()
                )
                await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, *where, limit=2**14)
