"""The wire believes nothing: every malformed frame is a typed error, at once, and costs no memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.runtime.codecs import codec
from merak_like.split.messages import Begin, Done, Failed, Hello, Task, Welcome, parse
from merak_like.split.outline import blank, lengths_of, mask_of, outline, width_of
from merak_like.split.wire import (
    CHUNK,
    FROM_EDGE,
    FROM_HOST,
    HEADER,
    Assembler,
    Key,
    Kind,
    WireError,
    frames,
    pack,
    read_head,
    unpack,
    wire_bytes,
)  # fmt: skip

KEY = Key(Kind.UP_FORWARD, 7, 1)
BEGIN = Begin(outline=outline({"attention_mask": torch.zeros(2, 3)}), digest="0" * 32, lengths=(3, -2), samples=(1, 2))


def fed(data: bytes, assembler: Assembler) -> list[tuple[Key, bytes]]:
    """The messages in some bytes, read as a connection reads them."""
    found, at = [], 0
    while at < len(data):
        if len(data) - at < HEADER.size:
            raise WireError("ends in a header")
        head = assembler.head(data[at : at + HEADER.size])
        payload = data[at + HEADER.size : at + HEADER.size + head.length]
        if len(payload) < head.length:
            raise WireError("ends in a payload")
        body = assembler.add(data[at : at + HEADER.size], head, payload)
        if body is not None:
            found.append((head.key, body))
        at += HEADER.size + head.length
    return found


def reader(largest: int = 4 * CHUNK) -> Assembler:
    made = Assembler(FROM_EDGE)
    made.largest = largest
    return made


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_message_comes_as_it_went_in_chunks_of_a_mebibyte(size: int):
    body = random.Random(size).randbytes(size)
    parts = list(frames(KEY, body))
    assert all(len(part) <= CHUNK + HEADER.size for part in parts)
    assert sum(map(len, parts)) == wire_bytes(size)
    assert fed(b"".join(parts), reader()) == [(KEY, body)]


def test_parts_come_apart_again():
    parts = [b"", b"a", b"b" * 300]
    assert [bytes(part) for part in unpack(pack(parts), 3)] == parts
    for body, count in ((pack(parts), 2), (pack(parts), 4), (b"\xff" * 20, 1)):
        with pytest.raises(WireError):
            unpack(body, count)


def head(**changes: int) -> bytes:
    fields = {"version": 1, "kind": 16, "step": 0, "micro": 0, "chunk": 0, "chunks": 1, "length": 4, "crc": 0} | changes
    return struct.pack("<2sBBIHHHII", b"mS", *fields.values())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"GET / HTTP/1.1\r\nHost: x", "no frame"),
        (head(version=2), "format 2"),
        (head(kind=99), "kind 99"),
        (head(kind=int(Kind.WELCOME)), "does not come this way"),
        (head(length=2**32 - 1), "malformed"),
        (head(chunk=1, chunks=1), "malformed"),
        (head(chunks=0), "malformed"),
        (head(chunk=0, chunks=2, length=5), "malformed"),
        (head(chunks=2**16 - 1, length=CHUNK), "at most"),
        (head(chunk=1, chunks=2, length=CHUNK), "does not continue"),
        (head(kind=int(Kind.HELLO), chunks=2, length=CHUNK), "at most"),
    ],
)
def test_a_header_that_may_not_come_is_refused_before_anything_is_made(data: bytes, match: str):
    tracemalloc.start()
    with pytest.raises(WireError, match=match):
        reader().head(data[: HEADER.size])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_tensors_before_a_session_are_refused():
    with pytest.raises(WireError, match="at most 0 bytes"):
        Assembler(FROM_EDGE).head(next(frames(KEY, b"xx"))[: HEADER.size])


def test_every_damaged_bit_is_noticed():
    frame = next(frames(KEY, b"some payload"))
    for bit in range(8 * len(frame)):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            fed(bytes(broken), reader())


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or made up."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) or 1)
        match rng.randrange(5):
            case 0 if out:
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.randint(1, 20)]
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 20))
            case 3:
                out[at:at] = out[at : at + rng.randint(1, 30)]
            case _:
                out[at : at + 4] = struct.pack("<I", rng.choice([0, 2**31, 2**32 - 1, CHUNK, CHUNK + 1]))
    return bytes(out)


def resealed(data: bytes) -> bytes:
    """With a checksum that fits, so that what lies behind it is reached as well."""
    if len(data) < HEADER.size:
        return data
    import zlib

    fixed, payload = data[: HEADER.size - 4], data[HEADER.size :]
    fixed = fixed[:-4] + struct.pack("<I", len(payload))
    return fixed + struct.pack("<I", zlib.crc32(payload, zlib.crc32(fixed))) + payload


def seeds() -> list[bytes]:
    """Good frames of every kind."""
    outlined = outline({"x": torch.zeros(2, 3)})
    hello = Hello(task=Task(cut="a:b"), example=outlined, digest="0" * 32)
    x = codec("aqsgd(4)|int8")
    from merak_like.runtime.codecs import Context

    back = Context(7, 1)
    tensor = x.encode(torch.randn(4, 8), Context(7, 1, samples=(1, 2, 3, 4)))
    bodies = {
        Key(Kind.HELLO): hello.body(), Key(Kind.BEGIN, 7): BEGIN.body(), KEY: pack([bytes(tensor.numpy())]),
        Key(Kind.ERROR): Failed(code="bad", message="no").body(), Key(Kind.PING): b"", Key(Kind.BYE): b"",
        Key(Kind.DOWN_BACKWARD, 7, 1): pack([bytes(codec("identity").encode(torch.randn(3), back).numpy())]),
    }  # fmt: skip
    return [b"".join(frames(key, body)) for key, body in bodies.items()]


def digested(data: bytes) -> None:
    """All that a host does with a message before an engine sees it; only typed errors may come out."""
    from merak_like.runtime.codecs import Context

    kinds = {Kind.HELLO: Hello, Kind.BEGIN: Begin, Kind.ERROR: Failed, Kind.WELCOME: Welcome, Kind.DONE: Done}
    for key, body in fed(data, reader(2**16)):
        if key.kind in kinds:
            message = parse(kinds[key.kind], body)
            if isinstance(message, Begin):
                mask = None if message.lengths is None else mask_of(message.lengths, width_of(message.outline))
                blank(message.outline, mask)
            if isinstance(message, Hello):
                blank(message.example)
        elif key.kind.tensors:
            text = "aqsgd(4)|int8" if key.kind is Kind.UP_FORWARD else "identity"
            context = Context(7, 1, samples=(1, 2, 3, 4), limit=64)
            for part in unpack(body, 1):
                codec(text).decode(part, context)


def attack(count: int, seed: int) -> int:
    """Mutate frames and digest them; how many were refused. Anything but a ValueError comes out."""
    rng, good, refused = random.Random(seed), seeds(), 0
    for i in range(count):
        data = mutated(rng.choice(good), rng)
        try:
            digested(resealed(data) if i % 2 else data)
        except ValueError:
            refused += 1
    return refused


def test_good_frames_pass():
    for data in seeds():
        digested(data)


def test_mutated_frames_are_refused_by_name_within_bounds():
    tracemalloc.start()
    refused = attack(3000, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 2500
    assert peak < 20_000_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_mutated_frames():
    assert attack(100_000, 2) > 85_000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("tsmlvx"), inner),
)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_pass_or_raise(data: bytes):
    with suppress(WireError):
        fed(data, reader())
    with suppress(WireError):
        read_head(data.ljust(HEADER.size, b"\0")[: HEADER.size], FROM_HOST)


@settings(max_examples=200)
@given(JSON)
def test_any_json_as_outline_is_a_batch_or_refused(said: object):
    with suppress(WireError):
        blank(said)


@pytest.mark.parametrize(
    "said",
    [
        {"t": "int64", "s": [2**40]}, {"t": "int64", "s": [2**13, 2**13]}, {"t": "int64", "s": [0, 2**62]},
        {"t": "int64", "s": [-1]}, {"t": "int64", "s": [True]}, {"t": "object", "s": [1]},
        {"t": "int64", "s": [1] * 99},
        {"l": [{"t": "int8", "s": [1]}] * 1000},
        {"m": {"x": {"m": {"x": {"m": {"x": {"m": {"x": {"m": {"x": {"m": {}}}}}}}}}}}},
    ],
)  # fmt: skip
def test_an_outline_beyond_measure_is_refused(said: object):
    with pytest.raises(WireError):
        blank(said)


def test_a_batch_comes_back_from_its_outline():
    batch = {"a": torch.ones(2, 3, dtype=torch.int64), "b": [torch.rand(4), None, 1.5], "c": "mean"}
    made = blank(outline(batch))
    assert made["a"].equal(torch.zeros(2, 3, dtype=torch.int64))
    assert made["b"][0].shape == (4,)
    assert made["b"][1:] == [None, 1.5]
    assert made["c"] == "mean"


def test_masks_travel_as_lengths_in_front_and_behind():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    lengths = lengths_of({"attention_mask": mask})
    assert lengths is not None
    assert lengths == (2, -2, 4, 0)
    assert mask_of(lengths, 4).equal(mask)
    with pytest.raises(ValueError, match="holes"):
        lengths_of({"attention_mask": torch.tensor([[1, 0, 1]])})
    with pytest.raises(WireError, match="longer"):
        mask_of((5,), 4)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"step": "1"}', b'{"session": "../x"}', b"[" * 100_000])
def test_control_messages_name_what_is_wrong(body: bytes):
    with pytest.raises(WireError):
        parse(Welcome, body)
