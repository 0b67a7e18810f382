"""gRPC as a transport: a connection is one call of one method, its messages are our frames, as bytes.

    edge   Talk(stream of frames) -> stream of frames   host        no protobuf, nothing generated

Under the connection lies a call instead of a socket; whatever it promises, its limits and its time-outs, stays its own.
So gRPC's retries, deadlines and pings are off: a step is repeated by the session, once, and the connection's own pings
tell who is gone. A message is at most one frame. The only importer of grpc.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import grpc
from grpc import aio

from merak_like.split.keys import Certificate
from merak_like.split.tls import Keys
from merak_like.split.transport import HELD, Accept, Listener
from merak_like.split.wire import CHUNK, HEADER

SERVICE, METHOD = "merak.Split", "Talk"
LINGER = 1.0
"""Seconds that who has said its last waits for the other end: an edge for the host to end the call, and a host, before
it does, for the edge to say its last too. An end while the edge still sends is a reset, which may overtake all before
it."""
STRANGER = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification")
"""In the words of gRPC's TLS for a host without a certificate of the authority, or with another's name."""
OVER = (grpc.RpcError, aio.BaseError, asyncio.InvalidStateError)
"""By which gRPC says, in a dozen words, that a call is over: ended, cut, refused or never begun."""
PATIENT = 1e6
"""Seconds that calls may go on when no more are taken: the host itself ends them."""
OPTIONS = (
    ("grpc.max_receive_message_length", HEADER.size + CHUNK),
    ("grpc.max_send_message_length", HEADER.size + CHUNK),
    ("grpc.enable_retries", 0),
)
EDGE = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
"""A socket for each connection, as the host's limits count them."""


class Calls:
    """Makes and takes calls."""

    def __init__(self, keys: Keys | None, *, server: bool) -> None:
        self._edge: grpc.ChannelCredentials | None = None
        self._host: grpc.ServerCredentials | None = None
        if keys is None:
            return
        _ = keys.server() if server else keys.client()  # says what is wrong with the files, which gRPC does not
        authority, certificate, key = (path.read_bytes() for path in keys.files())
        if server:
            self._host = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
        else:
            self._edge = grpc.ssl_channel_credentials(authority, key, certificate)

    async def dial(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As ``Transport`` says."""
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        channel = (
            aio.insecure_channel(target, EDGE) if self._edge is None else aio.secure_channel(target, self._edge, EDGE)
        )
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        try:
            await call.wait_for_connection()
        except BaseException as error:
            with suppress(asyncio.CancelledError):
                await channel.close()
            if not isinstance(error, aio.AioRpcError):
                raise
            kind = PermissionError if any(words in _told(error) for words in STRANGER) else OSError
            raise kind(_told(error)) from None

        async def end() -> None:
            try:
                await call.done_writing()
            finally:
                await channel.close(LINGER)

        made = _Call(call.read, call.write, end, {"peername": (host, port)})
        return made.reader, made.writer

    async def listen(self, host: str, port: int, accept: Accept, *, hello: float, most: int) -> Listener:
        """As ``Transport`` says."""

        async def talk(_: Any, context: aio.ServicerContext[bytes, bytes]) -> None:
            await context.send_initial_metadata(())  # the edge waits for it: only now is it connected
            call = _Call(context.read, context.write, None, _who(context))
            work = asyncio.ensure_future(accept(call.reader, call.writer))
            try:
                await asyncio.shield(work)
                await call.over.wait()  # to return is to end the call
            finally:
                call.abort()  # unless it is over; where the edge is gone, the session's thread ends in its own time
                if not work.done():
                    await work

        server = aio.server(
            maximum_concurrent_rpcs=2 * most,  # beyond its limit the host itself says no
            options=(
                *OPTIONS, ("grpc.so_reuseport", 0), ("grpc.server_handshake_timeout_ms", int(1000 * hello)),
                ("grpc.max_concurrent_streams", most), ("grpc.max_connection_idle_ms", int(1000 * hello)),
            ),
        )  # fmt: skip
        handler = grpc.stream_stream_rpc_method_handler(talk)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_insecure_port(where) if self._host is None else server.add_secure_port(where, self._host)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {where}: {error}") from None
        await server.start()
        return _Door(server, bound)


class _Door:
    def __init__(self, server: aio.Server, port: int) -> None:
        self._server, self.port = server, port
        self._stopping: asyncio.Future[None] | None = None

    def close(self) -> None:
        self._stopping = asyncio.ensure_future(self._server.stop(PATIENT))

    async def ended(self) -> None:
        await self._server.stop(LINGER)


def _who(context: aio.ServicerContext[bytes, bytes]) -> dict[str, Any]:
    """Address and certificate of a caller; gRPC has it as ``ipv4:1.2.3.4:5`` or ``ipv6:%5B::1%5D:5``."""
    peer = unquote(context.peer()).partition(":")[2].rpartition(":")
    pem = context.auth_context().get("x509_pem_cert")
    shown = {"ssl_object": Certificate(bytes(next(iter(pem))))} if pem else {}
    return {"peername": (peer[0].strip("[]"), peer[2]), **shown}


class _Call(asyncio.Transport):
    """A call under asyncio's streams: what a socket's transport is to them.

    Two tasks carry messages. A writer is held back until gRPC has taken what it wrote, which gRPC does as the other end
    has room; reading stops while ``HELD`` bytes wait for the reader. Who reads gets all that came before the end,
    whatever that was; what comes after ``close`` nobody reads.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]],
        end: Callable[[], Awaitable[None]] | None, extra: dict[str, Any],
    ) -> None:  # fmt: skip
        """``end`` ends the call when all is sent; None: it ends when the other end has said its last."""
        super().__init__(extra)
        loop = asyncio.get_running_loop()
        self._read, self._write, self._finish = read, write, end or self._heard
        self.reader = asyncio.StreamReader(HELD, loop)
        self._protocol = asyncio.StreamReaderProtocol(self.reader, loop=loop)
        self.writer = asyncio.StreamWriter(self, self._protocol, self.reader, loop)
        self.over = asyncio.Event()
        self._waiting: deque[bytes] = deque()
        self._more, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._held, self._closing = False, False
        self._protocol.connection_made(self)
        self._tasks = [loop.create_task(self._send()), loop.create_task(self._receive())]

    # --- what asyncio's streams ask of a transport --------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if not self._closing:
            self._waiting.append(bytes(data))
            if not self._held:
                self._held = True
                self._protocol.pause_writing()
            self._more.set()

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.write(data)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Once all is sent."""
        self._closing = True
        self._more.set()
        self._room.set()

    def abort(self) -> None:
        self._lost()

    def pause_reading(self) -> None:
        if not self._closing:
            self._room.clear()

    def resume_reading(self) -> None:
        self._room.set()

    # --- the tasks ----------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        try:
            while not (self._closing and not self._waiting):
                await self._more.wait()
                self._more.clear()
                while self._waiting:
                    await self._write(self._waiting.popleft())
                if self._held and not self._closing:
                    self._held = False
                    self._protocol.resume_writing()
        except OVER:
            await self._heard()  # why it is over may be the last to be read
        finally:
            with suppress(*OVER):
                await self._finish()
            self._lost()

    async def _heard(self) -> None:
        await asyncio.wait(self._tasks[1:], timeout=LINGER)

    async def _receive(self) -> None:
        ended = False
        try:
            with suppress(*OVER):  # the reader sees the end, after all that came before it
                await self._room.wait()
                while (data := await self._read()) is not aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
                    if not self._closing:
                        self._protocol.data_received(data)
                    await self._room.wait()
                ended = True
                self._protocol.eof_received()
        finally:
            if not ended:
                self._lost()

    def _lost(self) -> None:
        """The call is over, whoever ended it. An error would reach the reader before what it has not read yet."""
        if not self.over.is_set():
            self.over.set()
            self._closing = True
            self._waiting.clear()
            self._protocol.connection_lost(None)
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()


def _told(error: aio.AioRpcError) -> str:
    return error.details() or error.code().name
