"""Clients of a group train one cloud half: the numbers are those of one process that trains the same, and a step is
applied once, whatever is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import split_groups as groups
from tests.split_groups import Ward

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return groups.made_keys(tmp_path_factory.mktemp("keys"))


def test_in_turns_is_one_process_that_trains_in_that_order(certificates: Path, tmp_path: Path):
    """Two steps of ann, two of bob, and again: the shared layers, Adam's moments and the running means go from one to
    the other."""
    group = groups.text("sequential", "ann", "bob", turn=2)
    ward = Ward(tmp_path, certificates, group)
    edges = {name: ward.edge(name) for name in ("ann", "bob")}
    losses = ward.train(edges, {"ann": 4, "bob": 4})
    expected_losses, expected = groups.alone(group, 8)
    assert groups.furthest(ward.weights(edges), expected) < 1e-10
    for name in edges:
        assert list(losses[name]) == [0, 1, 2, 3]
        assert list(losses[name].values()) == pytest.approx(list(expected_losses[name].values()), abs=1e-10)
    ward.host.close()
    for edge in edges.values():
        edge.close()
