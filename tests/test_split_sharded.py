"""What tensor-parallel ranks have of a cut and of a checkpoint, and what edge and host agree on."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from merak_like.partitioner.tensor_parallel.layout import Axis
from merak_like.runtime.links import Spec
from merak_like.runtime.tensor_parallel.shards import Shards
from merak_like.split.halves import Halves
from merak_like.split.sharded import as_agreed, fitting, part, require_whole, whole


def halves(sent: list[tuple[str, int]], returned: list[tuple[str, int]], digest: str) -> Halves:
    """Of values by name and width."""
    up, down = (tuple(Spec(name, (2, width), torch.float32, True) for name, width in one) for one in (sent, returned))
    return Halves(cast(Any, None), (0, 1, 2, 3), up, down, (), (), digest)


def test_what_travels_has_the_ranks_own_names():
    agreed = halves([("cos", 4), ("add_6", 8)], [("add_9", 8)], "agreed")
    own = halves([("add_8", 8)], [("add_26", 8)], "own")
    found = as_agreed(agreed, own)
    assert [spec.name for spec in found.sent] == [
        "unread cos",
        "add_8",
    ]  # cos travels, and the ranks make it themselves
    assert [spec.name for spec in found.returned] == ["add_26"]
    assert found.digest == "agreed"


def test_values_that_cannot_be_told_apart_are_refused():
    agreed = halves([("a", 8), ("b", 8)], [("c", 8)], "agreed")
    with pytest.raises(ValueError, match=r"2 values of shape .* travel, tensor-parallel ranks would need 1.*tp=1"):
        as_agreed(agreed, halves([("x", 8)], [("z", 8)], "own"))
    with pytest.raises(ValueError, match="other values than the edge takes"):
        as_agreed(agreed, halves([("x", 8), ("y", 8)], [], "own"))
    with pytest.raises(ValueError, match="has a part of x, which travels"):
        require_whole((*agreed.sent, Spec("x", (2, 8), torch.float32, True)), {"a": (2, 8), "x": (2, 4)})


def test_a_checkpoint_is_whole_and_each_rank_takes_its_part():
    layouts = {"w": ((Axis(6, 2),), (Axis(3),))}
    ranks = [Shards(layouts, rank, 2) for rank in range(2)]
    tensor = torch.arange(18.0).view(6, 3)
    for name in ("model/w", "weights/w", "optimizer/w/exp_avg"):
        parts = [part(shards, name, tensor) for shards in ranks]
        assert [tuple(one.shape) for one in parts] == [(3, 3), (3, 3)]
        assert whole(ranks[0], name, parts).equal(tensor)
    for name, one in (("optimizer/w/step", torch.tensor(3.0)), ("codec/up/0/w", tensor), ("model/b", tensor)):
        assert part(ranks[1], name, one) is one
        assert whole(ranks[0], name, [one, one]) is one


def test_only_what_a_step_changes_must_be_in_a_checkpoint():
    """How a half lies on ranks decides whether it has a table of positions."""
    mine = {"w": torch.zeros(2), "table": torch.zeros(3)}
    assert fitting(mine, {"w": torch.ones(2)}, {"table"}, alone=True) == ("w",)
    assert fitting({"w": mine["w"]}, mine, {"table"}, alone=True) == ("w",)
    assert fitting({"w": mine["w"]}, {**mine, "of another rank": torch.ones(1)}, {"table"}, alone=False) == ("w",)
    for theirs in ({}, {"w": torch.ones(3)}, {**mine, "v": torch.ones(1)}):
        with pytest.raises(ValueError, match="another model or cut"):
            fitting(mine, theirs, {"table"}, alone=True)
