"""A batch is cut into micro-batches and told apart by shape; each micro-batch has its own random numbers."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.runtime import rng
from merak_like.runtime.batches import rows, signature, split, to_device
from merak_like.runtime.predict import predict

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "left right")


def batch_of(total: int) -> dict[str, Any]:
    ids = torch.arange(total)
    return {
        "ids": ids[:, None] * torch.ones(1, 3, dtype=torch.long),
        "nested": [{"a": ids.double()}, (ids, None)],
        "pair": Pair(ids + 1, "word"),
        "scale": torch.tensor(2.0),
        "table": torch.zeros(total + 1, 2),
        "flag": True,
    }


@settings(max_examples=60)
@given(st.integers(1, 60), st.data())
def test_parts_of_a_batch_make_it_again_and_differ_by_one_at_most(total: int, data: st.DataObject) -> None:
    parts = split(batch_of(total), count := data.draw(st.integers(1, total)))
    sizes = [rows(part) for part in parts]
    assert len(parts) == count
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    whole = batch_of(total)
    assert torch.equal(torch.cat([part["ids"] for part in parts]), whole["ids"])
    assert torch.equal(torch.cat([part["nested"][0]["a"] for part in parts]), whole["nested"][0]["a"])
    assert torch.equal(torch.cat([part["nested"][1][0] for part in parts]), whole["nested"][1][0])
    assert torch.equal(torch.cat([part["pair"].left for part in parts]), whole["pair"].left)
    for part in parts:
        assert isinstance(part["pair"], Pair)
        assert isinstance(part["nested"][1], tuple)
        assert (part["flag"], part["pair"].right, part["nested"][1][1]) == (True, "word", None)
        assert part["table"].shape == (total + 1, 2)
        assert part["scale"].shape == ()


def test_batch_that_cannot_be_split_says_what_would_work() -> None:
    with pytest.raises(ValueError, match=r"a batch of 3 samples cannot be cut into 4 .* at least 4 .* at most 3"):
        split({"x": torch.zeros(3)}, 4)
    with pytest.raises(ValueError, match="no tensor with a batch dimension"):
        split({"x": torch.tensor(1.0), "n": 3}, 1)


class Guess(nn.Module):
    """Ignores labels of -100, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.layer(x)
        return nn.functional.cross_entropy(logits, labels), logits


def test_micro_batch_without_items_counts_nothing() -> None:
    """Its mean is 0/0. A step with such a one was refused, though the mean over the batch is a number."""
    batch = {"x": torch.randn(6, 3), "labels": torch.tensor([1, -100, -100, -100, 3, 2])}
    whole = Guess()
    loss, logits = whole(**batch)
    loss.backward()
    count = lambda batch: int((batch["labels"] != -100).sum())  # noqa: E731
    engine = auto_parallel(
        Guess(), example=batch, micro_batches=3, loss_weight=count, hardware="a100-80gb", device="cpu"
    )
    assert engine.step(batch).loss == pytest.approx(loss.item())
    for name, gradient in engine.full_gradients().items():
        torch.testing.assert_close(gradient, whole.get_parameter(name).grad)
    result, made = predict(engine, batch)
    assert result.loss == pytest.approx(loss.item())
    (found,) = made.values()
    torch.testing.assert_close(found, logits.detach())  # its own outputs all the same
    with pytest.raises(ValueError, match=r"the batch has no item to learn from \(every label is ignored\)"):
        engine.step(batch | {"labels": torch.full((6,), -100)})
    engine.close()


def test_signature_tells_shapes_dtypes_and_constants_apart() -> None:
    base = {"x": torch.zeros(2, 3), "flag": True, "more": [1, None]}
    assert signature(base) == signature({"x": torch.ones(2, 3), "flag": True, "more": [1, None]})
    others = [
        base | {"x": torch.zeros(2, 4)},
        base | {"x": torch.zeros(2, 3, dtype=torch.float64)},
        base | {"x": torch.zeros(2, 3, requires_grad=True)},
        base | {"flag": 1},
        base | {"flag": False},
        base | {"more": [2, None]},
        base | {"extra": None},
        {"y" if k == "x" else k: v for k, v in base.items()},
    ]
    assert len({signature(one) for one in (base, *others)}) == 1 + len(others)


def test_batch_goes_to_a_device_whole() -> None:
    there = to_device(batch_of(4), torch.device("meta"))
    assert there["ids"].is_meta
    assert there["nested"][1][0].is_meta
    assert there["pair"].left.is_meta
    assert there["pair"].right == "word"


def test_streams_are_told_apart_by_seed_step_and_micro_batch() -> None:
    seeds = [rng.stream_seed(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1), (0, 1, 11))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert rng.stream_seed(3, 4, 5) == rng.stream_seed(3, 4, 5)


def test_stream_goes_on_where_another_stage_stopped() -> None:
    rng.start(1, 2, 3)
    whole = torch.rand(8)
    rng.start(1, 2, 3)
    first = torch.rand(3)
    state = rng.state(CPU)
    torch.rand(100)
    rng.resume(state, CPU)
    assert torch.equal(torch.cat([first, torch.rand(5)]), whole)
