"""Whatever is killed or cut, every step is applied once: the weights are those of a run that nothing disturbed, to the
last bit. Dropout is on, a norm counts, and the codec remembers samples: all of it must be put back where it was."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merak_like.split import checkpoint
from tests.split_killed import on_ranks
from tests.split_process import Nursery

STEPS, EVERY, AT = 6, 2, 3
TASK: dict[str, Any] = {
    "cut": "layers.0:layers.3", "codec": "aqsgd(4)|int8", "micro_batches": 2, "window": 2, "checkpoint_every": EVERY,
    "optimizer": {"lr": 0.01}, "seed": 5,
}  # fmt: skip
PLACES = (
    "opened", "agreed", "begun", "up forward", "down forward", "down backward", "up backward", "stepped", "saved",
    "half written",
)  # fmt: skip

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    host = nursery.start("host", folder=str(folder / "host"))
    told = nursery.wait(train(nursery, folder, [host["port"]]))
    assert told["status"] == 0, told
    os.kill(host["pid"], signal.SIGTERM)
    assert nursery.wait(host["pid"])["status"] == 0
    return weights(folder), told["losses"]


def train(nursery: Nursery, folder: Path, ports: list[int], **more: Any) -> int:
    told = {"folder": str(folder / "edge"), "ports": ports, "steps": STEPS, "task": TASK, **more}
    return nursery.start("edge", **told)["pid"]


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of both halves after the last step, from their checkpoints."""
    session = json.loads((folder / "edge/session.json").read_text())["session"]
    found = {}
    for side in (folder / "edge", folder / "host/sessions" / session):
        found |= checkpoint.of("model/", checkpoint.load(side, STEPS).tensors)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_halves_are_the_model(undisturbed: tuple[dict[str, Tensor], Any]):
    from tests.split_models import tiny

    model = tiny()[0]
    trained = {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    assert undisturbed[0].keys() == trained
    assert sorted(map(int, undisturbed[1])) == list(range(STEPS))


def slow_but(places: Sequence[str], *usual: str) -> list[Any]:
    """A restart takes seconds: only some places are tried every time, and over gRPC one."""
    return [
        pytest.param(place, scheme, marks=[] if scheme + place in usual else [pytest.mark.slow])
        for scheme in ("", "grpc://")
        for place in places
    ]


@pytest.mark.parametrize(("place", "scheme"), slow_but(PLACES, "up backward", "stepped", "grpc://stepped"))
def test_host_killed(
    place: str, scheme: str, nursery: Nursery, undisturbed: tuple[dict[str, Tensor], Any], tmp_path: Path
):
    if scheme:
        pytest.importorskip("grpc")
    host = nursery.start("host", folder=str(tmp_path / "host"), fault=place, at=AT, scheme=scheme)
    edge = train(nursery, tmp_path, [host["port"]], scheme=scheme)
    assert nursery.wait(host["pid"])["status"] == -signal.SIGKILL
    again = nursery.start("host", folder=str(tmp_path / "host"), port=host["port"], scheme=scheme)
    told = nursery.wait(edge)
    assert told["status"] == 0, told
    assert told["losses"] == undisturbed[1]
    assert same(weights(tmp_path), undisturbed[0])
    os.kill(again["pid"], signal.SIGTERM)
    assert nursery.wait(again["pid"])["status"] == 0


@pytest.mark.parametrize(
    ("place", "scheme"), slow_but(["up forward", "down backward", "stepped", "half written"], "stepped")
)
def test_edge_killed_and_back(
    place: str, scheme: str, nursery: Nursery, undisturbed: tuple[dict[str, Tensor], Any], tmp_path: Path
):
    if scheme:
        pytest.importorskip("grpc")
    at = AT if place != "half written" else EVERY + 1
    host = nursery.start("host", folder=str(tmp_path / "host"), scheme=scheme)
    edge = train(nursery, tmp_path, [host["port"]], fault=place, at=at, scheme=scheme)
    assert nursery.wait(edge)["status"] == -signal.SIGKILL
    told = nursery.wait(train(nursery, tmp_path, [host["port"]], scheme=scheme))
    assert told["status"] == 0, told
    assert same(weights(tmp_path), undisturbed[0])
    os.kill(host["pid"], signal.SIGTERM)
    assert nursery.wait(host["pid"])["status"] == 0


DEALT = {**TASK, "micro_batches": 4}
"""Two for each of two replicas."""


@pytest.fixture(scope="module")
def undisturbed_on(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights and losses of a run on a mesh that nothing disturbed."""
    known: dict[tuple[int, ...], Any] = {}

    def found(mesh: tuple[int, ...]) -> Any:
        if mesh not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            pids, port = on_ranks(nursery, folder, mesh)
            told = nursery.wait(train(nursery, folder, [port], task=DEALT))
            assert told["status"] == 0, told
            os.kill(pids[0], signal.SIGTERM)
            assert [nursery.wait(pid)["status"] for pid in pids] == [0] * len(pids)
            known[mesh] = weights(folder), told["losses"]
        return known[mesh]

    return found


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("rank", "place"), [(0, "up backward"), (0, "stepped"), (0, "saved"), (1, "stepped")])
@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 1, 2)], ids=["dp", "tp"])
def test_a_rank_killed(
    mesh: tuple[int, ...], rank: int, place: str, nursery: Nursery, undisturbed_on: Any, tmp_path: Path
):
    """Of replicas or of tensor-parallel ranks: all are started again, and go on from a checkpoint of whole tensors."""
    pids, port = on_ranks(nursery, tmp_path, mesh, faults={rank: {"fault": place, "at": AT}})
    edge = train(nursery, tmp_path, [port], task=DEALT)
    assert nursery.wait(pids.pop(rank))["status"] == -signal.SIGKILL
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        nursery.wait(pid)
    again, _ = on_ranks(nursery, tmp_path, mesh, port=port)
    told = nursery.wait(edge)
    assert told["status"] == 0, told
    calm = undisturbed_on(mesh)
    assert told["losses"] == calm[1]
    assert same(weights(tmp_path), calm[0])
    os.kill(again[0], signal.SIGTERM)
    assert [nursery.wait(pid)["status"] for pid in again] == [0] * len(again)
