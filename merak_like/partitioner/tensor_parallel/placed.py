"""Which axes are sharded, and how: from there to the layouts of tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from merak_like.partitioner.tensor_parallel.axes import Axes, Dim, Dims
from merak_like.partitioner.tensor_parallel.derived import DerivedBlock, Group
from merak_like.partitioner.tensor_parallel.flow import local_size
from merak_like.partitioner.tensor_parallel.follow import Followed
from merak_like.partitioner.tensor_parallel.layout import Axis, Factors, Layout, Segments

Place = tuple[int, int]
"""Degree and repeat of a sharded axis; see ``layout.Axis``."""


def layout_of(axes: Axes, dims: Dims, place: Mapping[int, Place]) -> Layout:
    """How a tensor lies if these axes are sharded."""
    return tuple(_factors(axes, dim, place) for dim in dims)


def _factors(axes: Axes, dim: Dim, place: Mapping[int, Place]) -> Factors:
    found = list[Axis | Segments]()
    for axis in axes.resolve(dim):
        segments = axes.segments(axis)
        if segments and any(leaf in place for leaf in axes.leaves((axis,))):
            found.append(Segments(tuple(_factors(axes, segment, place) for segment in segments)))
            continue
        degree, repeat = place.get(axis, (1, 1))
        last = found[-1] if found else None
        if degree == 1 and isinstance(last, Axis) and last.degree == 1:
            found[-1] = Axis(last.size * axes.size((axis,)))
        else:
            found.append(Axis(axes.size((axis,)), degree, repeat))
    return tuple(found)


def places(followed: Followed, block: DerivedBlock) -> dict[int, Place]:
    """The axes of a followed unit that a derivation of it shards."""
    dims = followed.weights | {name: d for (name, version), d in followed.values.items() if not version}
    found = dict[int, Place]()
    for name, layout in [*block.weights.items(), *block.values.items()]:
        for dim, factors in zip(dims[name], layout, strict=True):
            found.update(_sharded(followed.axes, dim, factors))
    return found


def _sharded(axes: Axes, dim: Dim, factors: Factors) -> Iterator[tuple[int, Place]]:
    left = list(axes.resolve(dim))
    for factor in factors:
        if isinstance(factor, Segments):
            for segment, part in zip(axes.segments(left.pop(0)), factor.parts, strict=True):
                yield from _sharded(axes, segment, part)
        elif factor.degree > 1:
            yield left.pop(0), (factor.degree, factor.repeat)
        else:
            size = 1
            while size < factor.size:
                size *= axes.size((left.pop(0),))


def resized(block: DerivedBlock, followed: Followed, axes: Axes, tp: int) -> tuple[DerivedBlock, DerivedBlock]:
    """A block over axes of other sizes: whole, as one rank runs it, and sharded as before."""
    place = places(followed, block)
    degrees = {axis: degree for axis, (degree, _) in place.items()}
    constants = [
        ((record.step.name, path), dim) for record in followed.records for path, dim in record.sizes
    ]  # fmt: skip
    uses = {(record.step.name, use.path): use.dims for record in followed.records for use in record.uses}
    dims = followed.weights | {name: d for (name, version), d in followed.values.items() if not version}

    def group(one: Group) -> Group:
        own = ((one.degree, one.repeat), (tp, 1))
        mine = {axis: (one.degree, one.repeat) for axis, at in place.items() if at in own}
        return replace(one, sliced={where: layout_of(axes, uses[where], mine) for where in one.sliced})

    whole = replace(
        block, axes=(), weights={}, values={}, groups=(),
        sizes={where: local_size(axes, dim, {}) for where, dim in constants},
    )  # fmt: skip
    return whole, replace(
        block,
        weights={name: layout_of(axes, dims[name], place) for name in block.weights},
        values={name: layout_of(axes, dims[name], place) for name in block.values},
        groups=tuple(map(group, block.groups)),
        sizes={where: local_size(axes, dim, degrees) for where, dim in constants},
    )
