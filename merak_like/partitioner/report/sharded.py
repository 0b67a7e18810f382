"""What a plan says of tensor parallelism, turned to each block and unit: shares, bytes of a step, weights of a unit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.sharding import ShardedBlock


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for scripts."""
    check(plan)
    return {
        "digest": plan.digest,
        "model": plan.model,
        "tp": plan.mesh.tp,
        "micro_batches": plan.micro_batches,
        "share": share(plan),
        "sequence_parallel": plan.sequence_parallel,
        "step_bytes": whole_model(plan, step_bytes),
        "link_bytes": whole_model(plan, link_bytes),
        "blocks": [
            {
                **asdict(block),
                "share": block_share(block),
                "step_bytes": step_bytes(plan, block),
                "link_bytes": link_bytes(plan, block),
            }
            for block in plan.sharding
        ],
    }


def check(plan: Plan) -> None:
    """Raise ValueError for a plan that says nothing of tensor parallelism."""
    if plan.mesh.tp == 1:
        raise ValueError(f"the plan is for {plan.mesh}: with tp = 1 nothing is sharded; `merak plan --tp 2` shards")
    if not plan.sharding:
        raise ValueError(
            f"the plan for {plan.mesh} does not say how blocks are sharded: make it again with `merak plan`"
        )


def step_bytes(plan: Plan, block: ShardedBlock) -> int:
    """What is summed over ranks for one block in one step of one replica."""
    return plan.micro_batches * block.micro_batch_bytes + block.gradient_bytes


def link_bytes(plan: Plan, block: ShardedBlock) -> int:
    """What a rank sends for it, and receives: 2 (n - 1) / n of a sum over n ranks, or of a reduce-scatter and a gather.

    On rows, what the products read is gathered once more for the backward (Korthikanti et al., section 4.2.2).
    """
    total = 0.0
    for group in block.groups:
        again = group.backward_bytes / 2 if plan.sequence_parallel else 0.0
        of_step = plan.micro_batches * (group.forward_bytes + group.backward_bytes + again) + group.gradient_bytes
        total += 2 * (group.degree - 1) / group.degree * of_step
    return round(total)


def whole_model(plan: Plan, of: Callable[[Plan, ShardedBlock], int]) -> int:
    """Bytes of all blocks together."""
    return sum(of(plan, block) * (1 + len(block.like)) for block in plan.sharding)


def share(plan: Plan) -> float:
    """How much of the model's matrix parameters is sharded."""
    total = sum(block.matrix_elements * (1 + len(block.like)) for block in plan.sharding)
    return sum(block.sharded_elements * (1 + len(block.like)) for block in plan.sharding) / total if total else 0.0


def of_units(plan: Plan) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Of each unit the weights, by their names in it: layouts of those that are sharded, reasons of the others."""
    parts, whole = dict[str, str](), dict[str, str]()
    for block in plan.sharding:
        for own in (block.name, *block.like):
            for into, weights in ((parts, block.weights), (whole, block.whole)):
                into |= {_renamed(name, block.name, own): told for name, told in weights.items()}
    for first, *others in plan.ties:  # one weight under several names
        for of in (parts, whole):
            of |= dict.fromkeys(others, of[first]) if first in of else {}
    found = list[tuple[dict[str, str], dict[str, str]]]()
    for unit in plan.units:
        inside = re.sub(r" \(\d+/\d+\)$", "", unit.name) + "."
        mine = [
            {n.removeprefix(inside): told for n, told in of.items() if n.startswith(inside)} for of in (parts, whole)
        ]
        found.append((mine[0], mine[1]))
    return found


def kinds(plan: Plan) -> list[str]:
    """Of each unit, whether its weights are all ``divided`` among the ranks, ``partly``, or all ``whole`` on each.

    Empty for a unit without weights.
    """
    if not plan.sharding:
        return [""] * len(plan.units)
    found = {(True, False): "divided", (True, True): "partly", (False, True): "whole", (False, False): ""}
    return [found[bool(parts), bool(whole)] for parts, whole in of_units(plan)]


def _renamed(name: str, block: str, own: str) -> str:
    return f"{own}.{name.removeprefix(f'{block}.')}" if name.startswith(f"{block}.") else name


def dimensions(layout: str) -> tuple[int, ...]:
    """Which dimensions of a layout are sharded."""
    return tuple(index for index, part in enumerate(layout.split(", ")) if "/" in part)


def block_share(block: ShardedBlock) -> float:
    """How much of a block's matrix parameters is sharded."""
    return block.sharded_elements / block.matrix_elements if block.matrix_elements else 0.0
