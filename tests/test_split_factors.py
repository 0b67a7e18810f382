"""Factors of a cut weighed by what the edge's data say of them, and an edge of low rank: both beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merak_like.cli import edge, halves
from merak_like.cli.edge_file import load, task_of
from merak_like.runtime.methods.compress import Compress
from merak_like.runtime.methods.projection import LowRank, project
from merak_like.split.cut import Cut
from merak_like.split.edge import Edge
from merak_like.split.element_weights import weighted_error
from merak_like.split.fisher import fisher_of
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.messages import OptimizerText, Task
from merak_like.split.narrow import narrow
from merak_like.split.sft import sft
from tests import test_screen as small
from tests.commands import refused, run
from tests.split_models import calm, tiny_batch

CUT = "layers.1@3:layers.3"
FIRST = "layers.1.linear1.weight"
LEARN = OptimizerText(name="sgd", lr=0.1)


def model() -> nn.Module:
    return calm()[0].double()


def plainly(one: nn.Module, steps: int, after: Any = lambda: None) -> list[float]:
    """Losses of some steps in one process; ``after`` follows each."""
    optimizer, losses = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1), list[float]()
    for step in range(steps):
        loss = one(**tiny_batch(step))["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
    return losses


def split(source: Source, task: Task, folder: Path, steps: int, **more: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps with a host, and the edge's weights after them."""
    with Host(source, task.cut, listen="127.0.0.1:0", folder=folder / "host") as host:
        edge = Edge(source, task, tiny_batch(0), connect=f"127.0.0.1:{host.port}", folder=folder / "edge", **more)
        with edge:
            return [edge.step(tiny_batch(step)).loss for step in range(steps)], edge.state_dict()


def test_a_side_factors_by_the_information_of_its_source(tmp_path: Path):
    found = {FIRST: torch.rand(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4}
    save_file(found, tmp_path / "fisher.safetensors")
    source, task = Source(model, fisher=tmp_path / "fisher.safetensors"), Task(cut=CUT, weigh="elements")
    ours, whole = model(), model()
    narrow(ours, tiny_batch(0), Cut.parse(CUT), source, task, "host")
    sft(whole, tiny_batch(0), "layers.1", 3, fisher=found, weigh="elements")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("weigh", ["elements", "sides"])
def test_both_sides_factor_by_the_same_information(weigh: Any, tmp_path: Path):
    found = fisher_of(Source(model), Cut.parse(CUT), [tiny_batch(n) for n in range(4)])
    assert list(found) == [FIRST]
    save_file(found, tmp_path / "fisher.safetensors")
    source = Source(model, fisher=tmp_path / "fisher.safetensors")
    losses, own = split(source, Task(cut=CUT, weigh=weigh, optimizer=LEARN), tmp_path, 3)
    whole = model()
    sft(whole, tiny_batch(0), "layers.1", 3, fisher=found, weigh=weigh)
    errors = []
    for kind in ("plain", weigh):
        fresh = model()
        weight = fresh.get_parameter(FIRST).detach().clone()
        sft(fresh, tiny_batch(0), "layers.1", 3, **({} if kind == "plain" else {"fisher": found, "weigh": weigh}))
        left = fresh.get_parameter("layers.1.linear1.u.weight")
        right = fresh.get_parameter("layers.1.wire.s.weight") @ fresh.get_parameter("layers.1.wire.v.weight")
        errors.append(weighted_error(weight, left.detach(), right.detach(), found[FIRST]))
    assert errors[1] < 0.99 * errors[0]
    assert losses == pytest.approx(plainly(whole, 3), rel=1e-10)
    state = whole.state_dict()
    assert all(torch.allclose(tensor, state[name], rtol=1e-9, atol=1e-11) for name, tensor in own.items())


def test_the_edges_layers_are_projected_and_the_hosts_are_not(tmp_path: Path):
    method = LowRank(2, 2)
    losses, own = small.split_run(tmp_path, None, steps=3, methods=[method])
    whole = small.build()
    optimizer, expected = torch.optim.SGD(whole.parameters(), 0.1), list[float]()
    for step in range(3):
        loss = whole(**small.batch(step))["loss"]
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1:
            project(whole.front.weight, 2)
            project(whole.back.weight, 2)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert all(torch.allclose(own[name], tensor, rtol=1e-9, atol=1e-11) for name, tensor in whole.state_dict().items())
    with pytest.raises(ValueError, match="Compress changes how code runs"):
        small.split_run(tmp_path / "b", None, methods=[Compress()])


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def begin(task: Task, source: Source) -> None:
        Edge(source, task, tiny_batch(0), connect="127.0.0.1:1", folder=tmp_path)

    with pytest.raises(ValueError, match="needs the layer's Fisher information on both sides"):
        begin(Task(cut=CUT, weigh="sides"), Source(model))
    with pytest.raises(ValueError, match=r"the cut layers\.0:layers\.3 changes none"):
        begin(Task(cut="layers.0:layers.3", weigh="sides"), Source(model))
    (tmp_path / "none").write_text("no")
    with pytest.raises(ValueError, match="is no file of `merak edge fisher`"):
        begin(Task(cut=CUT, weigh="sides"), Source(model, fisher=tmp_path / "none"))


def test_an_edge_half_is_written_as_powers_and_read_again(tmp_path: Path):
    state = {name: tensor.detach() for name, tensor in nn.Linear(64, 64).state_dict().items()}
    for name, powers in (("small", True), ("plain", False)):
        edge._write(state, tmp_path / f"{name}.safetensors", powers=powers)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "plain")]
    assert sizes[0] < sizes[1] / 4
    found = halves.plain(tmp_path / "small.safetensors")
    assert found is not None
    read = load_file(found)
    assert torch.equal(read["bias"], state["bias"])
    assert 0 < float((read["weight"] - state["weight"]).norm() / state["weight"].norm()) < 0.3
    assert halves.plain(tmp_path / "plain.safetensors") == tmp_path / "plain.safetensors"


def test_files_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, out = tmp_path / "edge.yaml", tmp_path / "fisher.safetensors"
    text = f"model: tests.split_models:calm\ndata: tests.split_models:tiny_batch\ncut: {CUT}\nsteps: 5\n"
    file.write_text(text)
    assert "give it with --out" in refused(capsys, "edge", "train", str(file), "--powers")
    assert "say where the Fisher information goes" in refused(capsys, "edge", "fisher", str(file))
    told = run(capsys, "edge", "fisher", str(file), "--out", str(out))
    assert told.startswith(f"{FIRST}: spread ")
    assert load_file(out)[FIRST].shape == (32, 16)
    file.write_text(f"{text}weigh: elements\nfisher: fisher.safetensors\nlow_rank: {{rank: 2, every: 3}}\n")
    found = load(file)
    assert (task_of(found).weigh, found.fisher, found.low_rank and found.low_rank.every) == ("elements", out, 3)
    file.write_text(text.replace(CUT, "layers.1:layers.3"))
    assert "changes no layer" in refused(capsys, "edge", "fisher", str(file), "-o", str(out))
