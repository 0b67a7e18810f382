"""Whether a block treats the samples of a micro-batch one by one, so that it may run on some of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from merak_like.partitioner.tensor_parallel.axes import Axes, Dim
from merak_like.partitioner.tensor_parallel.follow import Followed, follow
from merak_like.partitioner.tensor_parallel.layout import Layout, is_sharded, whole_size
from merak_like.partitioner.tensor_parallel.units import Tensor, Unit

Shape = tuple[int, ...]


def sample_dim(whole: Shape, some: Shape, samples: int, fewer: int) -> int | None:
    """The dimension along which a tensor of ``samples`` samples differs from the same of ``fewer``.

    None if they have one shape. Raises ValueError for shapes that differ in another way.
    """
    differ = [i for i, (a, b) in enumerate(zip(whole, some, strict=False)) if a != b]
    if len(whole) != len(some) or len(differ) > 1:
        raise ValueError(f"{samples} samples have shape {whole}, {fewer} have {some}")
    if differ and whole[differ[0]] * fewer != some[differ[0]] * samples:
        raise ValueError(f"{samples} samples have {whole[differ[0]]} rows, {fewer} have {some[differ[0]]}")
    return differ[0] if differ else None


def divided(
    layouts: Mapping[str, Layout], whole: Mapping[str, Shape], some: Mapping[str, Shape], samples: int, fewer: int
) -> str:  # fmt: skip
    """A value of which a rank has some of the samples; empty if there is none, so that a rank's rows of some samples
    are among its rows of all. ``whole`` and ``some`` are the shapes of values where there are so many samples."""
    for name, layout in layouts.items():
        at = sample_dim(whole[name], some[name], samples, fewer)
        before = 1
        for factor in layout[at] if at is not None else ():
            if is_sharded((factor,)) and before < samples:
                return name
            before *= whole_size((factor,))
    return ""


def entangled(
    unit: Unit, known: Mapping[str, Tensor], some: Mapping[str, Shape], samples: int, fewer: int
) -> str:  # fmt: skip
    """What in a block needs all samples together; empty if nothing does.

    ``some`` are the shapes of values where there are ``fewer`` samples.
    """
    followed = follow(unit, known, border=False)
    marked = set[int]()
    for (name, _), dims in followed.values.items():
        if name not in followed.outer or name not in some:
            continue
        try:
            at = sample_dim(known[name].shape, some[name], samples, fewer)
        except ValueError as error:
            return f"{name}: {error}"
        if at is not None:
            leading = _leading(followed.axes, dims[at], samples)
            if leading is None:
                return f"{name} does not begin with its samples"
            marked.update(leading)
    return next(_ties(followed, marked), "")


def _leading(axes: Axes, dim: Dim, samples: int) -> tuple[int, ...] | None:
    """The first axes of a dimension, as many as make up the samples."""
    resolved = axes.resolve(dim)
    for count in range(len(resolved) + 1):
        if prod(axes.size((axis,)) for axis in resolved[:count]) == samples:
            return resolved[:count]
    return None


def _ties(followed: Followed, marked: set[int]) -> Iterator[str]:
    axes = followed.axes
    for axis in marked:
        for leaf in axes.leaves((axis,)):
            if why := axes.pinned(leaf):
                yield why
    for record in followed.records:
        if marked.intersection(leaf for dim in record.contracted for leaf in axes.leaves(dim)):
            yield f"{record.step.name} sums over samples"
