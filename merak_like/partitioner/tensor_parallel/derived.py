"""What was derived, as data: for each block how its tensors lie on the ranks and what must be communicated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from merak_like.partitioner.tensor_parallel.layout import Layout, Where

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Ranks that divide some axes among them: those that differ in ``rank // repeat % degree`` only.

    Usually there is one, of all ranks. Two where there are fewer key-value heads than ranks: the heads are divided by
    the outer group, the queries of each by the inner one.
    """

    degree: int
    repeat: int
    reduced: Mapping[str, int]
    """Values that are partial sums where they are made; they are summed there. Bytes on one rank."""
    entered: Mapping[str, tuple[Where, ...]]
    """Values whose gradients from these uses are partial: the sum of them is summed over the group."""
    entered_bytes: Mapping[str, int]
    evened: Mapping[str, tuple[Where, ...]]
    """Values whose gradients from these uses are whole where partial ones are needed: divide them by the degree.
    The use ``("", ())`` is all uses in other blocks."""
    sliced: Mapping[Where, Layout]
    """Operands that are whole where a rank's part is needed, and how they are to lie."""
    shared: tuple[Where, ...]
    """Operands that are added once to a partial sum, such as a bias: divide by the degree, gradient as it is."""
    partial_gradients: tuple[str, ...]
    """Weights that are the same in the group, with gradients that add up over it."""
    forms: Mapping[str, str]
    """Steps that must be rewritten: ``mean`` (divide by the degree), ``embedding``, ``cross_entropy``, ``layer_norm``,
    ``rms_norm``."""
    inside_bytes: tuple[int, int] = (0, 0)
    """Reduced inside rewritten steps, forward and backward."""
    adding: tuple[str, ...] = ()
    """Steps that work on parts, or whose gradients are partial: all others give every rank the same, both ways."""

    @property
    def forward_bytes(self) -> int:
        """Payload of the forward's reductions."""
        return sum(self.reduced.values()) + self.inside_bytes[0]

    @property
    def backward_bytes(self) -> int:
        """Payload of the backward's reductions, those of weights' gradients not included."""
        return sum(self.entered_bytes.values()) + self.inside_bytes[1]


@dataclass(frozen=True)
class ShardedAxis:
    """An axis that was chosen."""

    sizes: tuple[int, ...]
    degrees: tuple[int, ...]
    weights: tuple[str, ...]
    """Parameters and buffers it divides."""
    volume: int
    """Elements of matrix parameters it divides."""


@dataclass(frozen=True)
class DerivedBlock:
    """A block (or what is outside of blocks) over a tensor-parallel group."""

    name: str
    steps: tuple[str, ...]
    axes: tuple[ShardedAxis, ...]
    weights: Mapping[str, Layout]
    """Parameters and buffers of which a rank has a part; all others are whole on every rank."""
    values: Mapping[str, Layout]
    """Values of which a rank has a part."""
    groups: tuple[Group, ...]
    sizes: Mapping[Where, int]
    """Constants in the code that are smaller on a rank."""
    random: tuple[str, ...]
    """Steps that draw random numbers for a part of what one process would draw for."""
    whole: Mapping[str, str]
    """Weights that are on every rank, and why."""
    unknown: Mapping[str, int]
    """Operations without a rule, and how often they occur."""
    matrix_elements: int
    sharded_elements: int
    """Elements of the matrix parameters, and of those that are (at least partly) sharded."""

    @property
    def forward_bytes(self) -> int:
        """Payload of all reductions of a forward pass."""
        return sum(group.forward_bytes for group in self.groups)

    @property
    def backward_bytes(self) -> int:
        """Payload of all reductions of a backward pass."""
        return sum(group.backward_bytes for group in self.groups)

    def renamed(self, name: str, new: Mapping[str, str]) -> DerivedBlock:
        """The same for an equal block whose values and weights have other names."""

        def key(old: str) -> str:
            return new.get(old, old)

        def where(old: Where) -> Where:
            return key(old[0]), old[1]

        def group(old: Group) -> Group:
            return replace(
                old,
                reduced=_keys(old.reduced, key), entered_bytes=_keys(old.entered_bytes, key),
                entered={key(k): tuple(map(where, v)) for k, v in old.entered.items()},
                evened={key(k): tuple(map(where, v)) for k, v in old.evened.items()},
                sliced={where(k): v for k, v in old.sliced.items()},
                shared=tuple(map(where, old.shared)), forms=_keys(old.forms, key),
                partial_gradients=tuple(map(key, old.partial_gradients)), adding=tuple(map(key, old.adding)),
            )  # fmt: skip

        return replace(
            self,
            name=name, steps=tuple(map(key, self.steps)),
            axes=tuple(replace(a, weights=tuple(map(key, a.weights))) for a in self.axes),
            weights=_keys(self.weights, key), values=_keys(self.values, key),
            groups=tuple(map(group, self.groups)),
            sizes={where(k): v for k, v in self.sizes.items()}, random=tuple(map(key, self.random)),
            whole=_keys(self.whole, key),
        )  # fmt: skip


def _keys(items: Mapping[str, T], key: Callable[[str], str]) -> dict[str, T]:
    return {key(name): item for name, item in items.items()}


@dataclass(frozen=True)
class Derived:
    """A model over a tensor-parallel group."""

    tp: int
    blocks: tuple[DerivedBlock, ...]
    """In order; what is outside of blocks is last."""
    kinds: tuple[int, ...]
    """For each block the first one that equals it."""
    kept: Mapping[str, str] = field(default_factory=dict[str, str])
    """Weights that were not to be sharded, and why: blocks dispute over them, or a probe failed."""

    @property
    def weights(self) -> dict[str, Layout]:
        """Every parameter and buffer that is sharded."""
        return {name: layout for block in self.blocks for name, layout in block.weights.items()}

    @property
    def share(self) -> float:
        """Of the matrix parameters of blocks (of the whole model, where it has no blocks), how much is sharded."""
        blocks = [block for block in self.blocks if block.name != OUTSIDE and block.matrix_elements] or self.blocks
        total = sum(block.matrix_elements for block in blocks)
        return sum(block.sharded_elements for block in blocks) / total if total else 0.0


OUTSIDE = "outside of blocks"
"""Name of the unit of all steps that are in no block."""
