"""A connection cut at any frame, and a session that moves to another host, change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.messages import Task
from merak_like.split.wire import Kind
from tests import split_models
from tests.split_pair import Pair, pair, task
from tests.split_proxy import Proxy

__all__ = ["pair"]

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


@pytest.mark.parametrize("steps", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_session_moves_to_a_second_host_at_half_time(steps: int, tmp_path: Path):
    model, batch = split_models.calm()
    source, what = Source(lambda: copy.deepcopy(model)), remembering()

    def run(folder: Path, move: bool) -> tuple[dict[str, Tensor], list[float]]:
        first = Host(source, what.cut, listen="127.0.0.1:0", folder=folder / "host").start()
        second = Host(source, what.cut, listen="127.0.0.1:0", folder=folder / "host").start()
        connect = [f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"]
        losses: list[float] = []
        with Edge(source, what, batch, connect=connect, folder=folder / "edge", patience=20) as edge:
            for step in range(steps):
                if move and step == steps // 2:
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
