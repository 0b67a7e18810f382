"""One trace cut between edge and cloud: what travels, what the other end makes itself, and what must never travel.

head ──sent──────► cloud ──returned──► tail       tensors, through codecs, and their gradients back
  └──rebuilt·····► cloud                          masks and positions: the cloud makes them, from lengths or nothing
  └──────────────────────kept────────► tail       never leave the edge
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from merak_like.partitioner.cuts import crossings
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.locality import held_by, residents
from merak_like.partitioner.plan import Crossing
from merak_like.partitioner.tracer import Trace
from merak_like.runtime.links import Spec
from merak_like.split.cut import Cut

MASK = "attention_mask"
"""The batch's entry that travels as lengths; the cloud has it, so what comes of it alone is made there again."""
LABELS = "labels"
"""The batch's entry that a cut without a tail gives to the cloud."""


@dataclass(frozen=True)
class Halves:
    """A trace and its cut."""

    trace: Trace
    starts: tuple[int, ...]
    sent: tuple[Spec, ...]
    returned: tuple[Spec, ...]
    kept: tuple[Spec, ...]
    rebuilt: tuple[Spec, ...]
    digest: str
    """Equal on both ends: the same ops, cut at the same places, with the same values across."""

    @property
    def tailed(self) -> bool:
        """Whether the loss is computed on the edge."""
        return len(self.starts) == 4

    def params(self, stage: int) -> tuple[str, ...]:
        """First names of the parameters and buffers of the head (0), the cloud's half (1) or the tail (2)."""
        return held_by(residents(self.trace.graph), self.starts[stage], self.starts[stage + 1])


def halve(trace: Trace, cut: Cut) -> Halves:
    """Cut a trace.

    Raises ValueError where the cut would put a tied weight on both sides, show the cloud an input of the batch, or send
    it numbers that are the batch's own and not a layer's.
    """
    graph = trace.graph
    starts = cut.starts(graph)
    found = crossings(graph, starts)
    public = _inputs(trace, {MASK} if len(starts) == 4 else {MASK, LABELS})
    known = sources(graph)
    _refuse_reading(trace, starts, public, cut)
    _refuse_ties(graph, starts, cut)
    up = [c for c in found if c.source == 0 and 1 in c.targets]
    rebuilt = [c for c in up if not c.requires_grad and known[c.value].makes_again(public)]
    sent = [c for c in up if c not in rebuilt]
    for c in sent:
        if known[c.value].bare & set(trace.inputs) - public:
            raise ValueError(
                f"the cut {cut} would send {c.value}, made of {', '.join(sorted(known[c.value].bare))} by no layer, "
                "to the cloud: cut elsewhere, or leave that entry out of the batch"
            )
    if not sent:
        raise ValueError(f"the cut {cut} sends nothing from the edge's head to the cloud")
    returned = [c for c in found if c.source == 1]
    kept = [c for c in found if c.source == 0 and 2 in c.targets]
    return Halves(
        trace, starts, *(tuple(map(spec_of, one)) for one in (sent, returned, kept, rebuilt)),
        digest=_digest(graph, starts, [*sent, *returned, *rebuilt]),
    )  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """What a value was computed from."""

    inputs: frozenset[str]
    bare: frozenset[str]
    """The inputs that no parameter came between: the value still is them, in another form."""
    pure: bool
    """Whether nothing trained and nothing random had a part in it."""

    def makes_again(self, public: Collection[str]) -> bool:
        """Whether whoever has these inputs can compute it."""
        return self.pure and self.inputs <= set(public)


def sources(graph: ProxyGraph) -> Mapping[str, Sources]:
    """Follow every value to the batch. One that mixes a layer's result with the batch counts as the layer's."""
    parameters = {p.name for p in graph.parameters if not p.buffer}
    found: dict[str, Sources] = {}
    for op in graph.ops:
        ins = [found[name] for name in op.inputs if name in found]
        if op.kind == "input":
            own = frozenset(value.name for value in op.outputs)
            made = Sources(own, own, True)
        else:
            trained = any(graph.canonical[name] in parameters for name in op.params)
            given = [each for each in ins if each.inputs]
            layered = trained or any(not each.bare for each in given)
            bare = frozenset[str]().union(*(each.bare for each in given))
            made = Sources(
                frozenset[str]().union(*(each.inputs for each in ins)),
                frozenset() if layered else bare,
                all(each.pure for each in ins) and not trained and not op.random,
            )
        found.update((value.name, made) for value in op.outputs)
        for name in op.mutates:
            if name in found:
                old = found[name]
                found[name] = Sources(old.inputs | made.inputs, old.bare & made.bare, old.pure and made.pure)
    return found


def _inputs(trace: Trace, entries: Collection[str]) -> set[str]:
    """The names of the batch's values under these entries."""
    return {name for name, path in trace.inputs.items() if path and path[0] in entries}


def _refuse_reading(trace: Trace, starts: tuple[int, ...], public: Collection[str], cut: Cut) -> None:
    inputs = set(trace.inputs) - set(public)
    read = {name for op in trace.graph.ops[starts[1] : starts[2]] for name in op.inputs if name in inputs}
    if read:
        raise ValueError(
            f"with the cut {cut} the cloud would need {', '.join(sorted(read))} of the batch: give the edge a tail "
            "that begins before it is read (FRONT:BACK)"
        )


def _refuse_ties(graph: ProxyGraph, starts: tuple[int, ...], cut: Cut) -> None:
    needs = residents(graph)
    trained = {p.name for p in graph.parameters if not p.buffer}
    cloud = set(held_by(needs, starts[1], starts[2])) & trained
    edge = {*held_by(needs, 0, starts[1]), *(held_by(needs, starts[2], starts[3]) if len(starts) == 4 else ())}
    if both := sorted(cloud & edge):
        raise ValueError(
            f"the cut {cut} puts {both[0]} on both sides: give the edge a tail (FRONT:BACK) so that a tied weight "
            "stays there, or untie it"
        )


def spec_of(crossing: Crossing) -> Spec:
    """What a transfer of this value carries."""
    return Spec(crossing.value, crossing.shape, getattr(torch, crossing.dtype), crossing.requires_grad)


def _digest(graph: ProxyGraph, starts: tuple[int, ...], across: list[Crossing]) -> str:
    facts: list[Any] = [
        [[op.kind, op.target, [[v.shape, v.dtype] for v in op.outputs]] for op in graph.ops], starts,
        [[c.value, c.shape, c.dtype, c.requires_grad, c.source] for c in across],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
