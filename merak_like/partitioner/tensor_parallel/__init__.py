"""Tensor parallelism, derived from the graph alone.

Every dimension of every tensor of a fine trace is followed as a product of axes (``axes``, ``follow``, ``rules``); the
axes that divide most parameters and are pinned nowhere are sharded (``choose``); where partial sums are reduced follows
(``flow``); the result is frozen data (``derived``, ``layout``). ``probe`` checks it with numbers.
"""

from merak_like.partitioner.tensor_parallel.derive import derive
from merak_like.partitioner.tensor_parallel.derived import OUTSIDE, Derived, DerivedBlock, Group, ShardedAxis
from merak_like.partitioner.tensor_parallel.layout import Axis, Layout, Segments
from merak_like.partitioner.tensor_parallel.rules import register

__all__ = [
    "OUTSIDE",
    "Axis",
    "Derived",
    "DerivedBlock",
    "Group",
    "Layout",
    "Segments",
    "ShardedAxis",
    "derive",
    "register",
]
