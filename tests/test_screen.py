"""What an edge does to what it sends: with a host's half, the numbers of one process that does the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like.cli.edge_file import load, screen_of, task_of
from merak_like.runtime.methods.method import Method
from merak_like.split.binarised import BinaryLinear, clip_noise, leak_loss, sign
from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.leakage import overhear
from merak_like.split.messages import OptimizerText, Task
from merak_like.split.screen import Screen
from tests.split_models import calm

LEARN = OptimizerText(name="sgd", lr=0.1)


class Model(nn.Module):
    """An edge's layer, a cloud's and a head, with the cloud's activation behind the cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.middle, self.back = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.front(x), labels)}

    def loss(self, z: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.back(self.middle(z.tanh()).tanh()), labels)


def build() -> Model:
    return Model().double()


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": torch.randint(3, (8,), generator=generator)}


def split_run(
    folder: Path, screen: Screen | None, steps: int = 4, methods: Sequence[Method] = (), **more: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and all weights after some steps of an edge and a host."""
    task = Task(cut="front:back", micro_batches=2, optimizer=LEARN, **more)
    with Host(Source(build), task.cut, listen="127.0.0.1:0", folder=folder / "host") as host:
        edge = Edge(
            Source(build),
            task,
            batch(0),
            connect=f"127.0.0.1:{host.port}",
            folder=folder / "edge",
            screen=screen,
            methods=methods,
        )
        with edge:
            losses = [edge.step(batch(step)).loss for step in range(steps)]
            (session,) = host.registry.live.values()
            cloud = session.training.made.model.state_dict()
            own = edge.state_dict()
            return losses, {**{n: t.clone() for n, t in cloud.items() if n not in own}, **own}


def alone(
    through: Callable[[Tensor], Tensor], leak: float = 0.0, *, binary: bool = False, steps: int = 4
) -> tuple[list[float], dict[str, Tensor]]:
    """The same in one process, written down."""
    model = build()
    if binary:
        model.front.__class__ = BinaryLinear  # pyright: ignore[reportAttributeAccessIssue]
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), list[float]()
    for step in range(steps):
        some = batch(step)
        z = through(model.front(some["x"]))
        loss = model.loss(z, some["labels"])
        losses.append(loss.item())
        parts = zip(some["x"].split(4), z.split(4), strict=True)
        told = torch.stack([leak_loss(x, part) for x, part in parts]).mean() if leak else 0.0
        optimizer.zero_grad()
        (loss + leak * told).backward()
        optimizer.step()
    return losses, copy.deepcopy(model.state_dict())


CASES: dict[str, tuple[Screen, Callable[[Tensor], Tensor], float, bool]] = {
    "signs": (Screen(signs=True), sign, 0.0, True),
    "leak": (Screen(leak=0.7), lambda z: z, 0.7, False),
    "norm": (Screen(norm=1.5), lambda z: clip_noise(z, 1.5, 0.0, torch.zeros_like(z)), 0.0, False),
    "all": (
        Screen(signs=True, norm=2.0, leak=0.3), lambda z: clip_noise(sign(z), 2.0, 0.0, torch.zeros_like(z)), 0.3, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["all", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "all")])
def test_numbers_are_those_of_one_process(name: str, tmp_path: Path):
    screen, through, leak, binary = CASES[name]
    losses, weights = split_run(tmp_path, screen, binary_edge=binary)
    expected, after = alone(through, leak, binary=binary)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert weights.keys() == after.keys()
    assert all(torch.allclose(weights[name], tensor, rtol=1e-10, atol=1e-12) for name, tensor in after.items())
    plain, _ = alone(lambda z: z)
    assert name == "leak" or losses[0] != pytest.approx(plain[0], rel=1e-6)
    assert losses[-1] != pytest.approx(plain[-1], rel=1e-6)


@pytest.mark.slow
def test_noise_is_drawn_again_when_a_step_is_and_differs_between_steps(tmp_path: Path):
    noisy = Screen(norm=1.0, noise=0.3)
    runs = [split_run(tmp_path / name, noisy) for name in ("a", "b")]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], tensor) for name, tensor in runs[1][1].items())
    source, task = Source(build), Task(cut="front:back")
    some = [(batch(0), None)] * 4  # one batch, at four steps
    heard = overhear(source, task, some, lambda _, sent: sent[0], 0, noisy).arrived
    assert len({float(z.sum()) for z in heard}) == 4
    assert max(float(z.norm(dim=1).max()) for z in heard) < 1.0 + 3 * 0.3


def test_whoever_measures_leakage_hears_what_the_screen_lets_through():
    heard = overhear(Source(build), Task(cut="front:back"), [(batch(0), None)], lambda _, sent: sent[0], 0,
                     Screen(signs=True)).arrived  # fmt: skip
    assert heard[0].unique().tolist() == [-1.0, 1.0]


def test_a_file_switches_it_on_and_says_what_it_cannot(tmp_path: Path):
    file = tmp_path / "edge.yaml"
    text = "model: m\ndata: d:d\ncut: front:back\nsteps: 1\n"
    file.write_text(text)
    assert screen_of(load(file)) is None
    file.write_text(f"{text}binary_edge: true\nleak: 0.5\nclip_noise: {{norm: 2, noise: 0.1}}\n")
    found = load(file)
    assert screen_of(found) == Screen(signs=True, norm=2.0, noise=0.1, leak=0.5)
    assert task_of(found).binary_edge
    file.write_text(f"{text}clip_noise: {{noise: 0.1}}\n")
    with pytest.raises(ValueError, match=r"clip_noise\.norm"):
        load(file)
    with pytest.raises(ValueError, match="say the norm"):
        Screen(noise=1.0)


def test_what_means_nothing_is_refused(tmp_path: Path):
    def edge(source: Source, screen: Screen | None = None, **more: Any) -> None:
        some = batch(0) if screen else calm()[1]
        Edge(source, Task(**more), some, connect="127.0.0.1:1", folder=tmp_path / "edge", screen=screen)

    with pytest.raises(ValueError, match="leak is a loss for the edge's head, which is not trained"):
        edge(Source(build), Screen(leak=1.0), cut="front:back", frozen_edge=True)
    with pytest.raises(ValueError, match="calls no Linear layer"):
        edge(Source(lambda: calm()[0]), cut="token:layers.3", binary_edge=True)


@pytest.mark.slow
def test_samples_without_numbers_cannot_be_compared(tmp_path: Path):
    model, some = calm()
    source, task = Source(lambda: copy.deepcopy(model)), Task(cut="layers.0:layers.3", optimizer=LEARN)
    with (
        Host(source, task.cut, listen="127.0.0.1:0", folder=tmp_path / "host") as host,
        Edge(source, task, some, connect=f"127.0.0.1:{host.port}", folder=tmp_path / "edge",
             screen=Screen(leak=1.0)) as edge,
        pytest.raises(ValueError, match="this batch has none, ids of tokens"),
    ):  # fmt: skip
        edge.step(some)
