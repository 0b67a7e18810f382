"""An edge holds its own part of the model and nothing of the rest, not even on the way there."""

from __future__ import annotations

import sys

import pytest

MOST = 0.6
"""Of what the whole model takes, where the edge owns one of four layers."""


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_an_edge_with_one_layer_of_four_takes_less_than_six_tenths():
    """Its tensors and its peak of resident memory, from a checkpoint on disk to the second step of AdamW."""
    pytest.importorskip("transformers")
    from benchmarks.split.memory import compare

    found = compare()
    assert found["edge"]["tensors"] < 0.4 * found["whole"]["tensors"]
    assert found["edge"]["resident"] < MOST * found["whole"]["resident"]
    assert found["edge"]["tensors"] < found["edge"]["forecast"]
