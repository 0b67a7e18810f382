"""AQ-SGD: both ends hold the same memory whatever the line does, and the error shrinks as training settles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from merak_like.runtime.codecs import Codec, Context, OutOfStep, codec
from merak_like.runtime.codecs.aqsgd import AqSgd
from merak_like.runtime.codecs.loopback import Loopback
from merak_like.runtime.codecs.memory import Memory, fingerprints


def pair(text: str = "aqsgd(4)") -> tuple[AqSgd, AqSgd]:
    near, far = codec(text), codec(text)
    assert isinstance(near, AqSgd)
    assert isinstance(far, AqSgd)
    return near, far


def held(end: Codec) -> dict[str, list[object]]:
    return {name: value.tolist() for name, value in end.state_dict().items()}


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_first_visit_is_whole_and_later_ones_are_changes():
    near, far = pair()
    x = values(0, 4, 6, 8)
    context = Context(samples=(7, 8, 9, 10))
    first = near.encode(x, context)
    assert torch.equal(far.decode(first, context), x)
    later = replace(context, step=1)
    frame = near.encode(x + 0.01, later)
    assert frame.numel() < first.numel() / 4
    y = far.decode(frame, later)
    assert (y - x - 0.01).abs().max() <= 0.01 * (1 + 2**-7) / 8  # one step of a grid as wide as the change
    assert held(near) == held(far)


def test_a_first_visit_in_double_precision_is_within_the_limit():
    """Its 8 bytes an element and a head in front were one head more than a chain allowed."""
    near, far = codec("aqsgd(4)|int8"), codec("aqsgd(4)|int8")
    x = values(0, 4, 6, 8).double()
    context = Context(samples=(7, 8, 9, 10), limit=x.numel())
    assert torch.allclose(far.decode(near.encode(x, context), context), x, atol=0.05)


def test_known_and_new_samples_travel_in_one_frame():
    near, far = pair()
    x = values(0, 3, 8)
    context = Context(samples=(1, 2, 3))
    far.decode(near.encode(x, context), context)
    mixed = Context(step=1, samples=(3, 9, 1))
    arrived = far.decode(near.encode(x[[2, 1, 0]], mixed), mixed)
    assert torch.equal(arrived, x[[2, 1, 0]])  # nothing changed for 3 and 1, and 9 came whole
    assert held(near) == held(far)
    assert len(near.memory) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store", ["same", "fp16", "bf16"])
def test_memories_are_bit_equal_after_100_steps(dtype: torch.dtype, store: str):
    near, far = pair(f"aqsgd(3, {store!r})")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, 8, generator=generator)
    for step in range(100):
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        chosen = torch.randperm(40, generator=generator)[:8]
        context = Context(step=step, samples=tuple(chosen.tolist()))
        far.decode(near.encode(x[chosen].to(dtype), context), context)
        assert held(near) == held(far)
    assert len(far.memory) == 40


def test_a_lost_frame_is_found_and_repaired():
    near, far = pair()
    x, context = values(0, 4, 8), Context(samples=(1, 2, 3, 4))
    far.decode(near.encode(x, context), context)
    near.encode(x[:2] + 1, Context(step=1, samples=(1, 2)))  # lost on the way
    before = held(far)
    context = Context(step=2, samples=(1, 2, 3, 4))
    with pytest.raises(OutOfStep, match=r"for 2 samples \(1, 2\)") as error:
        far.decode(near.encode(x + 2, context), context)
    assert error.value.samples == (1, 2)
    assert held(far) == before  # nothing was applied
    near.forget(context.samples)
    assert torch.equal(far.decode(near.encode(x + 2, context), context), x + 2)
    assert held(near) == held(far)


@pytest.mark.parametrize("fault", ["twice", "swapped", "other samples"])
def test_what_comes_twice_swapped_or_for_others_is_found(fault: str):
    near, far = pair()
    x, samples = values(0, 2, 8), (1, 2)
    first = Context(samples=samples)
    far.decode(near.encode(x, first), first)
    # Same step and micro-batch, so that only the memories can tell.
    frames = [near.encode(x + 1, first), near.encode(x + 2, first)]
    if fault == "twice":
        far.decode(frames[0], first)
        with pytest.raises(OutOfStep):
            far.decode(frames[0], first)
    elif fault == "swapped":
        with pytest.raises(OutOfStep):
            far.decode(frames[1], first)
        far.decode(frames[0], first)
        far.decode(frames[1], first)
        assert held(near) == held(far)
    else:
        with pytest.raises(OutOfStep):
            far.decode(frames[0], replace(first, samples=(2, 1)))
        whole = pair()[0].encode(x, first)
        with pytest.raises(ValueError, match="do not name the same samples"):
            pair()[1].decode(whole, replace(first, samples=(2, 1)))


@given(st.lists(st.sampled_from(["sent", "lost", "damaged", "twice", "late"]), min_size=1, max_size=25))
@settings(max_examples=40)
def test_ends_are_equal_again_after_any_faults(fates: list[str]):
    """Whatever the line does, the receiver either has what was sent to within a step of the grid, or says so."""
    near, far = pair("aqsgd(8)")
    kept: tuple[Tensor, Context] | None = None
    for step, fate in enumerate(fates):
        samples = tuple((step * 3 + i) % 7 for i in range(3))
        context, x = Context(step=step, samples=samples), values(step, 3, 16)
        frame = near.encode(x, context)
        if fate == "lost":
            continue
        if fate == "damaged":
            broken = frame.clone()
            broken[-1] ^= 1
            with pytest.raises(ValueError, match="damaged"):
                far.decode(broken, context)
        if fate == "late" and kept is not None:
            with pytest.raises(ValueError, match="is awaited"):
                far.decode(kept[0], context)
        try:
            y = far.decode(frame, context)
        except OutOfStep:
            near.forget(samples)
            y = far.decode(near.encode(x, context), context)
        assert (y - x).abs().max() <= 0.1
        if fate == "twice":
            before = held(far)
            try:
                far.decode(frame, context)
            except OutOfStep:
                assert held(far) == before
        kept = frame, context
    everything = Context(step=99, samples=tuple(range(7)))
    near.forget()
    far.decode(near.encode(values(99, 7, 16), everything), everything)
    assert held(near) == held(far)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_and_does_not_stay(bad: float):
    """A known sample's goes through the grid, whose scale is the channel's: a frame's length depends on no number."""
    near, far = pair()
    x, samples = values(0, 3, 8), (1, 2, 3)
    for step, finite in enumerate([[True, False, True], [True] * 3, [False] * 3, [True] * 3]):
        sick = x.clone()
        if not all(finite):
            sick[1, 4] = bad
        context = Context(step=step, samples=samples)
        told = near.wire_bytes(tuple(x.shape), x.dtype, context)
        frame = near.encode(sick, context)
        assert frame.numel() == told
        y = far.decode(frame, context)
        assert y.isfinite().all(1).tolist() == finite
        assert held(near) == held(far)
        assert len(near.memory) == sum(finite)
    assert torch.equal(y, x)  # whole again


def test_another_shape_or_dtype_is_a_new_beginning():
    near, far = pair()
    for step, x in enumerate([values(0, 2, 5, 4), values(1, 2, 7, 4), values(2, 2, 7, 4).double()]):
        context = Context(step=step, samples=(1, 2))
        assert torch.equal(far.decode(near.encode(x, context), context), x)
    assert held(near) == held(far)


@pytest.mark.filterwarnings("ignore:samples take more than the 800 bytes")
def test_memory_stays_within_its_bytes_and_equal_on_both_ends():
    """Beyond them are only rows of the step under way, though its micro-batches come in another order there."""
    near, far = pair("aqsgd(4, capacity=800)")
    x = values(0, 40, 10)
    for step in range(12):
        samples = tuple((step * 7 + i * i) % 40 for i in range(5))
        samples = tuple(dict.fromkeys(samples))
        parts = [Context(step=step, micro_batch=i, samples=one) for i, one in enumerate((samples[:2], samples[2:]))]
        frames = [near.encode(x[list(part.samples)], part) for part in parts]
        for part, frame in reversed([*zip(parts, frames, strict=True)]):
            assert far.wire_bytes((len(part.samples), 10), x.dtype, part) == frame.numel()
            far.decode(frame, part)
        assert near.memory.nbytes <= 800 + 40 * len(samples)
        assert held(near) == held(far)
    near.memory.begin(12)
    assert (len(near.memory), near.memory.nbytes) == (20, 800)
    near.forget()
    assert (len(near.memory), near.memory.nbytes) == (0, 0)


def test_without_training_nothing_is_remembered():
    near, far = pair()
    x, context = values(0, 2, 8), Context(training=False)
    assert torch.equal(far.decode(near.encode(x, context), context), x)
    assert not len(near.memory) + len(far.memory)
    with pytest.raises(ValueError, match="trains and the other does not"):
        far.decode(near.encode(x, context), Context(samples=(1, 2)))


@pytest.mark.parametrize(("samples", "says"), [((), "found 0"), ((1,), "found 1"), ((3, 3), "occurs twice")])
def test_samples_must_be_named_once_each(samples: tuple[int, ...], says: str):
    with pytest.raises(ValueError, match=says):
        codec("aqsgd").encode(values(0, 2, 8), Context(samples=samples))


def test_state_that_does_not_fit_together_is_refused():
    near, _ = pair()
    near.encode(values(0, 3, 8), Context(samples=(1, 2, 3)))
    state = near.state_dict()
    for broken in (
        {k: v for k, v in state.items() if k != "order"},
        state | {"order": state["order"][:2]},
        state | {"0.samples": state["0.samples"][:2]},
    ):
        with pytest.raises(ValueError, match="the state of a memory"):
            pair()[0].load_state_dict(broken)


def test_wire_against_fp32():
    x = values(0, 32, 128, 8)
    for text, least in (("aqsgd(2)|int8", 15), ("aqsgd(4)|int4", 7.7)):
        near, far = codec(text), codec(text)
        context = Context(samples=tuple(range(32)))
        far.decode(near.encode(x, context), context)
        frame = near.encode(x + 0.1, context)
        assert x.nbytes / frame.numel() >= least


def trained(text: str, epochs: int = 30) -> tuple[list[float], float]:
    """Relative error of what arrives, by epoch, and the last training loss; 192 fixed samples, no dropout."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(192, 12, generator=generator)
    labels = (x[:, :6].square().sum(1) - x[:, 6:].square().sum(1) > 0).long()
    front = nn.Sequential(nn.Linear(12, 64), nn.Tanh())
    back = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam([*front.parameters(), *back.parameters()], 1e-3)
    link = Loopback(codec(text), codec(text))
    errors: list[float] = []
    losses: list[float] = []
    for epoch in range(epochs):
        wrong = right = total = 0.0
        for i, chosen in enumerate(torch.randperm(192, generator=generator).split(32)):
            hidden = front(x[chosen])
            arrived = link(hidden, Context(step=epoch * 6 + i, samples=tuple(chosen.tolist())))
            loss = nn.functional.cross_entropy(back(arrived), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            wrong += (arrived - hidden).detach().square().sum().item()
            right += hidden.detach().square().sum().item()
            total += loss.item() / 6
        errors.append((wrong / right) ** 0.5)
        losses.append(total)
    return errors, losses[-1]


def test_error_shrinks_where_direct_quantisation_stays():
    """The paper's point: 2 bits of the change end with at most a third of the error of 2 bits of the value."""
    direct, direct_loss = trained("int2|int8")
    change, change_loss = trained("aqsgd(2)|int8")
    _, exact_loss = trained("identity")
    assert change[-1] <= direct[-1] / 3
    assert change[-1] <= change[1]
    assert abs(change_loss - exact_loss) <= 0.05
    assert abs(change_loss - exact_loss) <= abs(direct_loss - exact_loss) / 2


def test_checksums_tell_rows_and_samples_apart():
    rows = values(0, 64, 3, 5)
    tags = fingerprints(rows, range(64))
    assert len(set(tags)) == 64
    assert fingerprints(rows[:1].expand(64, 3, 5), range(64)) != fingerprints(rows[:1].expand(64, 3, 5), [0] * 64)
    for i in range(rows[0].numel()):
        for bit in (0, 11, 30):
            other = rows[:1].clone()
            other.view(-1).view(torch.int32)[i] ^= 1 << bit
            assert fingerprints(other, [0]) != tags[:1]
    # Another machine or release must compute the same.
    assert fingerprints(torch.arange(12.0).view(2, 6), (5, 6)) == [1359297469, 92940877]
    assert fingerprints(torch.empty(0, 4), ()) == []


def test_least_recently_used_goes_first():
    memory = Memory(16)
    rows = torch.arange(4.0).view(4, 1)
    memory.put((1, 2, 3, 4), rows, [0] * 4)
    memory.begin(1)
    memory.put((5,), rows[:1], [0], micro_batch=1)
    memory.put((1,), rows[:1], [0], micro_batch=0)
    assert memory.state_dict()["order"].tolist() == [2, 3, 4, 1, 5]  # none goes within the step
    with pytest.warns(UserWarning, match="samples take more than the 16 bytes.*capacity="):
        memory.begin(2)
    assert memory.state_dict()["order"].tolist() == [3, 4, 1, 5]


def test_a_codec_says_whether_it_remembers_samples():
    said = {
        text: codec(text).remembers
        for text in ("aqsgd(4)", "int8|aqsgd(2)", "aqsgd(2)+deflate", "topk(0.1)+int4", "c3sl(2)|int8")
    }
    assert list(said.values()) == [True, True, True, False, False]
