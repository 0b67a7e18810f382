"""Scenarios of a host on several ranks: on rank 0 the edge runs beside the host, the others help."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.batches import split
from merak_like.runtime.initialize import join, world_size
from merak_like.split import checkpoint
from merak_like.split.crew import Crew
from merak_like.split.cut import Cut
from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.helper import Helper
from merak_like.split.host import Host
from merak_like.split.messages import OptimizerText, Task
from merak_like.split.order import stage_rank
from merak_like.split.wire import Kind
from tests import split_models
from tests.split_proxy import Proxy


@contextmanager
def served(source: Source, cut: str, folder: Path, mesh: Mesh | None = None) -> Iterator[Host | None]:
    """A host on all ranks: on rank 0 the host, elsewhere None when it is over."""
    mesh = mesh or Mesh(pp=world_size())
    world = join(mesh, timeout=60, device="cpu")
    crew = Crew(world, stage_rank("host", Cut.parse(cut), mesh.pp), mesh)
    if world.rank:
        Helper(source, crew, world.device).run()
        yield None
        return
    with Host(source, cut, listen="127.0.0.1:0", folder=folder, crew=crew) as host:
        yield host


def trained(
    model: nn.Module, batch: Any, task: Task, batches: list[Any], *, mesh: Mesh | None, proxy: Proxy | None = None
) -> tuple[list[float], dict[str, Tensor]] | None:  # fmt: skip
    """Losses, and the weights of both halves as their checkpoints have them. Without a mesh on this rank alone."""
    source = Source(lambda: copy.deepcopy(model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = partial(Host, source, task.cut, listen="127.0.0.1:0", folder=folder)
        kept = alone() if mesh is None else served(source, task.cut, folder, mesh)
        with kept as host:
            if host is None:
                return None
            if proxy is not None:
                proxy.target = host.port
            port = host.port if proxy is None else proxy.port
            losses: list[float] = []
            with Edge(source, task, batch, connect=f"127.0.0.1:{port}", folder=folder / "edge", patience=30) as edge:
                _trace(edge, [*batches, batch])
                for step, each in enumerate(batches):
                    ids = range(100 * (step % 2), 100 * (step % 2) + len(each["labels"]))
                    losses.append(edge.step(each, samples=ids).loss)
                losses.append(edge.evaluate(batch).loss)
                own, session = edge.state_dict(), edge.session
        assert session is not None
        (last,) = checkpoint.steps(folder / "sessions" / session)[-1:]
        state = checkpoint.load(folder / "sessions" / session, last)
        assert state.facts["step"] == len(batches)
        return losses, {**{n: t.clone() for n, t in own.items()}, **checkpoint.of("model/", state.tensors)}


def _trace(edge: Edge, batches: list[Any]) -> None:
    """Here, where edge and host share a process: two threads cannot trace at once."""
    model = edge.training.made.model
    for training in (False, True):
        model.train(training)
        for part in (part for batch in batches for part in split(batch, edge.task.micro_batches)):
            edge.training.made.programs.at(part)


@cache
def setting(name: str, steps: int, facts: str) -> tuple[nn.Module, Any, Task, list[Any]]:
    """A model in float64, an example, a task (as JSON) and its batches."""
    model, batch = getattr(split_models, name)()
    if name in ("bert", "gpt2", "llama"):
        batches = [split_models.text_batch(s, classes=name == "bert") for s in range(steps)]
    else:
        batches = [{k: v[:6] for k, v in split_models.tiny_batch(s).items()} for s in range(steps)]
        batch = batches[0]
    return model.double(), batch, Task.model_validate_json(facts), batches


@cache
def alone(name: str, steps: int, facts: str) -> tuple[list[float], dict[str, Tensor]]:
    """What a host on one rank computes; several meshes are compared with it."""
    found = trained(*setting(name, steps, facts), mesh=None)
    assert found is not None
    return found


def differences(
    name: str, cut: str, steps: int, micro_batches: int = 3, dp: int = 1, pp: int = 2, tp: int = 1, **more: Any
) -> dict[str, float] | None:
    """How far a crew's losses and weights are from a host's on one rank, in float64."""
    how = {"name": "sgd", "lr": 0.1, **more.pop("optimizer", {})}
    told = {"cut": cut, "micro_batches": micro_batches, "optimizer": how, "checkpoint_every": 100, **more}
    facts = json.dumps(told, sort_keys=True)
    model = setting(name, steps, facts)[0]
    found = trained(*setting(name, steps, facts), mesh=Mesh(dp, pp, tp))
    if found is None:
        return None
    expected = alone(name, steps, facts)
    buffers = {n for n, _ in model.named_buffers()}
    assert found[1].keys() - buffers == expected[1].keys() - buffers
    return {
        "losses": max(abs(a - b) for a, b in zip(found[0], expected[0], strict=True)),
        "weights": max(
            float((found[1][n] - t).abs().max()) for n, t in expected[1].items() if n in found[1] and t.numel()
        ),
        "moved": max(float((found[1][n] - t).abs().max()) for n, t in model.state_dict().items() if n in found[1]),
    }


def cut_off(kinds: list[int], steps: int = 3, dp: int = 1, pp: int = 2, tp: int = 1) -> dict[str, bool] | None:
    """The connection breaks at a frame of each kind: whether all is as where nothing broke, to the last bit."""
    model, batch = split_models.calm()
    mesh = Mesh(dp, pp, tp)
    batches = [split_models.tiny_batch(s % 2) for s in range(steps)]
    task = Task(
        cut="layers.0:layers.3", codec="aqsgd(4)|int8", micro_batches=4, window=2, checkpoint_every=100, seed=3,
        optimizer=OptimizerText(lr=0.01),
    )  # fmt: skip
    whole = trained(model, batch, task, batches, mesh=mesh)
    same: dict[str, bool] = {}
    for kind in kinds:
        proxy = Proxy(0, (Kind(kind), 1 if kind < 16 else 5))
        found = trained(model, batch, task, batches, mesh=mesh, proxy=proxy)
        proxy.close()
        if whole is not None and found is not None:
            same[Kind(kind).name] = (
                proxy.cuts >= 1 and whole[0] == found[0] and all(found[1][n].equal(t) for n, t in whole[1].items())
            )
    return same if whole is not None else None


def gone_on(dp: int = 1, pp: int = 2, tp: int = 1) -> tuple[list[float], list[float]] | None:
    """Losses of a host that ended in the middle, and of one that did not, under a codec that remembers."""
    model, batch = split_models.calm()
    source, found = Source(lambda: copy.deepcopy(model)), list[list[float]]()
    task = Task(
        cut="layers.0:layers.3", codec="aqsgd(4)|int8", micro_batches=2, window=2, checkpoint_every=1, seed=3,
        optimizer=OptimizerText(lr=0.01),
    )  # fmt: skip
    batches = [split_models.tiny_batch(s % 2) for s in range(4)]
    for lives in ([batches[:2], batches[2:]], [batches]):
        losses: list[float] = []
        with tempfile.TemporaryDirectory() as name:
            for life in lives:
                with served(source, task.cut, Path(name), Mesh(dp, pp, tp)) as host:
                    if host is None:
                        continue
                    kept = {"folder": Path(name) / "edge", "patience": 30}
                    with Edge(source, task, batch, connect=f"127.0.0.1:{host.port}", **kept) as edge:
                        _trace(edge, batches)
                        losses += [edge.step(each, samples=range(len(each["labels"]))).loss for each in life]
        found.append(losses)
    return (found[0], found[1]) if found[0] else None
