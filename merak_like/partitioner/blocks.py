"""The model as people see it: embeddings, repeated blocks, heads, found by structure and never by name.

Two module calls are alike when their ops are: same kinds, same targets seen from the module, same output shapes and
dtypes. Sibling calls of one type, two of them alike, are a family of *blocks* (an encoder-decoder has two families; the
first block of a family may differ, as T5's does by its position bias). The outermost families count. What is not in a
block stands for itself: each module beside the blocks, and each run of ops between modules.

A piece dearer than ``LARGEST`` of a stage's share is divided into its children (attention, feed-forward, ...), again
and again. Between two dear children the border is where the fewest bytes are live, so that a residual addition and a
norm fall on the side where the cut is cheap.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil

import numpy as np

from merak_like.partitioner.cost import Cost, CostTable, Floats
from merak_like.partitioner.cuts import Cuts, Ints, find_cuts
from merak_like.partitioner.graph import ProxyGraph

LARGEST = 0.25
"""A piece above this share of the mean stage is divided, so that borders of pieces alone balance to an eighth or so."""
DEAR = 0.1
"""A child below this share of its parent's cost joins a neighbour when the parent is divided."""
MODULE_KINDS = frozenset({"module", "attribute"})
"""Kinds of ops whose target is a path in the model."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Ops ``first <= i < stop`` under one name; ``block`` is the repeated module around it, or its own name."""

    name: str
    type: str
    block: str
    first: int
    stop: int


@dataclass
class _Node:
    """A call in the tree of calls; a run of ops between calls is a node too, without children."""

    path: str
    type: str
    first: int
    stop: int
    children: list[_Node] = field(default_factory=list["_Node"])
    is_call: bool = True
    is_block: bool = False
    has_blocks: bool = False


def units(graph: ProxyGraph, costs: Sequence[Cost], stages: int, cuts: Cuts | None = None) -> tuple[Piece, ...]:
    """Cover all ops, each once and in order, with pieces that are small enough to balance ``stages`` stages.

    Borders are legal cuts. Names are unique: a module called again gets ``#2``.
    """
    if not graph.ops:
        return ()
    root = _tree(graph)
    _mark_blocks(graph, root)
    divider = _Divider(graph, CostTable.of(costs).seconds, cuts or find_cuts(graph), stages)
    return tuple(_named(divider.legal(list(divider.outermost(root)))))


def _tree(graph: ProxyGraph) -> _Node:
    root = _Node("", graph.model, 0, len(graph.ops))
    stack = [root]
    for call in sorted(graph.calls, key=lambda c: (c.first, -c.stop, c.depth)):
        if call.first < call.stop:
            while call.stop > stack[-1].stop or call.first >= stack[-1].stop:
                stack.pop()
            node = _Node(call.path, call.type, call.first, call.stop)
            stack[-1].children.append(node)
            stack.append(node)
    return root


def _mark_blocks(graph: ProxyGraph, root: _Node) -> None:
    shapes = [tuple((v.shape, v.dtype) for v in op.outputs) for op in graph.ops]

    def signature(node: _Node) -> int:
        skip = len(node.path) + 1 if node.path else 0
        parts = tuple(
            (op.kind, op.target[skip:] if op.kind in MODULE_KINDS else op.target, shape)
            for op, shape in zip(graph.ops[node.first : node.stop], shapes[node.first : node.stop], strict=True)
        )
        return hash(parts)

    def mark(node: _Node) -> None:
        many = Counter(child.type for child in node.children if child.stop - child.first > 1)
        for kind in (kind for kind, count in many.items() if count > 1):
            family = [c for c in node.children if c.type == kind and c.stop - c.first > 1]
            if max(Counter(signature(c) for c in family).values()) > 1:
                for child in family:
                    child.is_block = True
        for child in node.children:
            if not child.is_block:
                mark(child)
        node.has_blocks = any(child.is_block or child.has_blocks for child in node.children)

    mark(root)


class _Divider:
    """Turns the tree of calls into pieces; ``seconds`` are running sums over ops."""

    def __init__(self, graph: ProxyGraph, seconds: Floats, cuts: Cuts, stages: int) -> None:
        self._graph, self._seconds, self._cuts = graph, seconds, cuts
        self._most = LARGEST * float(seconds[-1]) / stages
        self._live = np.where(cuts.legal, cuts.live_bytes, np.iinfo(np.int64).max)

    def _cost(self, first: int, stop: int) -> float:
        return float(self._seconds[stop] - self._seconds[first])

    def outermost(self, node: _Node) -> Iterator[Piece]:
        """The pieces of a call that is no block."""
        parts = self._parts(node)
        if not (node.path == "" or node.has_blocks or len(parts) == 1 == len(node.children)):
            yield from self.divide(node, node.first, node.stop, "")
            return
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            if part.is_block:
                # What runs between two blocks, and is no module, belongs to the first.
                joined = index + 2 < len(parts) and not parts[index + 1].is_call and parts[index + 2].is_block
                yield from self.divide(part, part.first, part.stop if not joined else parts[index + 2].first, part.path)
            elif part.is_call:
                yield from self.outermost(part)
            elif last or index == 0 or not (parts[index - 1].is_block and parts[index + 1].is_block):
                yield from self.divide(part, part.first, part.stop, "")

    def _parts(self, node: _Node) -> list[_Node]:
        """The children of a call with the runs of ops between them."""
        parts, place = list[_Node](), node.first
        for child in [*node.children, None]:
            stop = child.first if child is not None else node.stop
            if place < stop:
                parts.append(self._run(place, stop))
            if child is not None:
                parts.append(child)
                place = child.stop
        return parts

    def _run(self, first: int, stop: int) -> _Node:
        """A run of ops between calls, named after its dearest op."""
        ops = self._graph.ops[first:stop]
        if all(op.kind in ("input", "attribute", "guard") for op in ops):
            return _Node("inputs", "inputs", first, stop, is_call=False)
        dearest = ops[int(np.argmax(np.diff(self._seconds[first : stop + 1])))]
        return _Node(dearest.name, dearest.target.rpartition(".")[2], first, stop, is_call=False)

    def divide(self, node: _Node, first: int, stop: int, block: str) -> Iterator[Piece]:
        """The pieces of ops ``first .. stop - 1``, which are a node and perhaps some ops around it."""
        if self._cost(first, stop) <= self._most:
            named = node if node.path else self._run(first, stop)
            yield Piece(named.path, named.type, block or named.path, first, stop)
            return
        if not node.children:
            yield from self._slices(node, first, stop, block)
            return
        parts = self._parts(node)
        total = self._cost(node.first, node.stop)
        dear = [part for part in parts if self._cost(part.first, part.stop) >= DEAR * total]
        if not dear:
            yield from self._slices(node, first, stop, block)
            return
        borders = [first, *(self._border(a, b) for a, b in pairwise(dear)), stop]
        for part, (begin, end) in zip(dear, pairwise(borders), strict=True):
            yield from self.divide(part, begin, end, block)

    def _border(self, before: _Node, after: _Node) -> int:
        """Where the fewest bytes are live between two nodes; the last such place, behind all that ends the first."""
        live = self._live[before.stop : after.first + 1]
        return after.first - int(np.argmin(live[::-1]))

    def _slices(self, node: _Node, first: int, stop: int, block: str) -> Iterator[Piece]:
        """A run without modules in slices of equal cost, borders moved to where the fewest bytes are live."""
        cost = self._cost(first, stop)
        count = min(ceil(cost / self._most), stop - first)
        halves = self._seconds[first] + cost * np.arange(1, 2 * count) / (2 * count)
        seconds = self._seconds[first:stop].tolist()
        places = [first + bisect_left(seconds, half) for half in halves.tolist()]
        windows = [(low, high) for low, high in zip(places[0::2], places[2::2], strict=False) if low < high]
        borders = sorted({first, stop, *(low + int(np.argmin(self._live[low:high])) for low, high in windows)})
        for begin, end in pairwise(borders):
            part = node if len(borders) == 2 and node.path else self._run(begin, end)
            inside = block or (node.path if node.is_call and node.path else part.path)
            yield Piece(part.path, part.type, inside, begin, end)

    def legal(self, pieces: list[Piece]) -> list[Piece]:
        """Join pieces whose border may not be cut to the piece before."""
        joined = list[Piece]()
        for piece in pieces:
            if joined and not self._cuts.legal[piece.first]:
                joined[-1] = replace(joined[-1], stop=piece.stop)
            else:
                joined.append(piece)
        return joined


def _named(pieces: list[Piece]) -> Iterator[Piece]:
    seen: Counter[str] = Counter()
    for piece in pieces:
        seen[piece.name] += 1
        count = seen[piece.name]
        yield piece if count == 1 else replace(piece, name=f"{piece.name}#{count}")


def begins(graph: ProxyGraph, pieces: Sequence[Piece]) -> tuple[int, ...]:
    """The first ops of the blocks that have siblings of their type."""
    inside = _inside(graph, pieces)
    return tuple(
        piece.first for i, piece in enumerate(pieces) if inside[i] and (i == 0 or pieces[i - 1].block != piece.block)
    )


def repeated(graph: ProxyGraph, pieces: Sequence[Piece]) -> Ints:
    """Where blocks begin that have siblings of their type, and where the last of them ends."""
    borders = [
        after.first
        for (before, within), (after, starts) in pairwise(zip(pieces, _inside(graph, pieces), strict=True))
        if (starts and before.block != after.block) or (within and not starts)
    ]
    return np.array(borders, np.int64)


def _inside(graph: ProxyGraph, pieces: Sequence[Piece]) -> list[bool]:
    larger = (call for call in graph.calls if call.stop > call.first + 1)
    kinds = {call.path: (call.path.rpartition(".")[0], call.type) for call in larger}
    alike = Counter(kinds[name] for name in dict.fromkeys(piece.block for piece in pieces) if name in kinds)
    return [piece.block in kinds and alike[kinds[piece.block]] > 1 for piece in pieces]
