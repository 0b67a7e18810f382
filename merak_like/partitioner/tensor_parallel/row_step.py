"""One step on a rank's rows: its rule, run on this step alone, says whether they stay apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merak_like.partitioner.tensor_parallel.axes import Axes, Dims
from merak_like.partitioner.tensor_parallel.call import Call, Operand, Path
from merak_like.partitioner.tensor_parallel.follow import tried
from merak_like.partitioner.tensor_parallel.layout import Axis, Factors, Layout, is_sharded
from merak_like.partitioner.tensor_parallel.rules import Rule
from merak_like.partitioner.tensor_parallel.rules.elementwise import CREATED, LIKE, ONLY_FIRST
from merak_like.partitioner.tensor_parallel.trying import commutes
from merak_like.partitioner.tensor_parallel.units import Tensor
from merak_like.partitioner.tracer.fine import Name, Step

BLIND = ONLY_FIRST | frozenset(CREATED.split()) | frozenset(LIKE.split())
"""Words of steps that look at a tensor's dtype and device only, where their rule drops it."""


@dataclass(frozen=True)
class RowStep:
    """One step on rows."""

    outs: tuple[Layout, ...]
    """Empty if it only looked at the dtype of what has rows."""
    sliced: Mapping[Path, Layout]
    whole: tuple[Path, ...]
    """Operands without rows."""
    sizes: Mapping[Path, int]
    unread: tuple[Path, ...]


def on_rows(
    step: Step, named: Sequence[tuple[Path, Name]], known: Mapping[str, Tensor], values: Mapping[str, Layout], tp: int,
    rules: Mapping[str, Rule],
) -> RowStep | None:  # fmt: skip
    """What a step is on rows; None if they do not stay apart.

    ``named`` are its operands, ``values`` how those that have rows lie.
    """
    axes, own, marks = Axes(), dict[Name, Dims](), set[int]()
    for name in dict.fromkeys(name for _, name in named):
        own[name] = _dims(axes, values.get(name.name), known[name.name], marks)
    infos = {name: known[name.name] for name in own}
    booleans = frozenset(name for name, info in infos.items() if info.dtype in ("bool", "uint8"))
    operands = {path: Operand(name, own[name], infos[name].grad, False) for path, name in named}
    call = Call(step, axes, dict(operands), step.value.shape if step.value else None, booleans)
    rule = rules.get(step.word.split(".")[0])
    if rule is None and commutes(step, {name: info.shape for name, info in infos.items()}):
        rule = tried
    if rule is None:
        return None
    rule(call)
    dropped = tuple(path for path in operands if path not in call.operands)
    if dropped and step.word not in BLIND:
        return None
    if not any(name.name in values for path, name in named if path not in dropped):
        return RowStep((), {}, (), {}, tuple(path for path in dropped if operands[path].name.name in values))
    roots = {axes.resolve((axis,)) for axis in marks}
    if len(roots) != 1 or len(mark := next(iter(roots))) != 1 or axes.segments(mark[0]) or axes.pinned(mark[0]):
        return None
    axis = mark[0]
    if any(axis in axes.leaves(dim) for dim in call.contracted):
        return None
    made = [_layout(axes, dims, axis, tp) for dims in call.outs]
    sliced, whole = dict[Path, Layout](), list[Path]()
    for path, name in named:
        if path in dropped or name.name in values:
            continue
        layout = _layout(axes, own[name], axis, tp)
        if layout is None:
            return None
        if any(map(is_sharded, layout)):
            sliced[path] = layout
        else:
            whole.append(path)
    outs = tuple(layout for layout in made if layout is not None and any(map(is_sharded, layout)))
    if not outs or len(outs) < len(made):
        return None
    sizes = {path: dim for path, dim in call.sizes if axis in axes.leaves(dim)}
    if not all(axis in axes.resolve(dim) for dim in sizes.values()):
        return None
    unread = tuple(path for path in dropped if operands[path].name.name in values)
    local = {path: axes.size(axes.resolve(dim)) // tp for path, dim in sizes.items()}
    return RowStep(outs, sliced, tuple(whole), local, unread)


def _dims(axes: Axes, layout: Layout | None, known: Tensor, marks: set[int]) -> Dims:
    """New axes for a tensor; that of its rows is marked."""
    if layout is None:
        return tuple(axes.fresh(size) for size in known.shape)
    dims: list[tuple[int, ...]] = []
    for factors in layout:
        dim: tuple[int, ...] = ()
        for factor in factors:
            assert isinstance(factor, Axis)
            new = axes.fresh(factor.size)
            if factor.degree > 1:
                marks.update(new)
            dim += new
        dims.append(dim)
    return tuple(dims)


def _layout(axes: Axes, dims: Dims, axis: int, tp: int) -> Layout | None:
    """How a tensor lies if one axis is sharded; None if that cannot be said."""
    found: list[Factors] = []
    for dim in dims:
        factors: list[Axis] = []
        for each in axes.resolve(dim):
            if each != axis and axis in axes.leaves((each,)):
                return None
            factors.append(Axis(axes.size((each,)), tp if each == axis else 1))
        found.append(tuple(factors))
    if sum(factor == Axis(axes.size((axis,)), tp) for factors in found for factor in factors) > 1:
        return None
    return tuple(found)
