"""Edge and host train what one process trains; nothing of the batch is on the wire; a lost connection loses nothing."""

from __future__ import annotations

import copy
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like.partitioner.tracer import trace
from merak_like.runtime.value_code import value_code
from merak_like.split.connection import Lost, Waits
from merak_like.split.cut import Cut
from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.halves import halve
from merak_like.split.host import Host
from merak_like.split.messages import OptimizerText
from merak_like.split.sft import sft
from merak_like.split.training import OPTIMIZERS
from tests import split_models
from tests.split_pair import ADAM, CUTS, SGD, Pair, made, pair, task
from tests.split_proxy import Proxy

__all__ = ["pair"]


def alone(model: nn.Module, batches: list[Any], how: OptimizerText = ADAM) -> list[float]:
    """The losses of plain training in one process."""
    optimizer, losses = OPTIMIZERS[how.name](model.parameters(), how), []
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches_of(name: str, count: int) -> list[Any]:
    if name == "calm":
        return [split_models.tiny_batch(step) for step in range(count)]
    return [split_models.text_batch(step, classes=name == "bert") for step in range(count)]


@pytest.mark.parametrize(
    ("name", "cut", "steps"),
    [("bert", CUTS["bert"], 10), ("gpt2", CUTS["gpt2"], 10), ("llama", CUTS["llama"], 5),
     ("bert", "bert.encoder.layer.1@6:bert.pooler.dense", 10), ("gpt2", "transformer.h.1@6:transformer.ln_f", 10),
     ("bert", "bert.encoder.layer.0", 5)],
)  # fmt: skip
def test_losses_and_weights_are_those_of_one_process(name: str, cut: str, steps: int, pair: Callable[..., Pair]):
    """In float64, and without Adam, which makes a whole step of the rounding of a gradient near zero.

    The language models of transformers compute their loss, which is near 8 here, in float32 all the same.
    """
    bar = 1e-5 if name in ("gpt2", "llama") else 1e-9
    model, batch = made(name)
    model.double()
    split = pair(model, batch, task(cut, optimizer=SGD))
    whole = copy.deepcopy(model)
    if (rank := Cut.parse(cut).rank) is not None:
        sft(whole, batch, Cut.parse(cut).front, rank)
    batches = batches_of(name, steps)
    expected = alone(whole, batches, SGD)
    found = [split.edge.step(each).loss for each in batches]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < bar
    weights = split.weights
    reference = dict(whole.named_parameters())
    assert {n for n in weights if n in reference} == set(reference)
    for name_, parameter in reference.items():
        torch.testing.assert_close(weights[name_], parameter.detach(), rtol=0, atol=bar)
    evaluated = split.edge.evaluate(batch).loss
    assert evaluated == pytest.approx(whole.eval()(**batch)["loss"].item(), abs=bar)
    if ":" in cut:
        assert torch.allclose(split.edge.predict(batch)["logits"], whole(**batch)["logits"], atol=10 * bar)


@pytest.mark.slow
def test_fifty_steps_in_float32_are_within_a_millionth(pair: Callable[..., Pair]):
    model, batch = made("bert")
    split = pair(model, batch, task(CUTS["bert"]))
    batches = batches_of("bert", 50)
    expected = alone(copy.deepcopy(model), batches)
    found = [split.edge.step(each).loss for each in batches]
    # Losses near 8 stand 1e-6 apart in float32.
    assert max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True)) < 1e-6


def windows(values: list[int], size: int) -> Iterator[list[int]]:
    for i in range(len(values) - size + 1):
        yield values[i : i + size]


def told(wire: bytes, values: Tensor) -> bool:
    """Whether some consecutive numbers of a tensor stand on the wire, in any usual form."""
    for row in values.reshape(-1, values.shape[-1]).tolist():
        for part in windows([int(v) for v in row if v > 255], 3):
            forms = [struct.pack(f"<3{code}", *part) for code in "qihfd"] + [
                struct.pack(f">3{code}", *part) for code in "qih"
            ]
            forms += [sep.join(map(str, part)).encode() for sep in (",", ", ", " ")]
            if any(form in wire for form in forms):
                return True
    return False


@pytest.mark.parametrize(("name", "shown"), [("bert", False), ("gpt2", False), ("bert", True)])
def test_no_token_and_no_label_is_on_the_wire(name: str, shown: bool, pair: Callable[..., Pair]):
    model, batch = made(name)
    proxy = Proxy(0)
    cut = CUTS[name] if not shown else "bert.encoder.layer.0"
    split = pair(model, batch, task(cut), proxy=proxy)
    for each in batches_of(name, 2):
        split.edge.step(each)
    split.edge.evaluate(batch)
    wire = bytes(proxy.seen["up"] + proxy.seen["down"])
    assert len(wire) == split.edge.bytes["sent"] + split.edge.bytes["received"] > 10_000
    assert not told(wire, batch["input_ids"])
    assert told(wire, batch["labels"]) == shown  # with the head in the cloud labels do travel: so the search finds them
    rows = batch["attention_mask"]
    assert not any(row.numpy().tobytes() in wire for row in rows)
    assert not any(row.bool().numpy().tobytes() in wire for row in rows)


def test_a_frozen_edge_gets_no_gradient(pair: Callable[..., Pair]):
    model, batch = split_models.calm()
    split = pair(model, batch, task(CUTS["calm"], frozen_edge=True))
    before = {n: t.clone() for n, t in split.edge.state_dict().items()}
    for step in range(3):
        split.edge.step(split_models.tiny_batch(step))
    assert split.edge.bytes["received UP_BACKWARD"] == 0
    after = split.edge.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(("token", "layers.0")))
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_evaluations_may_follow_each_other_whatever_the_codec(pair: Callable[..., Pair]):
    model, batch = split_models.calm()
    split = pair(model, batch, task(CUTS["calm"], codec="aqsgd(4)|int4"))
    split.edge.step(batch, samples=range(8))
    found = [split.edge.evaluate(batch).loss for _ in range(3)]
    assert found[0] == found[1] == found[2]


def test_a_gradient_that_overflows_on_the_host_is_told_at_once(pair: Callable[..., Pair]):
    """The host cannot run the step again to see where: the edge says its part once."""
    model, batch = split_models.calm()
    split = pair(model, batch, task(CUTS["calm"]))
    split.edge.step(batch)
    (session,) = split.host.registry.live.values()
    weight = session.training.made.model.get_parameter("layers.1.norm1.weight")
    before = split.weights["layers.2.linear1.weight"].clone()
    with torch.no_grad():
        weight.grad = None
        weight.register_hook(lambda gradient: gradient * float("inf"))
    began = time.monotonic()
    with pytest.raises(FloatingPointError, match="the gradient norm"):
        split.edge.step(batch)
    assert time.monotonic() - began < 30
    assert torch.equal(split.weights["layers.2.linear1.weight"], before)


def test_numbers_that_are_not_finite_change_nothing(pair: Callable[..., Pair]):
    model, batch = split_models.calm()
    split = pair(model, batch, task(CUTS["calm"]))
    split.edge.step(batch)
    before = {n: t.clone() for n, t in split.weights.items()}
    sick = split.edge.training.made.model.get_parameter("token.weight")
    kept = sick.detach().clone()
    with torch.no_grad():
        sick[batch["input_ids"][0, 0]] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        split.edge.step(batch)
    with torch.no_grad():
        sick.copy_(kept)
    assert all(torch.equal(before[n], t) for n, t in split.weights.items())
    split.edge.step(batch)


def test_what_only_masks_and_positions_are_made_of_is_made_again():
    model, batch = made("llama")
    halves = halve(trace(model, batch), Cut.parse(CUTS["llama"]))
    code = value_code(halves.trace, model, [s.name for s in halves.rebuilt], halves.starts[1])
    assert [s.dtype for s in halves.rebuilt] == [torch.bool]
    blank = {name: torch.zeros_like(value) for name, value in batch.items()} | {
        "attention_mask": batch["attention_mask"]
    }
    (again,), (real,) = code(blank, torch.device("cpu")).values(), code(batch, torch.device("cpu")).values()
    assert again.equal(real)
    assert not again.all()


@pytest.mark.parametrize(
    ("name", "cut", "match"),
    [
        ("gpt2", "transformer.h.0", "tied weight"),
        ("bert", "bert.encoder.layer.9:bert.pooler", "Near it: bert.encoder.layer"),
        ("bert", "bert.encoder.layer.2:bert.encoder.layer.1", "leaves the cloud nothing"),
        ("calm", "layers.0:head.bias", "runs 0 times"),
    ],
)
def test_a_cut_that_cannot_be_says_what_could(name: str, cut: str, match: str):
    model, batch = made(name)
    with pytest.raises(ValueError, match=match):
        halve(trace(model, batch), Cut.parse(cut))


def test_the_batch_itself_is_never_sent():
    class Peeks(split_models.Tiny):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            hint = input_ids.float().mean(1, keepdim=True)
            found = super().forward(input_ids, labels)
            return {**found, "loss": found["loss"] + 0 * self.head(found["logits"].new_zeros(1, 16) + hint).sum()}

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            shifted = x * 2
            return self.c(self.b(self.a(x)) + shifted).sum()

    with pytest.raises(ValueError, match="by no layer"):
        halve(trace(Late(), {"x": torch.randn(2, 4)}), Cut.parse("a:c"))

    class Reads(Late):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)) * x).sum()

    with pytest.raises(ValueError, match="would need x"):
        halve(trace(Reads(), {"x": torch.randn(2, 4)}), Cut.parse("a:c"))


def test_another_model_on_the_other_side_is_refused(tmp_path: Path):
    one, batch = split_models.calm()
    other = Source(lambda: split_models.Tiny(layers=5, dropout=0.0))
    with Host(other, CUTS["calm"], listen="127.0.0.1:0", folder=tmp_path / "host") as host:
        with Edge(Source(lambda: copy.deepcopy(one)), task(CUTS["calm"]), batch, connect=f"127.0.0.1:{host.port}",
                  folder=tmp_path / "edge", patience=5) as edge:  # fmt: skip
            with pytest.raises(ValueError, match="the host refuses: the model takes another way"):
                edge.step(batch)


def test_no_host_is_an_error_in_time(tmp_path: Path):
    model, batch = split_models.calm()
    with Edge(Source(lambda: copy.deepcopy(model)), task(CUTS["calm"]), batch, connect="127.0.0.1:9",
              folder=tmp_path, patience=1, waits=Waits(hello=1)) as edge:  # fmt: skip
        with pytest.raises(Lost, match="no host for 1 s at step 0"):
            edge.step(batch)
