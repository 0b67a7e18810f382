"""How bytes get from an edge to a host. Above it a connection is the same: frames, limits, time-outs, sessions.

HOST:PORT          TCP and TLS 1.3, through asyncio
grpc://HOST:PORT   one gRPC call a connection (calls.py), where a network lets only HTTP/2 through
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from merak_like.split.tls import Keys, address

HELD = 2**21
"""Bytes beyond which what has arrived and is not read yet holds the other end back; at most twice as much is kept."""

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Place(NamedTuple):
    """Where a host listens, and how it is spoken to."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}" if self.scheme else f"{self.host}:{self.port}"


class Listener(Protocol):
    """A host's open door."""

    port: int

    def close(self) -> None:
        """Let nobody else in; who is in stays."""
        ...

    async def ended(self) -> None:
        """Wait until the door is gone, once everybody has left."""
        ...


class Transport(Protocol):
    """One way to carry bytes, with the keys of one end; None: in the clear."""

    async def dial(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError where nobody answers, PermissionError for a host that is not who it should be."""
        ...

    async def listen(self, host: str, port: int, accept: Accept, *, hello: float, most: int) -> Listener:
        """``accept`` is awaited for each client; its writer knows "peername" and, under TLS, "ssl_object".

        ``hello`` is how many seconds a handshake may take, ``most`` how many clients there can be. Raises OSError for
        an address that cannot be had.
        """
        ...


class Tcp:
    """asyncio's own streams."""

    def __init__(self, keys: Keys | None, *, server: bool) -> None:
        self._tls = None if keys is None else keys.server() if server else keys.client()

    async def dial(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As ``Transport`` says."""
        try:
            return await asyncio.open_connection(host, port, ssl=self._tls, limit=HELD)
        except ssl.SSLCertVerificationError as error:
            raise PermissionError(error.verify_message) from None

    async def listen(self, host: str, port: int, accept: Accept, *, hello: float, most: int) -> Listener:
        """As ``Transport`` says."""
        more = {"ssl_handshake_timeout": hello} if self._tls is not None else {}
        return _Door(
            await asyncio.start_server(accept, host, port, ssl=self._tls, limit=HELD, backlog=min(most, 128), **more)
        )


class _Door:
    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        self.port = server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self._server.close()

    async def ended(self) -> None:
        pass


def _tcp(keys: Keys | None, server: bool) -> Transport:
    return Tcp(keys, server=server)


def _grpc(keys: Keys | None, server: bool) -> Transport:
    try:
        from merak_like.split.calls import Calls
    except ModuleNotFoundError as error:
        raise ValueError(
            f'grpc:// needs {error.name}, which is not installed here: pip install "merak-like[grpc]", or leave '
            "grpc:// away on both ends"
        ) from None
    return Calls(keys, server=server)


SCHEMES: dict[str, Callable[[Keys | None, bool], Transport]] = {"": _tcp, "grpc": _grpc}


def place(text: str) -> Place:
    """Read HOST:PORT or grpc://HOST:PORT. Raises ValueError."""
    scheme, found, rest = text.rpartition("://")
    if found and (not scheme or scheme not in SCHEMES):
        raise ValueError(f"an address is HOST:PORT or grpc://HOST:PORT, found {text!r}")
    return Place(scheme, *address(rest))


def transport(scheme: str, keys: Keys | None, *, server: bool) -> Transport:
    """The one of a scheme, for a host or an edge. Raises ValueError for keys or packages that are not there."""
    return SCHEMES[scheme](keys, server)
