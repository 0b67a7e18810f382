"""Plans that hold what they were made from, for the tests of what explains them: no torch, no tracer."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from merak_like.partitioner.hardware import Link
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from tests.graphs import TOY, gpt

WIDTH, LENGTH, WORDS = 64, 32, 512


@cache
def explained(pp: int = 3, dp: int = 1, share: float = 1.0, link: Link = TOY.intra, **options: Any) -> Plan:
    """A GPT of 7 blocks on pp stages; ``share`` of the memory that it would take is there."""
    graph = gpt(7, WIDTH, LENGTH, WORDS, samples=2)
    asked: dict[str, Any] = {"hardware": replace(TOY, intra=link), "batch": 16 * dp, "micro_batches": 8, **options}
    made = make_plan(graph, Mesh(dp, pp), **asked)
    if share < 1:
        made = make_plan(graph, Mesh(dp, pp), memory_limit=int(share * max(made.rank_bytes)), **asked)
    return made
