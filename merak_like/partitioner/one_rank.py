"""A model as one rank of a tensor-parallel group runs it: the traced graph with that rank's shapes, flops and bytes.

::

    fine trace + derived layouts ──► shares of values and weights ──► kernels (software) ──► summed up per traced op

The ops, their names and order are those of the trace, so cuts and stage starts mean the same for every degree. With
the sequence-parallel form (Korthikanti et al. 2022, sec. 4.2.2) what is whole on every rank and has a gradient is
divided along the sequence; each all-reduce becomes a reduce-scatter and an all-gather of the same volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from merak_like.partitioner.cost import puts_off
from merak_like.partitioner.graph import Collective, Op, Parameter, ProxyGraph, Value
from merak_like.partitioner.software import Sizes, Software, run_with

if TYPE_CHECKING:
    from torch import nn

    from merak_like.partitioner.tensor_parallel.derive import Model
    from merak_like.partitioner.tensor_parallel.derived import Derived
    from merak_like.partitioner.tensor_parallel.layout import Layout
    from merak_like.partitioner.tracer import LossFn

SURE = 0.05
"""Share of the weights that a degree may divide less than the smallest one does, before it is refused."""


@dataclass
class Sources:
    """A traced model and its fine trace: what the graphs of its ranks are made of, each once."""

    graph: ProxyGraph
    fine: ProxyGraph
    steps: Sequence[Any]
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _derived: dict[int, Derived] = field(default_factory=lambda: dict[int, "Derived"]())
    _made: dict[Any, ProxyGraph] = field(default_factory=dict[Any, ProxyGraph])

    @classmethod
    def of(cls, model: nn.Module, example: Any, loss_fn: LossFn | None = None) -> Sources:
        """Trace a model both ways. Raises ValueError where it cannot be looked into so finely."""
        from merak_like.partitioner.tracer import trace
        from merak_like.partitioner.tracer.fine import fine_trace, steps

        fine = fine_trace(model, example, loss_fn)
        return cls(trace(model, example, loss_fn).graph, fine.graph, steps(fine), fine.constants)

    def base(self, tp: int) -> ProxyGraph:
        """The whole model's ops, which a plan for so many ranks is about: the engine runs the fine ones on several."""
        return self.graph if tp == 1 else self.fine

    def places(self, tp: int) -> tuple[tuple[int, int], ...]:
        """For each op of that graph its ops in the fine trace."""
        return aligned(self.graph, self.fine) if tp == 1 else tuple((i, i + 1) for i in range(len(self.fine.ops)))

    def derived(self, tp: int) -> Derived:
        """How the weights lie on so many ranks."""
        if tp not in self._derived:
            from merak_like.partitioner.tensor_parallel.derive import derive_model

            self._derived[tp] = derive_model(self._model, tp)
        return self._derived[tp]

    @cached_property
    def _model(self) -> Model:
        from merak_like.partitioner.tensor_parallel.derive import Model

        return Model.of(self.fine, self.steps, self.constants)

    def divides(self, tp: int) -> bool:
        """Whether that many ranks divide the weights as well as the degree's least factor does."""
        if tp == 1:
            return True
        share, few = self.derived(tp).share, next(d for d in range(2, tp + 1) if tp % d == 0)
        return share > 0 and share > self.derived(few).share - SURE

    def check(self, tp: int) -> None:
        """Raise ValueError for a degree that does not divide the model, with the nearest one that does."""
        if not self.divides(tp):
            share, lower = self.derived(tp).share, next(few for few in range(tp - 1, 0, -1) if self.divides(few))
            raise ValueError(
                f"tp = {tp}: {tp} ranks divide {share:.0%} of the weights of {self.graph.model}'s blocks, because its "
                f"heads or widths are no multiples of it; use tp = {lower}"
            )

    def rank(self, tp: int, software: Software, *, sequence_parallel: bool = False) -> ProxyGraph:
        """The graph of one rank of ``tp``; ValueError for a degree that does not divide the model."""
        key = tp, software, sequence_parallel
        if key not in self._made:
            self.check(tp)
            if tp == 1 and software.kernels == "torch":
                self._made[key] = self.graph
            else:
                self._made[key] = one_rank(self, tp, software, sequence_parallel=sequence_parallel and tp > 1)
        return self._made[key]


def one_rank(sources: Sources, tp: int, software: Software, *, sequence_parallel: bool = False) -> ProxyGraph:
    """See the module."""
    layouts = _layouts(sources.derived(tp)) if tp > 1 else {}
    sizes = Sizes(sources.fine, _shares(sources.fine, layouts, tp if sequence_parallel else 1))
    fine = run_with(sizes, software)
    talk = sums_of(sources.fine, sources.derived(tp), sequence_parallel, fine.ops) if tp > 1 else {}
    graph, ops, names = sources.base(tp), list[Op](), dict[str, str]()
    for op, (first, stop) in zip(graph.ops, sources.places(tp), strict=True):
        inside = fine.ops[first:stop]
        outputs = _outputs(op, inside)
        names.update({sizes.root[f.name]: v.name for v, f in zip(op.outputs, outputs, strict=True) if f is not None})
        ops.append(
            replace(
                op,
                outputs=tuple(_local(v, f, layouts, sizes) for v, f in zip(op.outputs, outputs, strict=True)),
                flops=sum(o.flops for o in inside),
                moved_bytes=sum(o.moved_bytes for o in inside),
                streamed_bytes=sum(o.streamed_bytes for o in inside),
                saved_bytes=sum(o.saved_bytes for o in inside),
                kernels=sum(o.kernels for o in inside),
                replayed=any(o.replayed for o in inside),
                keeps=tuple(names[name] for o in inside for name in o.keeps if name in names),
                collectives=tuple(c for o in inside for c in talk.get(o.name, ())),
            )
        )
    parameters = tuple(_part(p, layouts) for p in graph.parameters)
    return replace(graph, ops=tuple(ops), parameters=parameters)


def aligned(graph: ProxyGraph, fine: ProxyGraph) -> tuple[tuple[int, int], ...]:
    """For each op the range of fine ops that it is. Both traces saw one forward; a leaf of one is a call in the other.

    Raises ValueError where they did not.
    """
    calls: dict[tuple[str, int], int] = {}
    for call in fine.calls:
        calls[call.path, call.first] = call.stop
    places: list[tuple[int, int]] = []
    at = 0
    for op in graph.ops:
        stop = calls.get((op.target, at)) if op.kind == "module" else None
        if stop is None:
            same = at < len(fine.ops) and fine.ops[at].kind == op.kind and fine.ops[at].target == op.target
            if not same:
                raise ValueError(f"the fine trace of {graph.model} has no op {op.name} at {at}: trace the model again")
            stop = at + 1
        places.append((at, stop))
        at = stop
    if at != len(fine.ops):
        raise ValueError(f"the fine trace of {graph.model} goes on after {graph.ops[-1].name}: trace the model again")
    return tuple(places)


def _layouts(derived: Derived) -> dict[str, Layout]:
    return {name: layout for block in derived.blocks for name, layout in {**block.values, **block.weights}.items()}


def _shape(layout: Layout) -> tuple[int, ...]:
    from merak_like.partitioner.tensor_parallel.layout import local_size  # its package needs torch; a plan's reader not

    return tuple(map(local_size, layout))


def _shares(fine: ProxyGraph, layouts: Mapping[str, Layout], sequence: int) -> dict[str, float]:
    shares: dict[str, float] = {}
    held = {p.name: p for p in fine.parameters}
    for name, layout in layouts.items():
        whole = fine.values[name].numel if name in fine.values else held[name].numel
        part = 1
        for size in _shape(layout):
            part *= size
        shares[name] = part / whole if whole else 1.0
    if sequence > 1:
        for name, value in fine.values.items():
            if name not in shares and value.requires_grad and value.numel > 1:
                shares[name] = 1 / sequence
    return shares


def sums_of(
    fine: ProxyGraph, derived: Derived, parted: bool, local: Sequence[Op] = ()
) -> dict[str, tuple[Collective, ...]]:
    """The sums over ranks after (or, backward, before) each fine op, by the name of the op.

    ``parted``: as a reduce-scatter and an all-gather, of the sequence-parallel form. ``local``: the fine ops as they
    run on one rank, where it matters what is computed beside a sum.
    """
    found: dict[str, list[Collective]] = {}
    for block in derived.blocks:
        for group in block.groups:
            if group.degree == 1:
                continue
            for name, nbytes in group.reduced.items():
                found.setdefault(_maker(fine, name), []).append(Collective(group.degree, nbytes, parted=parted))
            for name, nbytes in group.entered_bytes.items():
                reads = [local[use] for use in fine.uses.get(name, ())[1:]] if local else []
                beside = sum(op.flops for op in reads if puts_off(op, fine))
                entered = Collective(group.degree, nbytes, True, parted, beside)
                found.setdefault(_maker(fine, name), []).append(entered)
            forms = [step for step, form in group.forms.items() if form in ("cross_entropy", "layer_norm", "rms_norm")]
            for backward, nbytes in enumerate(group.inside_bytes):
                if nbytes and forms:
                    found.setdefault(forms[0], []).append(Collective(group.degree, nbytes, bool(backward)))
    return {name: tuple(each) for name, each in found.items()}


def _maker(fine: ProxyGraph, value: str) -> str:
    return fine.ops[fine.producer[value]].name if value in fine.producer else value


def _outputs(op: Op, inside: Sequence[Op]) -> list[Value | None]:
    """The fine values that an op's outputs are: of the last fine ops that give such shapes."""
    made = [value for fine in inside for value in fine.outputs]
    found: list[Value | None] = []
    for value in reversed(op.outputs):
        place = next((i for i in reversed(range(len(made))) if made[i].shape == value.shape), None)
        found.append(None if place is None else made.pop(place))
    return found[::-1]


def _local(value: Value, fine: Value | None, layouts: Mapping[str, Layout], sizes: Sizes) -> Value:
    if fine is None or sizes.share(fine.name) == 1.0:
        return value
    if fine.name in layouts:
        return replace(value, shape=_shape(layouts[fine.name]))
    return replace(value, shape=(max(round(value.numel * sizes.share(fine.name)), 1),))


def _part(parameter: Parameter, layouts: Mapping[str, Layout]) -> Parameter:
    layout = layouts.get(parameter.name)
    return parameter if layout is None else replace(parameter, shape=_shape(layout))
