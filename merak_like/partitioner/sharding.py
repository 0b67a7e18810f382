"""How a plan says what tensor parallelism does: per distinct block, in words and numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupBytes:
    """What ranks that differ in ``rank // repeat % degree`` only add up among each other.

    Bytes are those of the tensors that are summed; a ring moves 2 (degree - 1) / degree of them over each rank's link.
    """

    degree: int
    repeat: int
    forward_bytes: int
    """Of one micro-batch."""
    backward_bytes: int
    """Of one micro-batch, gradients of weights not included."""
    gradient_bytes: int
    """Of one step: gradients of weights that are on all ranks though each rank sees only its part of what they do."""


@dataclass(frozen=True, slots=True)
class ShardedBlock:
    """A block over the tensor-parallel ranks, for itself and all blocks that equal it."""

    name: str
    like: tuple[str, ...]
    """The other blocks that are sharded in the same way; their weights have their name in front instead."""
    weights: Mapping[str, str]
    """Layouts of what a rank has a part of. ``8/2 x 16, 32``: two dimensions, the first a product of an axis of 8 that
    2 ranks share and one of 16. ``8/2@2``: ranks that are 2 apart share it. ``(16/2 | 4)``: one part after the other.
    """
    whole: Mapping[str, str]
    """Weights that every rank has, and why."""
    values: int
    """How many values a rank has a part of only."""
    matrix_elements: int
    sharded_elements: int
    """Of the matrix parameters, and of those that are (at least partly) sharded."""
    groups: tuple[GroupBytes, ...]
    unknown: Mapping[str, int]
    """Operations without a rule, and how often they occur."""
    error: float
    """The largest difference that the probe found between sharded and whole, relative to its tensor."""
    probe: str
    """What was probed: ``tiny`` (the same code on shorter axes), ``real size``, or why nothing was."""

    @property
    def micro_batch_bytes(self) -> int:
        """Summed over ranks in a forward and a backward."""
        return sum(group.forward_bytes + group.backward_bytes for group in self.groups)

    @property
    def gradient_bytes(self) -> int:
        """Summed over ranks once a step."""
        return sum(group.gradient_bytes for group in self.groups)
