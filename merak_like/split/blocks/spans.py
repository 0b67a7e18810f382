"""A causal model's trace by blocks: where each begins, what crosses there, what its cache takes, its code.

ops     0 ... | block 0 | block 1 | ... | block n - 1 | ... end
              the client's head          the client's tail
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merak_like.partitioner.cuts import crossings, find_cuts
from merak_like.partitioner.locality import held_by, residents
from merak_like.partitioner.tracer import Trace, trace
from merak_like.runtime.links import Spec
from merak_like.runtime.stage_code import StageCode, build_stage
from merak_like.runtime.value_code import ValueCode, value_code
from merak_like.split.blocks.shapes import Shape, blank
from merak_like.split.halves import sources, spec_of

PROBE = Shape(2, 8, 64)
"""Samples, tokens and room differ, so that a value's dimensions say which is which."""
SECRET = "input_ids"
"""The entry of a pass that only the client has."""


class Room(NamedTuple):
    """What a block's cache takes: heads, numbers of a key and of a value, dtype."""

    heads: int
    key: int
    value: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Of one token of one sample."""
        return self.heads * (self.key + self.value) * self.dtype.itemsize


@dataclass(frozen=True)
class Blocks:
    """A model's blocks, as every end finds them."""

    count: int
    rooms: tuple[Room, ...]
    digest: str
    """Equal on all ends: the same ops in the same blocks."""
    largest: int
    """Bytes of one sample's token where most cross between two blocks."""


@dataclass(frozen=True)
class Span:
    """The ops of some blocks, or of an end of the model, for one shape."""

    code: StageCode
    rebuilt: ValueCode
    """What it needs from before and makes again from positions and mask."""
    inputs: Mapping[str, tuple[Any, ...]]


def recorded(cached: nn.Module, shape: Shape, device: torch.device | None = None) -> Trace:
    """A pass of this shape. Raises ValueError for a model that cannot be traced with a cache."""
    dtype = next(cached.parameters()).dtype
    try:
        return trace(cached, blank(shape, dtype), lambda outputs, _: outputs["logits"].sum(), device=device)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{_name(cached)} cannot be run with a cache of keys and values alone: {error}") from None


def blocks_of(found: Trace, cached: nn.Module) -> Blocks:
    """Look at a trace of ``PROBE``.

    Raises ValueError for a model whose blocks cannot be told apart, or pass on something else.
    """
    starts = borders(found, cached)
    across = [c for c in crossings(found.graph, starts) if c.source < len(starts) - 2]
    public, known = set(found.inputs) - {SECRET}, sources(found.graph)
    travelling = [c for c in across if not known[c.value].makes_again(public)]
    for c in travelling:
        if c.shape[:2] != (PROBE.batch, PROBE.tokens) or known[c.value].bare:
            raise ValueError(f"{_name(cached)} passes {c.value} {c.shape} between blocks, which is not numbers a token")
    facts = [
        [[op.kind, op.target, [[v.shape, v.dtype] for v in op.outputs]] for op in found.graph.ops], starts,
        [[c.shape, c.dtype, c.source, c.targets] for c in travelling],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    values = found.graph.values
    live = [
        sum(values[c.value].nbytes for c in travelling if c.source < i <= max(c.targets))
        for i in range(1, len(starts) - 1)
    ]
    rooms = tuple(_room(found, i) for i in range(len(starts) - 3))
    return Blocks(len(rooms), rooms, digest, max(live) // (PROBE.batch * PROBE.tokens))


def borders(found: Trace, cached: nn.Module) -> tuple[int, ...]:
    """0, the first op of each block, the op behind the last block, the end.

    A block is the largest module call with exactly one layer's cache in it.
    """
    slots = _slots(found)
    if [n for n, _ in slots] != list(range(len(getattr(cached, "slots", ())))) or not slots:
        raise ValueError(f"{_name(cached)} uses a cache in layers {[n for n, _ in slots]}, not once in each: it keeps "
                         "something else than keys and values, which is not supported")  # fmt: skip
    spans: list[tuple[int, int]] = []
    for _, at in slots:
        around = [(c.first, c.stop) for c in found.calls if c.first <= at < c.stop]
        alone = [s for s in around if sum(s[0] <= other < s[1] for _, other in slots) == 1]
        spans.append(max(alone, key=lambda s: s[1] - s[0]))
    starts = (0, *(first for first, _ in spans), spans[-1][1], len(found.graph.ops))
    legal = find_cuts(found.graph).legal
    if list(starts) != sorted(set(starts)) or not all(legal[at] for at in starts[1:-1]):
        raise ValueError(f"{_name(cached)} cannot be cut before each of its blocks")
    return starts


def _slots(found: Trace) -> list[tuple[int, int]]:
    """(layer, op) of every use of a cache, in order."""
    return [
        (int(op.target.removeprefix("slots.")), i)
        for i, op in enumerate(found.graph.ops)
        if op.target.startswith("slots.")
    ]


def _room(found: Trace, block: int) -> Room:
    keys, values = found.graph.ops[_slots(found)[block][1]].outputs
    return Room(keys.shape[1], keys.shape[3], values.shape[3], getattr(torch, keys.dtype))


def names_of(found: Trace, cached: nn.Module, first: int, stop: int) -> tuple[str, ...]:
    """First names of the parameters and buffers of parts ``first <= i < stop``.

    Part 0 is the head, part i + 1 is block i, and the last part is the tail.
    """
    its = ends(found, cached, first, stop)
    held = held_by(residents(found.graph), its.starts[its.mine], its.starts[its.mine + 1])
    code = value_code(found, cached, its.rebuilt, its.starts[its.mine])
    return tuple(dict.fromkeys([*held, *code.buffers]))


class Ends(NamedTuple):
    """What crosses the ends of some parts."""

    starts: tuple[int, ...]
    """Of all before them, of them, of all behind them; the end."""
    mine: int
    sent: tuple[Spec, ...]
    """What comes from before; the shapes are of filled-up tokens."""
    returned: tuple[Spec, ...]
    rebuilt: tuple[str, ...]


def ends(found: Trace, cached: nn.Module, first: int, stop: int) -> Ends:
    """The ends of parts ``first <= i < stop`` of a trace, counted as in ``names_of``."""
    starts = borders(found, cached)
    cut = sorted({0, starts[first], starts[stop], len(found.graph.ops)})
    mine = cut.index(starts[first])
    public, known = set(found.inputs) - {SECRET}, sources(found.graph)
    crossing = crossings(found.graph, cut)
    again = {c.value for c in crossing if known[c.value].makes_again(public)}
    came = [c for c in crossing if mine in c.targets]
    return Ends(
        tuple(cut), mine, tuple(spec_of(c) for c in came if c.value not in again),
        tuple(spec_of(c) for c in crossing if c.source == mine and c.value not in again),
        tuple(c.value for c in came if c.value in again),
    )  # fmt: skip


def span(found: Trace, cached: nn.Module, first: int, stop: int) -> Span:
    """Parts ``first <= i < stop`` of a trace, counted as in ``names_of``, as code."""
    its = ends(found, cached, first, stop)
    code = build_stage(found, cached, its.starts, its.mine)
    return Span(code, value_code(found, cached, its.rebuilt, its.starts[its.mine]), found.inputs)


def run(part: Span, batch: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything a span makes for others, by name, and the model's outputs."""
    values = {**came}
    if part.rebuilt.names:
        device = next(iter([*came.values(), *batch.values()])).device
        values |= part.rebuilt(batch, device)
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for piece in part.code.pieces:
            given = [batch[part.inputs[name][0]] for name in piece.inputs]
            found = piece.module(*given, *(values[name] for name in piece.received))
            made |= dict(zip(piece.made, found, strict=True))
    return made


def _name(cached: nn.Module) -> str:
    return type(getattr(cached, "model", cached)).__name__
