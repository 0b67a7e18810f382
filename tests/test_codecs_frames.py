"""A frame is believed only as far as it was checked: damage, foreign frames and lies about sizes are ValueErrors."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.runtime.codecs import CODECS, Codec, Context, codec
from merak_like.runtime.codecs.codec import HEADER
from merak_like.runtime.codecs.wire import Layout, Reader, number, written

TEXTS = [
    "identity", "bf16", "int3", "int(4, 'sample')", "sign", "topk(0.1)", "topk(0.6)", "randtopk(0.2)", "aqsgd(4)",
    "c3sl(3)", "deflate", "topk(0.1)+int4+deflate", "aqsgd(2)+deflate|topk(0.2)",
]  # fmt: skip
CONTEXT = Context(step=5, micro_batch=2, samples=(1, 2, 3, 4), limit=1000)


def ends(text: str) -> tuple[Codec, Codec, bytes]:
    """Two ends that know the samples, and the next frame between them."""
    near, far = codec(text), codec(text)
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    before = replace(CONTEXT, step=4)
    far.decode(near.encode(x, before), before)
    return near, far, near.encode(x + 0.1, CONTEXT).numpy().tobytes()


def resealed(frame: bytes) -> bytes:
    """The frame with a checksum that fits: what an attacker would send."""
    fixed, rest = frame[: HEADER.size - 4], frame[HEADER.size :]
    return fixed + struct.pack("<I", zlib.crc32(rest, zlib.crc32(fixed))) + rest


@pytest.mark.parametrize("text", TEXTS)
def test_every_single_flipped_bit_is_found(text: str):
    _, far, frame = ends(text)
    for at in range(len(frame)):
        broken = bytearray(frame)
        broken[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"damaged|awaited|no codec's frame|of format|other than"):
            far.decode(broken, CONTEXT)
    far.decode(frame, CONTEXT)


@pytest.mark.parametrize("text", TEXTS)
def test_a_frame_cut_short_or_drawn_out_is_refused(text: str):
    _, far, frame = ends(text)
    for end in range(len(frame)):
        with pytest.raises(ValueError, match=r"damaged|ends early"):
            far.decode(frame[:end], CONTEXT)
        if end >= HEADER.size:
            with pytest.raises(ValueError, match=r"malformed|ends early|awaits|do not name|claims"):
                far.decode(resealed(frame[:end]), CONTEXT)
    with pytest.raises(ValueError, match=r"malformed"):
        far.decode(resealed(frame + b"\0"), CONTEXT)


FAR = {text: ends(text) for text in TEXTS}


@pytest.mark.parametrize("text", TEXTS)
@given(data=st.data())
@settings(max_examples=250)
def test_forged_frames_end_in_a_tensor_or_a_value_error(text: str, data: st.DataObject):
    """Mutations with a fitting checksum reach the inner parts: no crash, and nothing larger than the limit."""
    _, _, frame = FAR[text]
    body = bytearray(frame[HEADER.size :])
    for _ in range(data.draw(st.integers(1, 4))):
        # Most lies are told near the front, where the sizes are.
        at = data.draw(st.one_of(st.integers(0, min(24, len(body) - 1)), st.integers(0, len(body) - 1)))
        match data.draw(st.sampled_from(["set", "insert", "delete", "repeat"])):
            case "set":
                body[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 255])))
            case "insert":
                body[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete" if len(body) > 1:
                del body[at : at + data.draw(st.integers(1, 5))]
            case _:
                body[at:at] = body[at : at + 4]
        if not body:
            break
    _, far, _ = ends(text)
    try:
        x = far.decode(resealed(frame[: HEADER.size] + bytes(body)), CONTEXT)
    except ValueError:
        return
    assert x.numel() <= CONTEXT.limit


@given(junk=st.binary(max_size=200), text=st.sampled_from(TEXTS))
@settings(max_examples=300)
def test_junk_is_refused(junk: bytes, text: str):
    with pytest.raises(ValueError, match="frame"):
        codec(text).decode(junk, CONTEXT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": 6}, "is of step 5, micro-batch 2, forward; step 6, micro-batch 2, forward is awaited"),
        ({"micro_batch": 3}, "micro-batch 3, forward is awaited"),
        ({"direction": "backward"}, "micro-batch 2, backward is awaited"),
    ],
)
def test_a_frame_of_another_transfer_is_refused(change: dict[str, object], says: str):
    _, far, frame = ends("int8")
    with pytest.raises(ValueError, match=says):
        far.decode(frame, replace(CONTEXT, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [*CODECS, "int4", "int(8, 'sample')", "int8+deflate", "int8|int8"])
def test_a_frame_of_another_codec_is_refused(other: str):
    if codec(other).text != codec("int8").text:
        with pytest.raises(ValueError, match="other than"):
            codec(other).decode(codec("int8").encode(torch.ones(2, 2)))


def test_sizes_are_refused_before_anything_is_made():
    """A frame of a few bytes that claims a terabyte costs neither time nor memory."""
    for shape in ((10**6, 10**6), (0, 10**15), (2**31, 2**31, 0), (2**62,), (1001,)):
        for text in ("topk(0.1)", "deflate", "sign", "c3sl(4)", "identity"):
            far = codec(text)
            frame = far.encode(torch.zeros(0), CONTEXT).numpy().tobytes()
            head = written(Layout(shape, torch.float32))
            forged = resealed(frame[: HEADER.size] + head + number(0) + written(Layout((0,), torch.uint8)))
            tracemalloc.start()
            start = time.perf_counter()
            with pytest.raises(ValueError, match=r"more than the 1000 elements|malformed"):
                far.decode(forged, CONTEXT)
            assert time.perf_counter() - start < 1
            assert tracemalloc.get_traced_memory()[1] < 100_000
            tracemalloc.stop()


def test_a_deflated_bomb_stops_at_the_size_it_claims():
    far = codec("deflate")
    bomb = zlib.compress(bytes(50_000_000))
    parts = written(Layout((100,), torch.uint8)) + number(1) + b"\x01" + written(Layout((len(bomb),), torch.uint8))
    frame = far.encode(torch.zeros(0), CONTEXT).numpy().tobytes()
    context = replace(CONTEXT, limit=100_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not inflate to the 100 bytes"):
        far.decode(resealed(frame[: HEADER.size] + parts + bomb), context)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, memoryview, lambda b: torch.frombuffer(bytearray(b), dtype=torch.uint8)]
)
def test_a_frame_may_come_as_any_kind_of_bytes_and_is_not_held(kind: object):
    x = torch.randn(3, 4)
    data = bytearray(codec("identity").encode(x).numpy().tobytes())
    y = codec("identity").decode(kind(data))  # type: ignore[operator]
    data[:] = bytes(len(data))
    assert torch.equal(x, y)


def test_what_does_not_travel_is_refused():
    with pytest.raises(ValueError, match="complex64 does not travel"):
        codec("identity").encode(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="17 dimensions"):
        codec("identity").encode(torch.zeros([1] * 17))


@given(st.integers(0, 2**63 - 1))
def test_numbers_of_any_size_come_back(value: int):
    reader = Reader(number(value))
    assert reader.number("it") == value
    reader.end("it")


def test_numbers_without_an_end_are_refused():
    with pytest.raises(ValueError, match="larger than any size"):
        Reader(b"\xff" * 20).number("it")
    with pytest.raises(ValueError, match="ends early"):
        Reader(b"\xff").number("it")
