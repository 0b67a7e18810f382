"""Codecs between stages, without processes: what is coded, how long it is, what is drawn, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from merak_like import auto_parallel
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.runtime.coded_links import CodedLinks, link_codec
from merak_like.runtime.links import Spec
from merak_like.runtime.names import MOST, Names
from merak_like.runtime.rng import RNG
from tests.coded import chain

CPU = torch.device("cpu")
THERE, BACK = Action(Kind.SEND_F, 0, 0, 1), Action(Kind.SEND_B, 0, 1, 0)
HIDDEN = Spec("hidden", (2, 3, 8), torch.float32, True)
BESIDE = (Spec("mask", (2, 3), torch.float32, False), Spec("ids", (2, 3), torch.int64, False))


class Wire:
    """Both ends of links in one process; a receive must have been posted at the very size that is sent."""

    def __init__(self) -> None:
        self.due: dict[Action, dict[str, Spec]] = {}
        self.sent: dict[Action, dict[str, Tensor]] = {}

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        self.due[action] = {spec.name: spec for spec in specs}

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        self.sent[action.match] = {spec.name: values[spec.name].detach() for spec in specs}
        for spec in specs:
            assert (tuple(values[spec.name].shape), values[spec.name].dtype) == (spec.shape, spec.dtype)

    def take(self, action: Action) -> dict[str, Tensor]:
        due, sent = self.due.pop(action), self.sent[action]
        assert [*due] == [*sent]
        assert all((tuple(sent[n].shape), sent[n].dtype) == (s.shape, s.dtype) for n, s in due.items())
        return dict(sent)

    def flush(self) -> None:
        """Nothing is under way."""


class Pair:
    """Two stages that talk through a codec."""

    def __init__(self, text: str, step: int = 0, micro_batches: Sequence[int] = range(8)) -> None:
        self.wire, self.step, self.names = Wire(), step, [Names(text) for _ in range(2)]
        self.near, self.far = (
            CodedLinks(self.wire, text, steps=lambda: self.step, mine=micro_batches, seed=1, device=CPU, names=names)
            for names in self.names
        )

    def begin(self, step: int, *samples: Sequence[int]) -> None:
        """A step with micro-batches of these samples."""
        self.step = step
        parts = [{"x": torch.zeros(len(some))} for some in samples]
        for names in self.names:
            names.tell([one for some in samples for one in some], parts, [1] * len(parts), range(len(parts)))

    def carry(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sender, receiver = (self.near, self.far) if action.kind is Kind.SEND_F else (self.far, self.near)
        receiver.post(action.match, specs)
        sender.send(action, specs, values)
        return receiver.take(action.match)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    "text",
    ["identity", "fp16", "int4", "sign|bf16", "topk(0.3)+int8", "c3sl(2)", "randtopk(0.2)|int(3, stochastic=True)"],
)
def test_a_value_and_its_gradient_arrive_at_the_size_that_was_posted(text: str):
    pair, x = Pair(text), normal(2, 3, 8)
    there = pair.carry(THERE, [HIDDEN], {"hidden": x})["hidden"]
    back = pair.carry(BACK, [HIDDEN._replace(requires_grad=False)], {"hidden": 1e-3 * x})["hidden"]
    assert there.requires_grad
    assert not back.requires_grad
    assert there.shape == back.shape == x.shape
    assert torch.equal(there, x) == (text == "identity")


def test_a_gradient_goes_where_the_top_values_came_from():
    pair, x = Pair("topk(0.25)"), normal(2, 3, 8)
    there = pair.carry(THERE, [HIDDEN], {"hidden": x})["hidden"]
    back = pair.carry(BACK, [HIDDEN], {"hidden": torch.ones_like(x)})["hidden"]
    assert torch.equal(back != 0, there != 0)
    assert int((back != 0).sum()) == 2 * 6


def test_what_has_no_gradient_goes_as_it_is():
    pair, x = Pair("int8"), normal(2, 3, 8)
    mask, ids = torch.full((2, 3), -3e38), torch.arange(6).view(2, 3)
    state = Spec(RNG, (16,), torch.uint8, False)
    values = {"mask": mask, "hidden": x, "ids": ids, RNG: torch.arange(16, dtype=torch.uint8)}
    found = pair.carry(THERE, [BESIDE[0], HIDDEN, BESIDE[1], state], values)
    assert all(torch.equal(found[name], values[name]) for name in ("mask", "ids", RNG))
    assert not torch.equal(found["hidden"], x)


def test_nothing_is_coded_where_nothing_is_learnt():
    with torch.no_grad():
        assert torch.equal(Pair("int1").carry(THERE, [HIDDEN], {"hidden": normal(2, 3, 8)})["hidden"], normal(2, 3, 8))


def test_what_is_drawn_depends_on_the_transfer_and_not_on_the_layout():
    def drawn(action: Action = THERE, step: int = 0, micro_batches: Sequence[int] = range(8), at: int = 0) -> Tensor:
        specs = [HIDDEN._replace(name=f"{i}") for i in range(2)]
        values = {spec.name: normal(2, 3, 8) for spec in specs}
        return Pair("int(2, stochastic=True)", step, micro_batches).carry(action, specs, values)[f"{at}"]

    second = THERE._replace(micro_batch=1)
    assert torch.equal(drawn(), drawn())
    assert torch.equal(drawn(second), drawn(micro_batches=[1]))  # the second of one replica, the first of another
    others = [drawn(second), drawn(step=1), drawn(at=1), drawn(Action(Kind.SEND_F, 0, 1, 2))]
    assert not any(torch.equal(drawn(), other) for other in others)


def test_a_mask_inside_a_value_is_refused_where_nothing_would_be_left():
    x = normal(2, 3, 8)
    x[:, 1:] = torch.finfo(torch.float32).min
    with pytest.raises(ValueError, match=r"'int8' would leave nothing of hidden.* up to \d\.\d+ .* 3\.4e\+38.* bf16"):
        Pair("int8").carry(THERE, [HIDDEN], {"hidden": x})
    there = Pair("bf16").carry(THERE, [HIDDEN], {"hidden": x})["hidden"]
    assert (there - x)[:, :1].abs().max() < 0.02


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("deflate", "cannot know beforehand how long.*identity, fp16"),
        ("topk(0.1)+aqsgd(4)", r"a row for each sample: aqsgd\(4\) needs an id for each of 1 samples"),
        ("aqsgd(4)+int8", r"a row for each sample: int\(8\) carries floating-point tensors"),
        ("int9", "the nearest is 8"),
        ("int8|topkk", "did you mean 'topk'"),
    ],
)
def test_codecs_that_a_link_cannot_use_are_refused(text: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        auto_parallel(chain().model, 1, 2, example=chain().batch(4), codec=text)


def test_a_codec_without_a_pipeline_is_refused():
    with pytest.raises(ValueError, match=r"what pipeline stages send each other: use pp=2 or more"):
        auto_parallel(chain().model, example=chain().batch(4), codec="int8")
    assert link_codec("int4", None) == "int(4)"  # a degree that is chosen later
    assert link_codec(None, 1) is None


def test_ranks_compare_the_codec_however_it_is_written():
    texts: list[Any] = ["int8|topk", "int(8)|topk(0.1)", " int(bits=8) | topk(share=0.1)"]
    assert len({link_codec(text, 2) for text in texts}) == 1


HIGH = Spec("high", (2, 3, 8), torch.float64, True)


def sizes(pair: Pair) -> list[int]:
    """Bytes of each value that was sent last."""
    return [tensor.nbytes for sent in pair.wire.sent.values() for tensor in sent.values()]


def test_a_samples_first_visit_is_whole_and_later_ones_are_changes():
    """Both ends know beforehand which is which: a step of a known sample, a new one and one in another shape."""
    pair, x = Pair("aqsgd(4)|int8"), normal(2, 3, 8).double()
    short = HIGH._replace(shape=(2, 2, 8))
    whole, half, change = 3 * 8 * 8, 3 * 8 * 8 + 12, 2 * 3 * 4 + 8 * 2
    for step, (samples, spec, value, nbytes) in enumerate(
        [
            ((4, 7), HIGH, x, 2 * whole), ((7, 4), HIGH, x.flip(0), change), ((7, 9), HIGH, x, half + 8 * 2),
            ((7, 4), short, x[:, :2], 2 * 2 * 8 * 8), ((4, 7), short, x[:, :2].flip(0), 2 * 2 * 4 + 8 * 2),
        ]
    ):  # fmt: skip
        pair.begin(step, samples)
        there = pair.carry(THERE, [spec], {"high": value})["high"]
        assert 0 < sizes(pair)[0] - nbytes < 60, step  # flags, checksums, and layouts of both parts
        if step != 2:
            assert torch.equal(there, value)  # nothing has changed
        else:
            assert torch.equal(there[1], value[1])
            assert (there[0] - value[0]).abs().max() < 2 * x.abs().max() / 8
        back = pair.carry(BACK, [spec._replace(requires_grad=False)], {"high": value})["high"]
        assert (back - value).abs().max() < 0.02


@pytest.mark.filterwarnings("ignore:samples take more than the 576 bytes")
def test_receives_may_be_posted_long_before_and_taken_in_another_order():
    """What a micro-batch's transfer takes does not depend on which others are through, nor does what is dropped."""
    pair, x = Pair(f"aqsgd(4, capacity={6 * 3 * 8 * 4})|int8"), normal(8, 3, 8)
    actions = [THERE._replace(micro_batch=i) for i in range(3)]
    for step, samples in enumerate([range(6), (6, 7, 0, 1, 2, 3), (4, 5, 6, 7, 0, 1), range(6)]):
        parts = [samples[i : i + 2] for i in (0, 2, 4)]
        pair.begin(step, *parts)
        for action in actions:
            pair.far.post(action.match, [HIDDEN])
        for action, part in zip(actions, parts, strict=True):
            pair.near.send(action, [HIDDEN], {"hidden": x[list(part)]})
        found = {action: pair.far.take(action.match)["hidden"] for action in reversed(actions)}
        assert all(torch.equal(found[a], x[list(part)]) for a, part in zip(actions, parts, strict=True))
        near, far = pair.near.state_dict(), pair.far.state_dict()
        assert near.keys() == far.keys()
        assert all(torch.equal(near[key], far[key]) for key in near)


def test_a_value_without_a_row_for_each_sample_goes_whole():
    """Such as a position bias; where rows of one sample lie one below the other, they are one row."""
    pair = Pair("aqsgd(4)")
    bias, rows = Spec("bias", (1, 2, 3, 3), torch.float32, True), Spec("rows", (6, 8), torch.float32, True)
    values = {"bias": normal(1, 2, 3, 3), "rows": normal(6, 8)}
    for step in range(3):
        pair.begin(step, (1, 2))
        values = {name: value + step for name, value in values.items()}
        found = pair.carry(THERE, [bias, rows], values)
        assert torch.equal(found["bias"], values["bias"])
        assert (found["rows"] - values["rows"]).abs().max() <= step / 8
        few = [size < values[name].nbytes for size, name in zip(sizes(pair), ("bias", "rows"), strict=True)]
        assert few == [False, step > 0]


def test_a_samples_second_row_in_a_step_has_a_memory_of_its_own():
    names = Names("aqsgd(4)")
    parts = [{"x": torch.zeros(2)}] * 3
    names.tell(torch.tensor([7, 4, 9, 4, 7, 7]), parts, [2, 2, 2], range(3))
    assert names.each == [(7, 4), (9, 4 + MOST), (7 + MOST, 7 + 2 * MOST)]
    names.tell([7, 4, 9, 4, 7, 7], parts, [2, 2, 2], [2])  # another replica sees only its own
    assert names.each == [(7, 7 + MOST)]
    names.tell([7, 4, 9, 4, 7, 7], parts, [2, 0, 2], range(3))  # nothing to learn from: the first runs in its place
    assert names.each == [(7, 4), (7 + MOST, 4 + MOST), (7 + 2 * MOST, 7 + 3 * MOST)]


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (None, r"'aqsgd\(4\)' remembers every sample.*engine.step\(batch, samples=\[...\]\)"),
        ([1, 2, 3], "samples has 3 numbers for a batch of 4 rows"),
        ([1, 2, 3, -1], "from 0 to .*, found -1"),
        ([1, 2, 3, MOST], "found 281474976710656"),
    ],
)
def test_names_must_be_one_for_each_row(samples: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Names("aqsgd(4)").tell(samples, [{"x": torch.zeros(2)}] * 2, [2, 2], range(2))
    if samples is None:
        Names("int8|int4").tell(None, [{"x": torch.zeros(2)}] * 2, [2, 2], range(2))


@pytest.mark.parametrize("fault", ["other samples", "another memory"])
def test_ends_that_do_not_remember_the_same_are_told_with_edge_and_step(fault: str):
    pair, x = Pair("aqsgd(4)"), normal(2, 3, 8)
    pair.begin(0, (1, 2))
    if fault == "other samples":
        pair.names[1].each = [(1, 3)]
        with pytest.raises(ValueError, match=r"hidden from stage 0 to stage 1: step 0, .* same samples in the same"):
            pair.carry(THERE, [HIDDEN], {"hidden": x})
        return
    pair.carry(THERE, [HIDDEN], {"hidden": x})
    state = pair.far.state_dict()
    state["0.1.0.0.rows"][1, 2, 3] += 1
    pair.far.load_state_dict(state)
    pair.begin(1, (1, 2))
    with pytest.raises(RuntimeError, match=r"0 to stage 1: step 1, micro-batch 0, .* 1 samples \(2\).*checkpoint"):
        pair.carry(THERE, [HIDDEN], {"hidden": x})


def test_memories_go_on_where_they_were_written_and_are_empty_otherwise():
    pair, x = Pair("aqsgd(4)|int8"), normal(2, 3, 8)
    pair.begin(0, (1, 2))
    pair.carry(THERE, [HIDDEN], {"hidden": x})
    state = {key: tensor.clone() for key, tensor in pair.far.state_dict().items()}
    pair.begin(1, (1, 2))
    first = pair.carry(THERE, [HIDDEN], {"hidden": 2 * x})["hidden"]
    other = Pair("aqsgd(4)|int8")
    for end in (other.near, other.far):
        end.load_state_dict(state)
    other.begin(1, (1, 2))
    assert torch.equal(other.carry(THERE, [HIDDEN], {"hidden": 2 * x})["hidden"], first)
    for end in (other.near, other.far):
        end.load_state_dict({})
    other.begin(2, (1, 2))
    assert torch.equal(other.carry(THERE, [HIDDEN], {"hidden": 3 * x})["hidden"], 3 * x)
    assert Pair("int8").near.state_dict() == {}
