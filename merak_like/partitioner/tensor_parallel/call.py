"""What a rule sees of one step, and what it says about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from merak_like.partitioner.tensor_parallel.axes import Axes, Dim, Dims
from merak_like.partitioner.tracer.fine import Name, Step

Path = tuple[int | str, ...]
"""Where in a step's arguments: ``(0,)`` the first, ``("dim",)`` a keyword, ``(1, 2, "stop")`` inside containers."""


ALIASES: Mapping[str, str] = {"dim": "axis", "keepdim": "keepdims"}
"""numpy's words, which torch takes too."""


@dataclass
class Operand:
    """A tensor among the arguments of a step. ``dims`` is how the step wants it, which a rule may change."""

    name: Name
    dims: Dims
    grad: bool
    side: bool
    """Does not depend on the batch, or needs no gradient: where it meets a sharded tensor it may be sliced."""
    soft: bool = False
    """Takes the dimensions of the others if it can, and is sliced otherwise."""


@dataclass(kw_only=True)
class Said:
    """What a rule says about a step, besides the axes."""

    contracted: list[Dim] = field(default_factory=list)
    """Dimensions summed over: the result is a partial sum if one is sharded."""
    addends: tuple[Path, ...] = ()
    """Operands added to a contraction once, such as a bias."""
    linear: str = ""
    """``sum``: linear in all operands together; ``product``: in each; so a partial sum may pass. Empty: in none."""
    form: str = ""
    """What must be rewritten if a contracted axis is sharded: ``mean``, ``embedding``, ``cross_entropy``."""
    sizes: list[tuple[Path, Dim]] = field(default_factory=list)
    """Constants that are sizes of dimensions."""
    zero: bool = False
    """The result is all zeros."""


@dataclass
class Call(Said):
    """One step while its rule runs. The rule unifies and pins axes, and sets ``outs``."""

    step: Step
    axes: Axes
    operands: dict[Path, Operand]
    shape: tuple[int, ...] | None
    """Of the result; None for several or none."""
    booleans: frozenset[Name] = frozenset()
    """The operands that are masks."""
    outs: list[Dims] = field(default_factory=list)
    """Dimensions of the results."""

    def said(self) -> dict[str, Any]:
        """The fields of ``Said``."""
        return {each.name: getattr(self, each.name) for each in fields(Said)}

    @property
    def first(self) -> Operand:
        """The operand that stands first; raises KeyError where there is none."""
        return self.operands[0,]

    def has(self, place: int, key: str) -> bool:
        """Whether an argument was given."""
        return key in self.step.kwargs or place < len(self.step.args)

    def arg(self, place: int, key: str, default: Any = None) -> Any:
        """An argument by place or keyword."""
        kwargs: Mapping[str, Any] = self.step.kwargs
        key = ALIASES[key] if key not in kwargs and ALIASES.get(key) in kwargs else key
        return kwargs[key] if key in kwargs else self.step.args[place] if place < len(self.step.args) else default

    def path(self, place: int, key: str) -> Path:
        """Where that argument stands."""
        return (key,) if key in self.step.kwargs else (place,)

    def operand(self, place: int, key: str) -> Operand | None:
        """The tensor given for an argument, or None."""
        return self.operands.get(self.path(place, key))

    def within(self, place: int, key: str) -> list[Operand]:
        """The tensors of an argument that is a list."""
        path = self.path(place, key)
        return [operand for at, operand in self.operands.items() if at[: len(path)] == path]

    def varargs(self, place: int, key: str) -> tuple[Path, Sequence[Any]]:
        """Numbers given one by one (``view(2, 3)``) or as one sequence (``view((2, 3))``): where, and which."""
        if key in self.step.kwargs:
            return (key,), self.step.kwargs[key]
        rest = self.step.args[place:]
        if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
            return (place,), rest[0]
        return (), rest

    def axis(self, value: int, rank: int | None = None) -> int:
        """A dimension number counted from the front."""
        return value % max(1, len(self.first.dims) if rank is None else rank)

    def out(self, dims: Sequence[Dim]) -> None:
        """The step gives (also) a tensor of these dimensions."""
        self.outs.append(tuple(dims))

    def fresh(self, shape: Sequence[int], pin: str = "") -> Dims:
        """New dimensions of these sizes."""
        return tuple(self.axes.fresh(size, pin) for size in shape)

    def size(self, dim: Dim) -> int:
        """Elements along a dimension."""
        return self.axes.size(dim)

    def pin(self, *dims: Dim, why: str = "") -> None:
        """Forbid sharding dimensions."""
        for dim in dims:
            self.axes.pin(dim, why or f"{self.step.word} needs it whole")

    def keep_whole(self, why: str) -> None:
        """Forbid sharding anything that goes in or comes out."""
        for operand in self.operands.values():
            self.pin(*operand.dims, why=why)
        if self.shape is not None:
            self.out(self.fresh(self.shape, why))

    def follow(self, operand: Operand, dims: Sequence[Dim]) -> None:
        """This operand is to have these dimensions: at once, or for a side operand if it can."""
        own = operand.dims
        operand.dims = tuple(dims)
        operand.soft = operand.side
        if not operand.side:
            for mine, theirs in zip(own, operand.dims, strict=True):
                self.axes.unify(mine, theirs)


def flatten(item: Any, path: Path = ()) -> Iterator[tuple[Path, Name]]:
    """Every tensor in a step's arguments with the path to it."""
    if isinstance(item, Name):
        yield path, item
    elif isinstance(item, (tuple, list)):
        for index, inner in enumerate(item):
            yield from flatten(inner, (*path, index))
    elif isinstance(item, Mapping):
        for key, inner in item.items():
            yield from flatten(inner, (*path, key))
    elif isinstance(item, slice):
        for key in ("start", "stop", "step"):
            yield from flatten(getattr(item, key), (*path, key))
