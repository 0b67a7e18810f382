"""Sessions that train adapters on one frozen trunk: its weights are there once, micro-batches of several go through in
one pass, and each session's numbers are those it has alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like.runtime.batches import split
from merak_like.split.adapters import A, B, adapted
from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import LoraText, OptimizerText, Task
from merak_like.split.wire import Kind
from tests import split_models

CUT = "front:back"
LEARNER = OptimizerText(name="adamw", lr=1e-2, weight_decay=0.1)


class Deep(nn.Module):
    """A middle to adapt, with a matrix that no layer's call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(8, 16), nn.Linear(16, 3)
        self.wide, self.thin, self.read = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.front(x).tanh()
        x = x + self.thin(nn.functional.gelu(self.wide(x)))
        logits = self.back(x + nn.functional.linear(x, self.read.weight))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Mixing(Deep):
    """Rows have to do with each other."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.front(x).tanh()
        x = self.thin(nn.functional.gelu(self.wide(x)))
        logits = self.back(x - x.mean(0))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def model(kind: type[Deep] = Deep) -> Deep:
    torch.manual_seed(0)
    return kind().double()


def batch_of(who: int, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 * who + step)
    return {"x": torch.randn(8, 8, generator=draw, dtype=torch.float64), "labels": torch.arange(8) % 3}


def task(who: int, **more: Any) -> Task:
    """Clients have adapters of different ranks."""
    usual: dict[str, Any] = {
        "cut": CUT, "micro_batches": 2, "window": 2, "optimizer": LEARNER, "seed": who, "checkpoint_every": 2,
        "lora": LoraText(rank=2 + who),
    }  # fmt: skip
    return Task(**{**usual, **more})


@contextmanager
def hosted(folder: Path, kind: type[Deep] = Deep, **limits: Any) -> Iterator[tuple[Host, Callable[..., Edge]]]:
    """A host, and what makes edges of it."""
    whole, edges = model(kind), list[Edge]()
    source = Source(lambda: copy.deepcopy(whole))
    with Host(source, CUT, listen="127.0.0.1:0", folder=folder / "host", limits=Limits(**limits)) as host:

        def edge(who: int, **more: Any) -> Edge:
            edges.append(
                Edge(source, task(who, **more), batch_of(who, 0), connect=f"127.0.0.1:{host.port}",
                     folder=folder / str(who), patience=60)
            )  # fmt: skip
            return edges[-1]

        try:
            yield host, edge
        finally:
            for one in edges:
                one.close()


def held(host: Host, edge: Edge) -> nn.Module:
    """The half of an edge's session."""
    assert edge.session is not None
    return host.registry.live[edge.session].training.made.model


def step_together(host: Host, edges: Sequence[Edge], batches: Sequence[Any]) -> None:
    """A step of each, where all are in line and have sent what they can before one computes: so they meet."""

    def there(edge: Edge) -> bool:
        connection = host.registry.live[edge.session or ""]._connection
        sent = [] if connection is None else [key for key in list(connection._inbox) if key.kind is Kind.UP_FORWARD]
        return len(sent) == edge.task.micro_batches

    with ThreadPoolExecutor(len(edges)) as pool:
        with host.turn.held():
            steps = [pool.submit(edge.step, batch) for edge, batch in zip(edges, batches, strict=True)]
            end = monotonic() + 60
            while (len(host.turn._line) <= len(edges) or not all(map(there, edges))) and monotonic() < end:
                sleep(0.01)
        for step in steps:
            step.result()


def alone(who: int, first: Mapping[str, Tensor], steps: int, kind: type[Deep] = Deep) -> dict[str, Tensor]:
    """What one process makes of the same batches with adapters that begin so."""
    whole = model(kind)
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in first.items()}
    for path in ("wide", "thin"):
        a, b = tensors[f"{path}.{A}"], tensors[f"{path}.{B}"]
        whole.get_submodule(path).register_forward_hook(lambda _, args, y, a=a, b=b: y + 2 * args[0] @ a.T @ b.T)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name.startswith(("front", "back")))
        tensors |= {name: parameter} if parameter.requires_grad else {}
    learner = torch.optim.AdamW(tensors.values(), lr=LEARNER.lr, weight_decay=LEARNER.weight_decay)
    for step in range(steps):
        learner.zero_grad()
        for part in split(batch_of(who, step), 2):
            (whole(**part)["loss"] / 2).backward()
        learner.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def of_adapters(half: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in half.named_parameters() if name.endswith((A, B))}


def furthest(host: Host, edge: Edge, expected: Mapping[str, Tensor]) -> float:
    found = {**of_adapters(held(host, edge)), **edge.state_dict()}
    assert found.keys() == expected.keys()
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("together", "kind"),
    [(4, Deep), pytest.param(4, Mixing, marks=pytest.mark.slow), pytest.param(1, Deep, marks=pytest.mark.slow)],
)
def test_each_session_has_the_numbers_it_has_alone(together: int, kind: type[Deep], tmp_path: Path):
    """Two at once, with adapters of two ranks, and each admitted by what it adds; where rows have to do with each
    other none go together."""
    with hosted(tmp_path, kind, together=together) as (host, made):
        edges = [made(who) for who in range(2)]
        for who, edge in enumerate(edges):
            edge.evaluate(batch_of(who, 0))
        before = [of_adapters(held(host, edge)) for edge in edges]
        trunk = {name: p.clone() for name, p in (host.registry.trunk.weights or {}).items()}
        made(3, lora=None).evaluate(batch_of(3, 0))  # a half of one's own: weights, gradients and moments
        weights, promised = sum(p.nbytes for p in trunk.values()), list(host.registry.ledger._held.values())
        assert promised[0] == weights
        own = [4 * sum(t.nbytes for t in of_adapters(held(host, edge)).values()) for edge in edges]
        assert [promised[3] - mine for mine in promised[1:3]] == [4 * weights - adds for adds in own]
        step_together(host, edges, [batch_of(who, 0) for who in range(2)])
        with ThreadPoolExecutor(2) as pool:
            for work in [pool.submit(e.train, lambda s, who=w: batch_of(who, s), 3) for w, e in enumerate(edges)]:
                work.result()
        for who, edge in enumerate(edges):
            assert furthest(host, edge, alone(who, before[who], 3, kind)) < 1e-10
            assert any(float(t.abs().max()) > 0 for n, t in of_adapters(held(host, edge)).items() if n.endswith(B))
        halves = [dict(held(host, edge).named_parameters()) for edge in edges]
        for name, before_all in trunk.items():
            assert torch.equal(halves[0][name], before_all)  # frozen
            assert len({half[name].data_ptr() for half in halves}) == 1  # and there once
        if together > 1:
            assert host.registry.trunk.pool is not None
            assert (max(host.registry.trunk.pool.sizes) > 1) == (kind is Deep)


@pytest.mark.slow
def test_a_session_goes_on_after_its_host_was_started_again(tmp_path: Path):
    """To the bit, and its checkpoint has adapters and no trunk."""
    kept = []
    for again in (False, True):
        folder = tmp_path / str(again)
        with hosted(folder) as (host, made):
            edge = made(0)
            edge.train(lambda step: batch_of(0, step), 3)
            kept.append({**of_adapters(held(host, edge)), **edge.state_dict()} if not again else {})
            if not again:
                edge.train(lambda step: batch_of(0, step), 5)
                kept[0] = {**of_adapters(held(host, edge)), **edge.state_dict()}
            else:
                state = host.registry.live[edge.session or ""].training.state()
                assert {n for n in state.tensors if n.startswith("model/")} == {
                    f"model/{path}.{key}" for path in ("wide", "thin") for key in (A, B)
                }
        if again:
            with hosted(folder) as (host, made):
                edge = made(0)
                assert edge.step_number == 2
                edge.train(lambda step: batch_of(0, step), 5)
                kept[1] = {**of_adapters(held(host, edge)), **edge.state_dict()}
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_adapters_that_cannot_be_are_refused(tmp_path: Path):
    with hosted(tmp_path) as (_, made):
        with pytest.raises(ValueError, match=r"no layer .* is called read: there are thin, wide"):
            made(0, lora=LoraText(targets=("read", "wide"))).step(batch_of(0, 0))
        with pytest.raises(ValueError, match="adapters are trained by a session of its own"):
            made(1, group="ward").step(batch_of(1, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut", "targets"),
    [
        ("bert", "bert.encoder.layer.0:bert.pooler.dense", ("query", "value")),
        ("gpt2", "transformer.h.0:transformer.ln_f", ("c_attn", "c_fc")),
        ("llama", "model.layers.0:model.norm", ()),
    ],
)
def test_models_of_transformers_are_adapted(name: str, cut: str, targets: tuple[str, ...], tmp_path: Path):
    """Padding and all: two sessions in one pass have the losses and adapters that each has on a host of its own."""
    whole, batch = getattr(split_models, name)()
    whole = whole.double()
    source = Source(lambda: copy.deepcopy(whole))
    found: list[list[Any]] = []
    for together in (1, 4):
        limits = Limits(together=together)
        with Host(source, cut, listen="127.0.0.1:0", folder=tmp_path / f"{together}", limits=limits) as host:
            edges = [
                Edge(source, Task(cut=cut, lora=LoraText(rank=2, targets=targets), optimizer=LEARNER, seed=seed), batch,
                     connect=f"127.0.0.1:{host.port}", folder=tmp_path / f"{together}-{seed}")
                for seed in range(2)
            ]  # fmt: skip
            for edge in edges:
                edge.evaluate(batch)
            step_together(host, edges, [batch, batch])
            losses = [edge.step(batch).loss for edge in edges]
            assert adapted(held(host, edges[0]))
            found.append([losses, [of_adapters(held(host, edge)) for edge in edges]])
            if together > 1:
                assert host.registry.trunk.pool is not None
                assert max(host.registry.trunk.pool.sizes) == 2
            for edge in edges:
                edge.close()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-10)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert max(float((one[n] - other[n]).abs().max()) for n in one) < 1e-10


def test_an_evaluation_goes_through_the_adapters(tmp_path: Path):
    """Torch's own encoder layer reads its matrices past the layers that have them when nothing is learnt."""
    whole, batch = split_models.steady()
    whole.double()
    source = Source(lambda: copy.deepcopy(whole))
    told = Task(cut="layers.0:layers.3", lora=LoraText(rank=2), optimizer=OptimizerText(name="sgd", lr=0.1))
    with Host(source, told.cut, listen="127.0.0.1:0", folder=tmp_path / "host") as host:
        with Edge(source, told, batch, connect=f"127.0.0.1:{host.port}", folder=tmp_path / "edge", patience=60) as edge:
            edge.step(batch)
            edge.step(batch)
            assert edge.evaluate(batch).loss == pytest.approx(edge.step(batch).loss, abs=1e-10)  # nothing is dropped
