"""Clients of a group train one cloud half: the numbers are those of one process that trains the same, and a step is
applied once, whatever is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor

from tests import split_groups as groups
from tests.split_groups import Ward
from tests.split_process import Nursery

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return groups.made_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


def test_in_turns_is_one_process_that_trains_in_that_order(certificates: Path, tmp_path: Path):
    """Two steps of ann, two of bob, and again: the shared layers, Adam's moments and the running means go from one to
    the other."""
    group = groups.text("sequential", "ann", "bob", turn=2)
    with Ward(tmp_path, certificates, group) as ward:
        for name in group.members:
            ward.edge(name)
        losses = ward.train(ann=4, bob=4)
        expected_losses, expected = groups.alone(group, 8)
        assert groups.furthest(ward.weights, expected) < 1e-10
        for name in group.members:
            assert list(losses[name]) == [0, 1, 2, 3]
            assert list(losses[name].values()) == pytest.approx(list(expected_losses[name].values()), abs=1e-10)


@pytest.mark.parametrize(("alpha", "phi"), [(0.0, 0.0), (0.5, 0.67)])
def test_in_parallel_is_one_process_with_the_same_formulas(
    alpha: float, phi: float, certificates: Path, tmp_path: Path
):
    """Three clients at once, two of which get one gradient at the cut; without ``phi`` their batches differ in size."""
    group = groups.text("parallel", "ann", "bob", "eve", alpha=alpha, phi=phi)
    even = phi > 0
    with Ward(tmp_path, certificates, group, even=even) as ward:
        for name in group.members:
            ward.edge(name)
        losses = ward.train(ann=3, bob=3, eve=3)
        expected_losses, expected = groups.alone(group, 3, even=even)
        assert groups.furthest(ward.weights, expected) < 1e-10
        for name in group.members:
            assert list(losses[name].values()) == pytest.approx(list(expected_losses[name].values()), abs=1e-10)


CRASHES = ("begun", "stepped", "applied", "group saved")


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("place", CRASHES)
def test_a_host_that_crashes_changes_nothing(
    mode: str, place: str, certificates: Path, nursery: Nursery, tmp_path: Path
):
    """Killed with SIGKILL in the middle of a round, and started again: to the last bit what a calm run gives."""
    group = groups.text(mode, "ann", "bob")
    options = {"keys": str(certificates), "groups": {"ward": group.model_dump(mode="json")}, "cut": groups.CUT,
               "model": "tests.split_groups:made"}  # fmt: skip

    def run(folder: Path, fault: str) -> dict[str, Tensor]:
        host = nursery.start("host", folder=str(folder / "host"), fault=fault, at=3, **options)
        with Ward(folder, certificates, group, port=host["port"]) as ward:
            for name in group.members:
                ward.edge(name, codec="aqsgd(4)|int8")
            if fault:
                watcher = Thread(target=again, args=(host, folder))
                watcher.start()
            ward.train(ann=6, bob=6)
            if fault:
                watcher.join(60)
                host = restarted[-1]
            os.kill(host["pid"], signal.SIGTERM)
            assert nursery.wait(host["pid"])["status"] == 0
            return ward.kept()

    restarted: list[dict[str, int]] = []

    def again(host: dict[str, int], folder: Path) -> None:
        assert nursery.wait(host["pid"])["status"] == -signal.SIGKILL
        restarted.append(nursery.start("host", folder=str(folder / "host"), port=host["port"], **options))

    calm, shaken = run(tmp_path / "calm", ""), run(tmp_path / "shaken", place)
    assert restarted
    assert calm.keys() == shaken.keys()
    assert all(torch.equal(calm[name], shaken[name]) for name in calm)
