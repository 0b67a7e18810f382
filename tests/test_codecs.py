"""What holds for every codec: a frame brings back the shape, its length is known beforehand, two ends stay equal."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merak_like.runtime.codecs import CODECS, Codec, Context, codec
from merak_like.runtime.codecs.codec import by_sample
from merak_like.runtime.codecs.loopback import Loopback

TEXTS = [
    "identity", "fp16", "bf16", "int8", "int3", "int1", "int(4, 'sample')", "int(5, 'tensor')",
    "int(4, stochastic=True)", "sign", "sign('channel')", "topk(0.1)", "topk(0.7)", "randtopk(0.2, 0.3)",
    "aqsgd(4)", "aqsgd(2, 'bf16')", "c3sl(4)", "c3sl(3, unitary=True)", "deflate",
    "topk(0.1)+int8+deflate", "c3sl(2)+int4", "aqsgd(3)+deflate|topk(0.2)+int4", "int8|aqsgd(4)",
]  # fmt: skip
ALIKE = [text for text in TEXTS if "deflate" not in text and "aqsgd" not in text]
SHAPES = [(6, 5, 8), (7, 16), (3, 2, 2, 5), (1, 9), (33,), (1,), (), (0,), (0, 4), (3, 0), (2, 3, 0)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def both(step: int, rows: int) -> tuple[Context, Context]:
    forward = Context(step=step, samples=tuple(range(100, 100 + rows)))
    return forward, replace(forward, direction="backward")


def rounds(text: str, tensors: list[Tensor]) -> list[tuple[int, Tensor, Context]]:
    """Send each tensor there and back, one step each: bytes, what arrived and the context."""
    near, far = codec(text), codec(text)
    out: list[tuple[int, Tensor, Context]] = []
    for step, x in enumerate(tensors):
        for context, sender, receiver in zip(
            both(step, by_sample(tuple(x.shape))[0]), (near, far), (far, near), strict=True
        ):
            frame = sender.encode(x, context)
            assert frame.dtype == torch.uint8
            assert frame.dim() == 1
            out.append((frame.numel(), receiver.decode(frame, context), context))
    return out


@pytest.mark.parametrize("text", TEXTS)
def test_every_shape_and_dtype_arrives_as_it_left(text: str):
    for shape in SHAPES:
        for dtype in DTYPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            for _, y, _ in rounds(text, [x, x]):
                assert (y.shape, y.dtype) == (x.shape, x.dtype)
                assert y.isfinite().all()


@pytest.mark.parametrize("text", TEXTS)
def test_length_of_a_frame_is_known_before_the_tensor(text: str):
    for shape in SHAPES:
        for dtype in DTYPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            near, far = codec(text), codec(text)
            for step in range(2):  # the first visit of a sample is whole in aqsgd, the second is not
                ends = zip(both(step, by_sample(shape)[0]), (near, far), (far, near), strict=True)
                for context, sender, receiver in ends:
                    told = sender.wire_bytes(shape, dtype, context)
                    assert receiver.wire_bytes(shape, dtype, context) == told
                    frame = sender.encode(x, context)
                    receiver.decode(frame, context)
                    length = frame.numel()
                    assert length <= told if "deflate" in text else length == told, (shape, dtype, context)
                    if step:  # what whoever has not seen the samples counts with
                        assert told == codec(text).wire_bytes(shape, dtype, replace(context, samples=()))


def test_codecs_say_whether_their_length_is_exact():
    assert [text for text in TEXTS if not codec(text).fixed] == [text for text in TEXTS if "deflate" in text]


@pytest.mark.parametrize("text", ALIKE)
@given(shape=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_length_is_exact_for_any_shape(text: str, shape: list[int], seed: int):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert codec(text).encode(x).numel() == codec(text).wire_bytes(tuple(shape), x.dtype)


@pytest.mark.parametrize("text", TEXTS)
def test_strides_do_not_matter(text: str):
    x = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(2))
    views = [x.transpose(0, 2), x[::2], x[:, 1:4], x.expand(3, 8, 6, 4)[1], x.flip(0)]
    for view in views:
        for (_, y, _), (_, z, _) in zip(rounds(text, [view]), rounds(text, [view.clone().contiguous()]), strict=True):
            torch.testing.assert_close(y, z, rtol=0, atol=0)


@pytest.mark.parametrize("text", TEXTS)
def test_neither_the_tensor_nor_the_global_random_state_is_touched(text: str):
    x = torch.randn(4, 8, requires_grad=True)
    before, state = x.detach().clone(), torch.get_rng_state()
    rounds(text, [x])  # type: ignore[list-item]
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_transfer_makes_the_same_frame(text: str):
    x = torch.randn(4, 8)
    context = both(3, 4)[0]
    assert torch.equal(codec(text).encode(x, context), codec(text).encode(x, context))


@pytest.mark.parametrize("text", TEXTS)
def test_state_goes_on_where_it_was_taken(text: str):
    """A new pair of codecs with the old pair's states sends, byte for byte, what the old pair does."""
    xs = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    near, far = codec(text), codec(text)

    def send(near: Codec, far: Codec, step: int, x: Tensor) -> Tensor:
        forward, backward = both(step, 5)
        frames = [near.encode(x, forward)]
        far.decode(frames[0], forward)
        frames.append(far.encode(x, backward))
        near.decode(frames[1], backward)
        return torch.cat(frames)

    for step in (0, 1):
        send(near, far, step, xs[step])
    twin_near, twin_far = codec(text), codec(text)
    for twin, old in ((twin_near, near), (twin_far, far)):
        state = {name: value.clone() for name, value in copy.deepcopy(old.state_dict()).items()}
        twin.load_state_dict(state)
        assert {k: v.tolist() for k, v in twin.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    for step in (2, 3):
        assert torch.equal(send(near, far, step, xs[step]), send(twin_near, twin_far, step, xs[step]))


@pytest.mark.parametrize("text", TEXTS)
def test_foreign_state_is_refused(text: str):
    with pytest.raises(ValueError, match="state"):
        codec(text).load_state_dict({"nobody.knows": torch.zeros(1)})


@pytest.mark.parametrize("text", ["identity", "deflate", "deflate(9)"])
def test_lossless_codecs_are_for_any_dtype_and_any_value(text: str):
    for dtype in (*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool):
        x = torch.randint(0, 2, (5, 7)).to(dtype)
        assert torch.equal(codec(text).decode(codec(text).encode(x)), x)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3e38])
    assert codec(text).decode(codec(text).encode(odd)).view(torch.int32).equal(odd.view(torch.int32))


@pytest.mark.parametrize("text", [t for t in ALIKE if t not in ("identity",)] + ["aqsgd(4)"])
def test_lossy_codecs_refuse_whole_numbers(text: str):
    with pytest.raises(ValueError, match="carries floating-point tensors, found int64"):
        codec(text).encode(torch.arange(4))


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_not_finite_is_seen_by_the_receiver(text: str):
    """A step with a NaN is skipped by whoever looks for it: no codec may make it look healthy."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(4, 6, 8)
        x[1, 2, 3] = bad
        near, far = codec(text), codec(text)
        context = both(0, 4)[0]
        assert not far.decode(near.encode(x, context), context).isfinite().all()
        healthy = torch.randn(4, 6, 8)
        context = replace(context, step=1)
        assert far.decode(near.encode(healthy, context), context).isfinite().all()


@pytest.mark.parametrize("text", [t for t in TEXTS if "c3sl" not in t])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_finite_stays_finite_at_the_edge_of_the_range(text: str, dtype: torch.dtype):
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    x = torch.tensor([[most, -most, most / 2, 0.0] * 4] * 3, dtype=dtype)
    for _, y, _ in rounds(text, [x]):
        assert y.isfinite().all()


@pytest.mark.parametrize("text", TEXTS)
def test_zeros_arrive_as_zeros(text: str):
    for _, y, _ in rounds(text, [torch.zeros(4, 8), torch.zeros(4, 8)]):
        assert not y.any()


@pytest.mark.parametrize("text", TEXTS)
def test_a_model_trains_through_a_loopback(text: str):
    torch.manual_seed(0)
    x, target = torch.randn(16, 6), torch.randn(16, 1)
    front, back = torch.nn.Linear(6, 16), torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD([*front.parameters(), *back.parameters()], 0.02)
    link = Loopback(codec(text), codec(text))
    losses: list[float] = []
    for step in range(60):
        hidden = link(front(x).tanh(), both(step, 16)[0])
        loss = (back(hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert front.weight.grad is not None
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < losses[0]
    assert link.sent["forward"] > 0 < link.sent["backward"]


def test_a_loopback_through_identity_changes_nothing():
    x = torch.randn(4, 3, requires_grad=True)
    y = Loopback(codec("identity"), codec("identity"))(x * 2)
    (y**2).sum().backward()
    assert torch.equal(x.grad, 8 * x.detach())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two ends"):
        Loopback(codec("int8"), codec("int4"))


def test_every_codec_is_tried_here():
    assert all(any(name in text for text in TEXTS) for name in CODECS)
