"""One leaf of a batch by its path is the one that a walk through all of it finds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.utils import _pytree

from merak_like.partitioner.tracer.example import leaf, leaves


class Pair(NamedTuple):
    """Reached by attributes."""

    ids: torch.Tensor
    more: list[torch.Tensor]


@dataclass
class Own:
    """A container that only torch can take apart."""

    inner: torch.Tensor


_pytree.register_pytree_node(
    Own, lambda own: ([own.inner], None), lambda kids, _: Own(*kids),
    flatten_with_keys_fn=lambda own: ([(cast(Any, _pytree.MappingKey("inner")), own.inner)], None),
)  # fmt: skip


def test_each_leaf_is_found_by_its_path():
    a, b, c, d, e = (torch.tensor(n) for n in range(5))
    batch = {"x": a, ".odd": b, "pair": Pair(c, [d]), "list": [(e,), OrderedDict(k=a)], "own": Own(b)}
    found = leaves(batch)
    assert len(found) == 7
    for path, value in found.items():
        assert leaf(batch, path) is value
    assert leaf(a, ()) is a
