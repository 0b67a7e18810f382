"""Small messages between two ranks of one host, through a socket of their own.

gloo agrees on each message with two more and wakes a thread on either side, which for a few kilobytes costs several
times what sending them does. Here a message goes into the kernel's memory when it is begun, and is read by whoever
waits for it.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

MOST = 1 << 16
"""Bytes of a message that goes this way. Larger ones would wait for a reader, and gloo's threads read at once."""
NAME = 64
"""Bytes of a note about where to meet."""

_pairs: WeakKeyDictionary[Any, Pair | None] = WeakKeyDictionary()


def pair_of(group: Any) -> Pair | None:
    """What joins this rank to the other of a group of two; None if they are on two hosts.

    Made when first asked for: both ranks ask at the same place in the order of the group's messages.
    """
    if group not in _pairs:
        connection = _joined(group)
        _pairs[group] = None if connection is None else Pair(connection)
    return _pairs[group]


class Pair:
    """A connected socket with messages of known sizes, each way in the order they were begun."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._outgoing, self._incoming = _Line(connection.send), _Line(partial(_read, connection))
        self._begun = 0

    def swap(self, mine: Tensor, theirs: Tensor) -> Swap:
        """Start to send a contiguous tensor and to receive another; both stay as they are until it is waited for."""
        self._outgoing.add(mine)
        self._incoming.add(theirs)
        self._begun += 1
        self._outgoing.move()
        return Swap(self, self._begun)

    def wait(self, number: int, limit: timedelta) -> bool:
        """Wait until the message of this number has left and its answer has come. False when the limit has passed.

        Raises RuntimeError when the other rank is gone.
        """
        end = 0.0
        while True:
            self._outgoing.move()
            self._incoming.move()
            if min(self._outgoing.done, self._incoming.done) >= number:
                return True
            now = time.monotonic()
            end = end or now + limit.total_seconds()
            if now >= end:
                return False
            poll = select.poll()
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._outgoing.waits else 0))
            poll.poll((end - now) * 1e3)


class Swap:
    """One message each way, under way."""

    def __init__(self, pair: Pair, number: int) -> None:
        self._pair, self._number = pair, number

    def wait(self, limit: timedelta) -> bool:
        """As of torch's works: False when the limit has passed."""
        return self._pair.wait(self._number, limit)


class _Line:
    """Messages that go one way, one after the other. It holds their tensors, whoever else forgets them."""

    def __init__(self, some: Callable[[memoryview], int]) -> None:
        """``some`` moves a part of a message, and tells how many bytes."""
        self._some = some
        self._waiting = deque[tuple[memoryview, Tensor]]()
        self.done = 0

    @property
    def waits(self) -> bool:
        """Whether something has not gone yet."""
        return bool(self._waiting)

    def add(self, tensor: Tensor) -> None:
        """Put a message at the end."""
        self._waiting.append((_bytes(tensor), tensor))

    def move(self) -> None:
        """Move what can be moved now."""
        while self._waiting:
            rest, tensor = self._waiting[0]
            try:
                rest = rest[self._some(rest) if rest else 0 :]
            except BlockingIOError:
                return
            except OSError as error:
                raise RuntimeError(f"connection closed by peer: {error}") from None
            if rest:
                self._waiting[0] = rest, tensor
            else:
                self._waiting.popleft()
                self.done += 1


def _read(connection: socket.socket, room: memoryview) -> int:
    got = connection.recv_into(room)
    if not got:
        raise ConnectionResetError("it has ended")
    return got


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _joined(group: Any) -> socket.socket | None:
    """A socket to the other rank, found by notes over the group itself; None where there can be none.

    Its name is in Linux's abstract space: processes of one host and network can use it, and it goes with the socket.
    Others may read it and be the first to call, so who calls must be of this user.
    """
    first, listener = dist.get_rank(group) == 0, None
    if first and sys.platform == "linux":
        with suppress(OSError):  # a sandbox without such sockets
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"\0merak-{secrets.token_hex(16)}")
            listener.listen()
    name = _note(listener.getsockname() if listener else b"", 0, group)
    connection = None if first else _called(name)
    if _note(b"called" if connection else b"", 1, group) and listener:
        connection = _answered(listener)
    if listener:
        listener.close()
    return connection if _note(b"answered" if connection else b"", 0, group) else None


def _note(note: bytes, sender: int, group: Any) -> bytes:
    """What the sender says, on both ranks."""
    room = torch.zeros(NAME, dtype=torch.uint8)
    if dist.get_rank(group) == sender:
        room[: len(note)] = torch.tensor(list(note), dtype=torch.uint8)
        dist.send(room, group=group, group_dst=1 - sender)
    else:
        dist.recv(room, group=group, group_src=sender)
    return bytes(room.tolist()).rstrip(b"\0")


def _called(name: bytes) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX) if name else None
    if connection is not None and connection.connect_ex(name):
        connection.close()
        return None
    return connection


def _answered(listener: socket.socket) -> socket.socket | None:
    """The caller that waits in line and is of this user."""
    listener.setblocking(False)
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return None
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid():
            return connection
        connection.close()
