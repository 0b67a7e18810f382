"""What a connection does with the other end where that takes nothing, or says nothing any more."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from merak_like.split.connection import Connection, Lost, Waits
from merak_like.split.wire import CHUNK, FROM_EDGE, Key, Kind, frames

WAITS = Waits(hello=5.0, idle=0.5, step=5.0, drain=0.3)
Open = Callable[..., tuple[Connection, socket.socket]]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Connections as a host has them, each with the client's end as a bare socket."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made: list[tuple[Connection, socket.socket]] = []

    def open_(waits: Waits, rate: float = 0.0) -> tuple[Connection, socket.socket]:
        here, there = socket.socketpair()

        async def connect() -> Connection:
            reader, writer = await asyncio.open_connection(sock=here)
            return Connection(reader, writer, FROM_EDGE, waits, window=4 * CHUNK, rate=rate)

        made.append((asyncio.run_coroutine_threadsafe(connect(), loop).result(5), there))
        return made[-1]

    yield open_
    for connection, there in made:
        connection.close()
        there.close()
        asyncio.run_coroutine_threadsafe(connection.wait_closed(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def within(seconds: float, so: Callable[[], bool]) -> None:
    """Wait for something that must be so in time."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_reads_nothing_is_let_go_and_holds_no_more_than_the_window(opened: Open):
    connection, _ = opened(WAITS)

    def send() -> None:
        for micro_batch in range(100):
            connection.send(Key(Kind.UP_BACKWARD, 0, micro_batch), bytes(CHUNK))
            assert connection._out <= connection.window

    with pytest.raises(Lost, match=r"took nothing for|silent or too slow"):
        send()
    within(3, lambda: connection.closed)


def test_who_reads_and_says_nothing_is_let_go(opened: Open):
    """As an end that is gone without a word: its system takes what comes for a while, but no sign of life comes."""
    connection, there = opened(WAITS)
    reading = threading.Thread(target=lambda: there.makefile("rb").read())
    reading.start()
    with pytest.raises(Lost, match="nothing came for"):
        connection.receive(Key(Kind.UP_FORWARD, 0, 0))
    reading.join(5)


def test_who_sends_a_byte_now_and_then_is_let_go(opened: Open):
    """A sign of life is a whole frame."""
    connection, there = opened(WAITS)

    def trickled() -> bool:
        with suppress(OSError):
            there.send(b"m")
        time.sleep(0.1)
        return connection.closed

    within(3, trickled)


def test_bytes_are_taken_at_the_rate_that_is_allowed(opened: Open):
    """A client that sends faster waits in its own system's buffers."""
    pings = b"".join(frames(Key(Kind.PING), b"")) * 20
    took = list[float]()
    for rate in (0.0, 1000.0):
        connection, there = opened(WAITS, rate)
        began = time.monotonic()
        there.sendall(pings)
        within(3, lambda connection=connection: connection.bytes["received"] == len(pings))
        took.append(time.monotonic() - began)
    assert took[1] > 0.9 * 19 / 20 * len(pings) / 1000 > took[0]
