"""Frames on the wire: what travels between edge and host, and a reader that believes nothing it is told.

    magic  version  kind  step  micro-batch  chunk  chunks  length  crc  |  payload, at most 1 MiB

A message is one frame or several chunks. Control messages are JSON, tensors are codec frames one after the other, each
behind its length. Nothing is run, and nothing of a claimed size is allocated before the size is compared with what the
session may send.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from merak_like.runtime.codecs.wire import Reader, number

HEADER = struct.Struct("<2sBBIHHHII")
MAGIC, VERSION = b"mS", 1
CHUNK = 2**20
"""Most payload bytes of a frame."""
LARGEST_CONTROL = 2**18
MOST_CHUNKS = 2**16 - 1


class WireError(ValueError):
    """What came over the wire is not what may come; the connection is closed, nothing was changed."""


class Kind(IntEnum):
    """What a message is. Activations and their gradients have a row each way; the rest is control."""

    HELLO = 1
    WELCOME = 2
    BEGIN = 3
    DONE = 4
    ERROR = 5
    BYE = 6
    PING = 7
    GATHER = 8
    """Edge to host: the edge's own layers follow, to be averaged with those of its group."""
    UP_FORWARD = 16
    """Edge to host: what the edge's head sends."""
    UP_BACKWARD = 17
    """Host to edge: its gradient."""
    DOWN_FORWARD = 18
    """Host to edge: what the cloud's half returns."""
    DOWN_BACKWARD = 19
    """Edge to host: its gradient."""
    OWN = 20
    """Edge to host: a piece of the edge's own layers."""
    MEAN = 21
    """Host to edge: that piece of the mean."""

    @property
    def tensors(self) -> bool:
        """Whether codec frames travel in it."""
        return self >= Kind.UP_FORWARD


BEGINNINGS = frozenset({Kind.BEGIN, Kind.GATHER})
"""After one of these, tensors of its step may come."""
EITHER = {Kind.ERROR, Kind.BYE, Kind.PING}
FROM_EDGE = frozenset({Kind.HELLO, *BEGINNINGS, *EITHER, Kind.UP_FORWARD, Kind.DOWN_BACKWARD, Kind.OWN})
FROM_HOST = frozenset({Kind.WELCOME, Kind.DONE, *EITHER, Kind.UP_BACKWARD, Kind.DOWN_FORWARD, Kind.MEAN})


class Key(NamedTuple):
    """Which message it is; each occurs once in an attempt at a step."""

    kind: Kind
    step: int = 0
    micro_batch: int = 0

    def __str__(self) -> str:
        return f"{self.kind.name} of step {self.step}, micro-batch {self.micro_batch}"


class Head(NamedTuple):
    """The header of one frame."""

    key: Key
    chunk: int
    chunks: int
    length: int
    crc: int


def frames(key: Key, body: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """A message as frames. Raises ValueError for one that is too large for any reader."""
    data = memoryview(body).cast("B")
    chunks = max(1, -(-len(data) // CHUNK))
    if chunks > MOST_CHUNKS:
        raise ValueError(f"a message of {len(data)} bytes does not travel: use smaller micro-batches")
    for chunk in range(chunks):
        part = data[chunk * CHUNK : (chunk + 1) * CHUNK]
        fixed = HEADER.pack(MAGIC, VERSION, key.kind, key.step, key.micro_batch, chunk, chunks, len(part), 0)[:-4]
        crc = zlib.crc32(part, zlib.crc32(fixed))
        yield fixed + struct.pack("<I", crc) + bytes(part)


def wire_bytes(body: int) -> int:
    """Bytes on the wire of a message with a body of so many, headers included."""
    return body + HEADER.size * max(1, -(-body // CHUNK))


def read_head(data: bytes, allowed: frozenset[Kind]) -> Head:
    """A header of one of the allowed kinds. Raises WireError for anything else."""
    magic, version, code, step, micro_batch, chunk, chunks, length, crc = HEADER.unpack(data)
    if magic != MAGIC:
        raise WireError(f"this is no frame of split fine-tuning: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"the frame is of format {version}, this end reads {VERSION}: use the same release")
    if code not in Kind._value2member_map_ or Kind(code) not in allowed:
        raise WireError(f"a frame of kind {code} does not come this way")
    if not chunk < chunks or length > CHUNK or (chunk < chunks - 1 and length != CHUNK):
        raise WireError(f"the frame is malformed: chunk {chunk} of {chunks} with {length} bytes")
    return Head(Key(Kind(code), step, micro_batch), chunk, chunks, length, crc)


class Assembler:
    """Puts the chunks of messages together, one message at a time, within the limits of a session."""

    def __init__(self, allowed: frozenset[Kind]) -> None:
        self.allowed = allowed
        self.largest = 0
        """Most bytes of a message of tensors; 0 until a session is open."""
        self._key: Key | None = None
        self._parts = bytearray()
        self._chunks = 0

    def head(self, data: bytes) -> Head:
        """Read a header; WireError where it does not continue what is under way or claims too much."""
        head = read_head(data, self.allowed)
        limit = self.largest if head.key.kind.tensors else LARGEST_CONTROL
        # The least that this many chunks hold: asked before any of them is read.
        if (head.chunks - 1) * CHUNK + (head.length if head.chunk == head.chunks - 1 else 1) - 1 >= max(limit, 1):
            raise WireError(
                f"{head.key} claims {head.chunks} chunks, at most {limit} bytes may come: is the batch larger than the "
                "one the session was opened with?"
            )
        if head.chunk == 0:
            if self._key is not None:
                raise WireError(f"{head.key} begins in the middle of {self._key}")
        elif head.key != self._key or head.chunks != self._chunks or head.chunk * CHUNK != len(self._parts):
            raise WireError(f"chunk {head.chunk} of {head.key} does not continue what came before")
        return head

    def add(self, fixed: bytes, head: Head, payload: bytes) -> bytes | None:
        """Take a frame's payload; the message's body when it is whole."""
        if zlib.crc32(payload, zlib.crc32(fixed[:-4])) != head.crc:
            raise WireError(f"{head.key} is damaged: its checksum does not fit its bytes")
        if head.chunks == 1:
            return payload
        self._key, self._chunks = head.key, head.chunks
        self._parts += payload
        if head.chunk < head.chunks - 1:
            return None
        body, self._parts, self._key = bytes(self._parts), bytearray(), None
        return body


def pack(parts: Sequence[bytes | memoryview]) -> bytes:
    """Several byte strings as one body."""
    return b"".join(piece for part in parts for piece in (number(len(part)), part))


def unpack(body: bytes, count: int) -> list[memoryview]:
    """The ``count`` byte strings of a body. Raises WireError where there are not so many, or more."""
    data, reader = memoryview(body), Reader(body)
    parts: list[memoryview] = []
    try:
        for _ in range(count):
            length = reader.number("a length")
            if length > len(body) - reader.at:
                raise ValueError(f"a part claims {length} bytes, {len(body) - reader.at} are left")
            parts.append(data[reader.at : reader.at + length])
            reader.at += length
        reader.end("the last part")
    except ValueError as error:
        raise WireError(str(error)) from None
    return parts
