"""Derive tensor parallelism from a trace: no table of models, only of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tensor_parallel.axes import Dims
from merak_like.partitioner.tensor_parallel.choose import Candidate, choose
from merak_like.partitioner.tensor_parallel.derived import Derived, DerivedBlock, Group, ShardedAxis
from merak_like.partitioner.tensor_parallel.flow import Flow, Flows, local_size
from merak_like.partitioner.tensor_parallel.follow import Followed, follow
from merak_like.partitioner.tensor_parallel.layout import Layout, Where
from merak_like.partitioner.tensor_parallel.placed import Place, layout_of
from merak_like.partitioner.tensor_parallel.rules import RULES, Rule
from merak_like.partitioner.tensor_parallel.units import Tensor, Unit, signature, tensors, units
from merak_like.partitioner.tracer.fine import Step
from merak_like.partitioner.tracer.words import draws


@dataclass(frozen=True)
class Model:
    """What the derivation looks at, whatever the degree."""

    known: Mapping[str, Tensor]
    parts: Sequence[Unit]
    signatures: Sequence[tuple[Any, tuple[str, ...]]]

    @classmethod
    def of(cls, graph: ProxyGraph, steps: Sequence[Step], constants: Mapping[str, Any] | None = None) -> Model:
        """From a fine trace, its steps and its constants."""
        known, parts = tensors(graph, steps, constants or {}), units(graph, steps)
        return cls(known, parts, [signature(unit, known) for unit in parts])


def derive(
    graph: ProxyGraph, steps: Sequence[Step], tp: int, *, constants: Mapping[str, Any] | None = None,
    rules: Mapping[str, Rule] = RULES, whole: Mapping[str, str] | None = None,
) -> Derived:  # fmt: skip
    """How to shard a model over ``tp`` ranks. ``steps`` are those of a fine trace, ``constants`` its constants.

    A weight that two blocks would shard differently stays whole, and so do those in ``whole``, for the reasons given
    there. Raises ValueError for a degree below 1.
    """
    return derive_model(Model.of(graph, steps, constants), tp, rules=rules, whole=whole)


def derive_model(
    model: Model, tp: int, *, rules: Mapping[str, Rule] = RULES, whole: Mapping[str, str] | None = None
) -> Derived:
    """The same, where several degrees are tried."""
    if tp < 1:
        raise ValueError(f"tp = {tp} is no number of ranks: give a whole number of at least 1")
    whole = dict(whole or {})
    while True:
        blocks, kinds = _derive(model, tp, whole, rules)
        disputed = _disputed(blocks)
        if not disputed - whole.keys():
            return Derived(tp, blocks, kinds, whole)
        whole |= dict.fromkeys(disputed, "blocks that share it would shard it differently")


def _derive(
    model: Model, tp: int, whole: Mapping[str, str], rules: Mapping[str, Rule]
) -> tuple[tuple[DerivedBlock, ...], tuple[int, ...]]:
    memo: dict[Any, int] = {}
    blocks, kinds = list[DerivedBlock](), list[int]()
    for index, (unit, (key, names)) in enumerate(zip(model.parts, model.signatures, strict=True)):
        key = (key, tuple(i for i, name in enumerate(names) if name in whole))
        same = memo.setdefault(key, index)
        kinds.append(same)
        if same == index:
            blocks.append(derive_unit(unit, model.known, tp, whole, rules))
        else:
            blocks.append(blocks[same].renamed(unit.name, dict(zip(model.signatures[same][1], names, strict=True))))
    return tuple(blocks), tuple(kinds)


def _disputed(blocks: Sequence[DerivedBlock]) -> set[str]:
    found: dict[str, Layout | None] = {}
    disputed = set[str]()
    for block in blocks:
        for name, layout in [*block.weights.items(), *dict.fromkeys(block.whole).items()]:
            if name in found and found[name] != layout:
                disputed.add(name)
            found[name] = layout
    return disputed


def derive_unit(
    unit: Unit, known: Mapping[str, Tensor], tp: int, whole: Mapping[str, str] | None = None,
    rules: Mapping[str, Rule] = RULES,
) -> DerivedBlock:  # fmt: skip
    """One block; see ``derive``."""
    followed = follow(unit, known, whole, rules)
    flows = Flows(followed)
    return describe(followed, flows, choose(followed, flows, tp), tp)


def describe(followed: Followed, flows: Flows, chosen: Sequence[Candidate], tp: int) -> DerivedBlock:
    """The block as data, for the axes that were chosen."""
    place: dict[int, Place] = {}
    digits = {(tp, 1)}
    for candidate in chosen:
        if len(candidate.axes) == 1:
            place[candidate.axes[0]] = (tp, 1)
        else:
            outer, inner = candidate.degrees
            place |= {candidate.axes[0]: (outer, inner), candidate.axes[1]: (inner, 1)}
            digits = {(outer, inner), (inner, 1)}
    degrees = {axis: degree for axis, (degree, _) in place.items()}
    groups, local = list[Group](), set[str]()
    for degree, repeat in sorted(digits, reverse=True):
        mine = frozenset(axis for axis, at in place.items() if at in ((degree, repeat), (tp, 1)))
        flow = flows.run(mine, degree, degrees)
        groups.append(_group(followed, flow, mine, degree, repeat))
        local |= set(flow.local)
    if len(groups) > 1:
        groups = [*_common(groups, tp), *groups]
    axes = followed.axes
    weights = {n: layout_of(axes, d, place) for n, d in followed.weights.items() if _touches(followed, d, place)}
    values = {
        name: layout_of(axes, dims, place)
        for (name, version), dims in followed.values.items()
        if not version and name not in followed.outer and _touches(followed, dims, place)
    }
    matrices = {n: prod(followed.known[n].shape) for n in followed.weights if followed.known[n].matrix}
    local_steps = [record.step for record in followed.records if record.step.name in local]
    return DerivedBlock(
        name=followed.unit.name,
        steps=tuple(step.name for step in followed.unit.steps),
        axes=tuple(_sharded_axis(followed, candidate) for candidate in chosen),
        weights=weights,
        values=values,
        groups=tuple(groups),
        sizes=_sizes(followed, degrees),
        random=tuple(step.name for step in local_steps if draws(step.word, step.args, step.kwargs)),
        whole={n: _reason(followed, dims, tp) for n, dims in followed.weights.items() if n not in weights},
        unknown=dict(followed.unknown),
        matrix_elements=sum(matrices.values()),
        sharded_elements=sum(size for name, size in matrices.items() if name in weights),
    )


def _common(groups: list[Group], tp: int) -> list[Group]:
    """Take out of two groups what both do, to be done once by all ranks; slices are taken one after the other."""
    outer, inner = groups

    def both(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: value for key, value in one.items() if key in other and other[key] == value}

    def shared(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(item for item in one if item in other)

    merged = Group(
        tp, 1, both(outer.reduced, inner.reduced), both(outer.entered, inner.entered), {},
        both(outer.evened, inner.evened), {}, shared(outer.shared, inner.shared),
        shared(outer.partial_gradients, inner.partial_gradients), both(outer.forms, inner.forms),
        outer.inside_bytes if outer.forms and outer.forms == inner.forms else (0, 0),
    )  # fmt: skip
    merged = replace(merged, entered_bytes={name: outer.entered_bytes[name] for name in merged.entered})
    for index, group in enumerate(groups):
        entered = _without(group.entered, merged.entered)
        groups[index] = replace(
            group, reduced=_without(group.reduced, merged.reduced), entered=entered,
            entered_bytes={name: group.entered_bytes[name] for name in entered},
            evened=_without(group.evened, merged.evened),
            shared=tuple(item for item in group.shared if item not in merged.shared),
            partial_gradients=tuple(n for n in group.partial_gradients if n not in merged.partial_gradients),
            forms=_without(group.forms, merged.forms),
            inside_bytes=(0, 0) if any(merged.inside_bytes) else group.inside_bytes,
        )  # fmt: skip
    return [merged]


def _without(items: Mapping[Any, Any], taken: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in items.items() if key not in taken}


def _group(followed: Followed, flow: Flow, mine: frozenset[int], degree: int, repeat: int) -> Group:
    at = dict.fromkeys(mine, (degree, repeat))
    sliced = {where: layout_of(followed.axes, use.dims, at) for where, use in flow.slices}
    return Group(
        degree, repeat, flow.reduced, flow.entered, flow.entered_bytes, flow.evened,
        sliced, tuple(flow.shared), tuple(flow.partial), dict(flow.forms),
        (flow.forward_bytes - sum(flow.reduced.values()), flow.backward_bytes - sum(flow.entered_bytes.values())),
        tuple(flow.adding),
    )  # fmt: skip


def _touches(followed: Followed, dims: Dims, place: Mapping[int, Any]) -> bool:
    return any(axis in place for dim in dims for axis in followed.axes.leaves(dim))


def _sizes(followed: Followed, degrees: Mapping[int, int]) -> dict[Where, int]:
    axes, found = followed.axes, dict[Where, int]()
    for record in followed.records:
        for path, dim in record.sizes:
            if any(axis in degrees for axis in axes.leaves(dim)):
                found[record.step.name, path] = local_size(axes, dim, degrees)
    return found


def _sharded_axis(followed: Followed, candidate: Candidate) -> ShardedAxis:
    names = [n for n, dims in followed.weights.items() if _touches(followed, dims, dict.fromkeys(candidate.axes))]
    sizes = tuple(followed.axes.size((axis,)) for axis in candidate.axes)
    return ShardedAxis(sizes, candidate.degrees, tuple(names), round(candidate.volume))


def _reason(followed: Followed, dims: Dims, tp: int) -> str:
    axes = followed.axes
    found = list[str]()
    for dim in dims:
        for axis in axes.leaves(dim):
            pin, size = axes.pinned(axis), axes.size((axis,))
            found.append(pin or (f"{size} does not divide by {tp}" if size % tp else "another axis was taken"))
    return "; ".join(dict.fromkeys(found)) or "it has one element"
