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
        self.wire = Wire()
        made = (
            CodedLinks(self.wire, text, steps=lambda: step, mine=micro_batches, seed=1, device=CPU) for _ in range(2)
        )
        self.near, self.far = made

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
        ("int8|aqsgd(4)", "nothing names a batch's samples"),
        ("int9", "the nearest is 8"),
        ("int8|topkk", "did you mean 'topk'"),
    ],
)
def test_other_codecs_are_refused(text: str, reason: str):
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
