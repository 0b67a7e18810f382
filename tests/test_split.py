"""Edge and host train what one process trains; nothing of the batch is on the wire; a lost connection loses nothing."""

from __future__ import annotations

import copy
import struct
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
from merak_like.split.limits import Limits
from merak_like.split.messages import OptimizerText, Task
from merak_like.split.sft import sft
from merak_like.split.training import OPTIMIZERS
from merak_like.split.wire import Kind
from tests import split_models
from tests.split_proxy import Proxy

CUTS = {
    "bert": "bert.encoder.layer.0:bert.pooler.dense", "gpt2": "transformer.h.0:transformer.ln_f",
    "llama": "model.layers.0:model.norm", "calm": "layers.0:layers.3",
}  # fmt: skip
ADAM, SGD = OptimizerText(lr=1e-3), OptimizerText(name="sgd", lr=0.1)


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name != "calm":
        pytest.importorskip("transformers")
    return getattr(split_models, name)()


def task(cut: str, **more: Any) -> Task:
    return Task(**{"cut": cut, "micro_batches": 2, "window": 2, "optimizer": ADAM, "checkpoint_every": 100, **more})


class Pair:
    """A host and an edge in one process, over loopback."""

    def __init__(self, folder: Path, model: nn.Module, batch: Any, what: Task, *, proxy: Proxy | None = None,
                 limits: Limits | None = None) -> None:  # fmt: skip
        self.source = Source(lambda: copy.deepcopy(model))
        self.host = Host(self.source, what.cut, listen="127.0.0.1:0", folder=folder / "host", limits=limits).start()
        self.proxy = proxy
        if proxy is not None:
            proxy.target = self.host.port
        port = proxy.port if proxy is not None else self.host.port
        self.edge = Edge(self.source, what, batch, connect=f"127.0.0.1:{port}", folder=folder / "edge", patience=20)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of both halves."""
        (session,) = self.host.registry.live.values()
        own = set(session.training.made.own)
        state = session.training.made.model.state_dict(keep_vars=True)
        return {**{n: t.detach() for n, t in state.items() if n in own}, **self.edge.state_dict()}

    def close(self) -> None:
        self.edge.close()
        self.host.close()
        if self.proxy is not None:
            self.proxy.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(*args: Any, **kwargs: Any) -> Pair:
        pairs.append(Pair(tmp_path / str(len(pairs)), *args, **kwargs))
        return pairs[-1]

    yield make
    for one in pairs:
        one.close()


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


CONTROL = [Kind.HELLO, Kind.WELCOME]
IN_STEP = [Kind.BEGIN, Kind.UP_FORWARD, Kind.DOWN_FORWARD, Kind.DOWN_BACKWARD, Kind.UP_BACKWARD, Kind.DONE]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    model, batch = split_models.calm()
    split = Pair(tmp_path_factory.mktemp("undisturbed"), model, batch, remembering())
    for step in range(4):
        each, ids = split_models.again(step)
        split.edge.step(each, samples=ids)
    weights = {name: t.clone() for name, t in split.weights.items()}
    split.close()
    return weights


def remembering() -> Task:
    """Without dropout: in one process edge and host share torch's random state. test_split_faults.py has it on."""
    return task("layers.0:layers.3", codec="aqsgd(4)|int8", checkpoint_every=2, seed=3)


@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize("kind", [*CONTROL, *IN_STEP])
def test_a_connection_cut_at_any_frame_changes_nothing(
    kind: Kind, passing: bool, pair: Callable[..., Pair], undisturbed: dict[str, Tensor]
):
    model, batch = split_models.calm()
    proxy = Proxy(0, (kind, 0 if kind in CONTROL else 3), passing=passing)
    split = pair(model, batch, remembering(), proxy=proxy)
    seen: list[int] = []
    split.edge.train(
        lambda step: split_models.again(step)[0], 4, samples=lambda step: split_models.again(step)[1],
        on_step=lambda step, _: seen.append(step),
    )  # fmt: skip
    assert proxy.cuts >= 1
    assert seen == [0, 1, 2, 3]
    if kind in CONTROL:
        return  # a session that nobody was told of stays behind, so there are two
    weights = split.weights
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)


def test_a_session_moves_to_a_second_host_at_half_time(tmp_path: Path):
    model, batch = split_models.calm()
    source, what = Source(lambda: copy.deepcopy(model)), remembering()

    def run(folder: Path, move: bool) -> tuple[dict[str, Tensor], list[float]]:
        first = Host(source, what.cut, listen="127.0.0.1:0", folder=folder / "host").start()
        second = Host(source, what.cut, listen="127.0.0.1:0", folder=folder / "host").start()
        connect = [f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"]
        losses: list[float] = []
        with Edge(source, what, batch, connect=connect, folder=folder / "edge", patience=20) as edge:
            for step in range(20):
                if move and step == 10:
                    first.close()
                each, ids = split_models.again(step)
                losses.append(edge.step(each, samples=ids).loss)
            live = {**first.registry.live, **second.registry.live}
            assert len(live) == 1
            assert bool(second.registry.live) == move
            (session,) = live.values()
            model_ = session.training.made.model
            found = {n: t.detach().clone() for n, t in model_.named_parameters() if not t.is_meta}
            found |= {n: t.clone() for n, t in edge.state_dict().items()}
        for host in (first, second):
            host.close()
        return found, losses

    stayed, moved = run(tmp_path / "stayed", False), run(tmp_path / "moved", True)
    assert stayed[1] == moved[1]
    assert all(torch.equal(moved[0][name], stayed[0][name]) for name in stayed[0])


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
