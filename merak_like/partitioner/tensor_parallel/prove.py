"""What is derived is believed block by block: each distinct one is run alone in numbers, sharded against whole."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from merak_like.partitioner.tensor_parallel.alone import Compared, compare
from merak_like.partitioner.tensor_parallel.derive import derive
from merak_like.partitioner.tensor_parallel.derived import Derived, DerivedBlock
from merak_like.partitioner.tensor_parallel.follow import follow
from merak_like.partitioner.tensor_parallel.given import Sources
from merak_like.partitioner.tensor_parallel.probe import EXACT
from merak_like.partitioner.tensor_parallel.rules import RULES, Rule
from merak_like.partitioner.tensor_parallel.units import tensors, units
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.fine import steps


@dataclass(frozen=True)
class Proven:
    """A derivation of which every distinct block was probed."""

    derived: Derived
    """What is believed."""
    blocks: Mapping[int, Compared]
    """By the index of the first of equal blocks."""
    failed: Mapping[str, Compared]
    """Blocks that are whole because their sharding was wrong or could not be run, by name."""

    @property
    def worst(self) -> float:
        """The largest error of a block that is believed."""
        return max((found.worst for found in self.blocks.values()), default=0.0)


def prove(
    model: nn.Module, traced: Trace, derived: Derived, batch: Any, *, rules: Mapping[str, Rule] = RULES
) -> Proven:
    """Probe each distinct block of a derivation: values and all gradients, in float64, in one process.

    ``traced`` is the fine trace it was derived from with ``rules``, ``batch`` one like its example; the model may be on
    the meta device. Where a block is too large it is run in a tiny form, with the same code and shorter axes.

    A block that fails, or that can be run in no form, stays whole: its weights are refused, what is left is derived
    and probed anew, and a warning names the block and the operation.
    """
    code = steps(traced)
    known, parts = tensors(traced.graph, code, traced.constants), units(traced.graph, code)
    sources = Sources(model, traced, code, batch)
    done: list[tuple[DerivedBlock, Compared]] = []
    failed: dict[str, Compared] = {}
    while True:
        blocks = dict[int, Compared]()
        refused = dict[str, str]()
        for index in dict.fromkeys(derived.kinds):
            block = derived.blocks[index]
            found = next((found for before, found in done if before == block), None)
            if found is None:
                followed = follow(parts[index], known, derived.kept, rules)
                found = compare(followed, block, derived.tp, sources)
                done.append((block, found))
            blocks[index] = found
            if found.worst >= EXACT:
                failed[block.name] = found
                alike = [other for other, kind in zip(derived.blocks, derived.kinds, strict=True) if kind == index]
                refused |= {name: _told(found) for other in alike for name in other.weights}
                warnings.warn(f"{block.name} stays whole over tp = {derived.tp}: {_told(found)}", stacklevel=2)
        if not refused:
            return Proven(derived, blocks, failed)
        kept = {**derived.kept, **refused}
        derived = derive(traced.graph, code, derived.tp, constants=traced.constants, rules=rules, whole=kept)


def _told(found: Compared) -> str:
    if found.way.startswith("not run"):
        return f"it could not be probed ({found.way}: {found.where})"
    return f"sharded it is not the same ({found.worst:.0e} in {found.where})"
