"""What each lossy codec promises: its bound, its bytes, its mean, its transpose."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.bits import index_bytes, pack, pack_indices, packed_bytes, unpack, unpack_indices
from merak_like.runtime.codecs.convolution import C3SL
from merak_like.runtime.codecs.wire import layout_of

KNOWN_KEYS = [0.006057847941798364, -0.0012019866183115146, 0.0033552677945319935]
"""The first elements for seed 1: other numbers on another machine or release would part the two ends of a link."""


def through(text: str, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
    return codec(text).decode(codec(text).encode(x, context), context)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- packing


@given(width=st.integers(1, 40), values=st.lists(st.integers(0, 2**40 - 1), max_size=40))
@settings(max_examples=200)
def test_numbers_pack_into_the_bytes_told_and_come_back(width: int, values: list[int]):
    codes = torch.tensor([v % 2**width for v in values], dtype=torch.int64)
    data = pack(codes, width)
    assert data.numel() == packed_bytes(len(values), width)
    assert unpack(data, width, len(values)).tolist() == codes.tolist()


def test_numbers_lie_lowest_bit_first():
    assert pack(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]
    assert pack(torch.tensor([1, 0, 3, 2]), 2).tolist() == [0b10_11_00_01]


@given(
    st.integers(0, 3000).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(n - 1, 0)), max_size=n)))
)
@settings(max_examples=200)
def test_indices_pack_into_the_bytes_told_and_come_back(case: tuple[int, set[int]]):
    size, chosen = case
    indices = torch.tensor(sorted(chosen), dtype=torch.int64)
    data = pack_indices(indices, size)
    assert data.numel() == index_bytes(len(chosen), size)
    assert torch.equal(unpack_indices(data, len(chosen), size), indices)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.3, 0.5])
def test_indices_take_little_more_than_any_code_must(share: float):
    """Against the binary entropy, the least there is for a random set; and never more than a bitmap."""
    size = 100_000
    count = round(share * size)
    bits = 8 * index_bytes(count, size)
    entropy = -size * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert entropy <= bits <= min(entropy + 0.65 * count, size)


# -- a grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per", ["channel", "sample", "tensor"])
def test_uniform_errs_by_half_a_step(bits: int, per: str, dtype: torch.dtype):
    x = (normal(40, 16) * torch.logspace(-6, 3, 16)).to(dtype)
    y = through(f"int({bits}, {per!r})", x)
    dim = {"channel": 0, "sample": 1, "tensor": (0, 1)}[per]
    most = x.double().abs().amax(dim, keepdim=True)
    step = most * (1 + 2**-7) / 2 ** (bits - 1)  # the scale travels as bf16
    rounding = torch.finfo(dtype).eps * (most + torch.finfo(dtype).tiny)
    error = (y.double() - x.double()).abs()
    assert (error <= step + rounding).all()
    sign = torch.where(x.double().amax(dim, keepdim=True) == most, 1, -1)
    inside = x.double() * -sign <= most - 1.5 * step  # all but the last step of the short end
    assert (error <= step / 2 + rounding)[inside].all()


def test_uniform_keeps_zero_and_uses_the_whole_grid_for_one_sign():
    x = torch.tensor([[0.0, 0.25], [0.5, 0.75], [1.0, 1.0]]).repeat(1, 2)
    assert torch.equal(through("int3", x), x)
    assert torch.equal(through("int3", -x), -x)


@pytest.mark.parametrize("bits", [2, 4])
def test_stochastic_rounding_has_the_right_mean(bits: int):
    """QSGD's lemma: unbiased. The mean of n draws lies within 5 of its own standard deviations, for every element."""
    x, n = normal(6, 5, seed=3), 600
    sender, receiver = codec(f"int({bits}, stochastic=True)"), codec(f"int({bits}, stochastic=True)")
    contexts = [Context(step=i) for i in range(n)]
    draws = torch.stack([receiver.decode(sender.encode(x, c), c) for c in contexts])
    step = x.abs().amax(0) * (1 + 2**-7) / (2 ** (bits - 1) - 1)
    assert ((draws - x).abs() <= step * 1.0001).all()
    assert ((draws.mean(0) - x).abs() <= 5 * step / 2 / math.sqrt(n)).all()
    nearest = through(f"int{bits}", x) - x
    assert nearest.abs().max() > 3 * (draws.mean(0) - x).abs().max()


@pytest.mark.parametrize(
    ("text", "least"), [("int8", 3.9), ("int4", 7.8), ("int2", 15.3), ("sign", 31.0), ("int1", 29)]
)
def test_ratio_against_fp32_counts_every_byte(text: str, least: float):
    x = normal(32, 128, 64)
    assert x.nbytes / codec(text).encode(x).numel() >= least


def test_sign_is_the_best_two_valued_approximation():
    x = normal(50, 20)
    y = through("sign", x)
    assert torch.equal(y.sign(), x.sign())
    assert y.abs().unique().numel() == 1
    best = x.square().sum() - x.numel() * x.abs().mean() ** 2
    torch.testing.assert_close((x - y).square().sum(), best, rtol=1e-3, atol=0)
    for scale in (0.9, 1.1):
        assert (x - scale * y).square().sum() > best


# -- the largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_topk_keeps_the_largest_of_every_sample_exactly(dtype: torch.dtype):
    x = normal(5, 4, 25).to(dtype)
    y = through("topk(0.07)", x).view(5, -1)
    for sent, whole in zip(y, x.view(5, -1), strict=True):
        kept = sent.nonzero().view(-1)
        assert sorted(kept.tolist()) == sorted(whole.abs().topk(7).indices.tolist())
        assert torch.equal(sent[kept], whole[kept])


def test_gradient_of_topk_travels_for_what_was_sent_and_without_indices():
    near, far = codec("topk(0.1)"), codec("topk(0.1)")
    x, gradient = normal(8, 100), normal(8, 100, seed=1)
    forward, backward = Context(step=4), Context(step=4, direction="backward")
    out = near.encode(x, forward)
    mask = far.decode(out, forward) != 0
    back = far.encode(gradient, backward)
    assert torch.equal(near.decode(back, backward), gradient * mask)
    assert out.numel() - back.numel() == index_bytes(80, 800)
    with pytest.raises(ValueError, match="counts on the indices of its forward"):
        codec("topk(0.1)").decode(back, backward)
    with pytest.raises(ValueError, match="its forward had another shape"):
        far.encode(gradient[:4], backward)


def test_topk_remembers_one_step_and_nothing_without_training():
    near = codec("topk(0.5)")
    for step in range(3):
        for micro_batch in range(2):
            near.encode(normal(2, 4), Context(step=step, micro_batch=micro_batch))
    assert sorted(near.state_dict()) == ["2.0", "2.1"]
    near.forget()
    near.encode(normal(2, 4), Context(training=False))
    assert not near.state_dict()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_randtopk_draws_others_with_probability_alpha(alpha: float):
    """Of 10 largest among 50, 10 (1 - alpha) travel on the average, every one as often; the others share the rest."""
    x = torch.arange(1.0, 51).repeat(400, 1)
    y = through(f"randtopk(0.2, {alpha})", x)
    assert ((y != 0).sum(1) == 10).all()
    often = (y != 0).double().mean(0)
    assert (often[40:] - (1 - alpha)).abs().max() <= 5 * 0.5 / 20
    assert (often[:40] - alpha / 4).abs().max() <= 5 * 0.5 / 20
    assert often[:40].mean() == pytest.approx(alpha / 4, abs=0.02)
    largest = through(f"randtopk(0.2, {alpha})", x, Context(training=False))
    assert torch.equal(largest != 0, x > 40)


# -- superposition


def test_circular_convolution_is_the_direct_one():
    z = normal(6, 3, 11).double()
    coder = C3SL(group=3)
    body, _ = coder.pack(z, Context())
    keys, rows = coder.keys(3, 33).numpy(), z.view(6, 33).numpy()
    for g in range(2):
        direct = np.zeros(33)
        for i in range(3):
            for n in range(33):
                direct[n] += sum(keys[i, m] * rows[3 * g + i, (n - m) % 33] for m in range(33))
        np.testing.assert_allclose(body[g].numpy(), direct, atol=1e-6)


@pytest.mark.parametrize("text", ["c3sl(4)", "c3sl(4, unitary=True)", "c3sl(1)"])
@pytest.mark.parametrize("samples", [1, 2, 5, 8, 9, 11])
def test_what_goes_back_is_the_gradient_of_what_came(text: str, samples: int):
    """unpack is the transpose of pack: the far end sends dL/dV exactly, the near end turns it into dL/dZ exactly."""
    coder = codec(text)
    layout = torch.zeros(samples, 24, dtype=torch.float64)
    body = torch.zeros(coder.pack(layout, Context())[0].shape, dtype=torch.float64, requires_grad=True)
    arrived = coder.unpack(body, b"", layout_of(layout), Context())
    gradient = normal(samples, 24, seed=5).double()
    (by_autograd,) = torch.autograd.grad(arrived, body, gradient)
    torch.testing.assert_close(coder.pack(gradient, Context())[0], by_autograd)


@pytest.mark.parametrize("group", [2, 4, 8, 16])
@pytest.mark.parametrize("unitary", [False, True])
def test_superposition_errs_as_much_as_is_known(group: int, unitary: bool):
    x = normal(64, 1024)
    y = through(f"c3sl({group}, unitary={unitary})", x)
    energy = ((y - x).square().sum() / x.square().sum()).item()
    assert energy == pytest.approx(group - unitary, rel=0.2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_superposition_sends_one_sample_for_the_group(direction: str):
    x, context = normal(256, 512), Context(direction=direction)  # type: ignore[arg-type]
    around = codec("identity").encode(x, context).numel() - x.nbytes
    for group in (2, 4, 16):
        sent = codec(f"c3sl({group})").encode(x, context).numel()
        assert x.nbytes / group <= sent <= x.nbytes / group + around


def test_a_ragged_last_group_loses_no_sample():
    x = normal(9, 256)
    y = through("c3sl(4)", x)
    assert torch.equal(y[8], x[8])  # a group of one is sent as it is
    assert through("c3sl(1000000000)", x).shape == x.shape  # no keys are made for samples that are not there
    x = normal(10, 4096)
    y = through("c3sl(4)", x)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)
    assert (cosine[:8] - 5**-0.5).abs().max() < 0.05  # R times the energy in noise: 1 / sqrt(1 + R)
    assert (cosine[8:] - 3**-0.5).abs().max() < 0.05


def test_keys_are_of_unit_norm_and_depend_on_the_seed_alone():
    keys = C3SL(group=3, seed=1).keys(3, 500)
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(keys[:2], C3SL(group=8, seed=1).keys(2, 500))
    assert not torch.allclose(keys, C3SL(group=3, seed=2).keys(3, 500))
    assert keys[0, :3].tolist() == pytest.approx(KNOWN_KEYS, abs=1e-12)
    torch.testing.assert_close(C3SL(3, True).keys(3, 500).norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_halves_err_by_their_mantissa_and_never_overflow():
    x = torch.cat([normal(1000) * 100, torch.tensor([1e6, -1e6])])
    half = through("fp16", x)
    assert ((half - x).abs()[:-2] <= x.abs()[:-2] * 2**-11 + 2**-25).all()
    assert half[-2:].tolist() == [65504, -65504]
    assert ((through("bf16", x) - x).abs() <= x.abs() * 2**-8).all()


def test_deflate_gains_on_what_repeats():
    x = torch.randint(0, 4, (64, 64)).float()
    context = Context()
    frame = codec("deflate").encode(x, context)
    assert frame.numel() < x.nbytes / 6
    assert codec("deflate").encode(normal(4), replace(context)).numel() <= codec("deflate").wire_bytes((4,), x.dtype)
