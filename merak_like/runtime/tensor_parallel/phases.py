"""A stage cut at its collectives, and into some samples at a time, so that one's sums run under another's compute.

The segments are found from the graph: no architecture is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from merak_like.partitioner.tensor_parallel.layout import Axis, Layout
from merak_like.partitioner.tensor_parallel.samples import sample_dim
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.fine import word_of
from merak_like.runtime.stage_code import Piece, StageBuilder, crossed
from merak_like.runtime.tensor_parallel.collectives import Collective, Reduce, Target
from merak_like.runtime.tensor_parallel.draws import Draw, Rows, drawing
from merak_like.runtime.tensor_parallel.scatter import Scatter
from merak_like.runtime.tensor_parallel.segments import Converted, PhasedCode, Segment

SUMS = Reduce, Scatter
"""Collectives that begin where their summand is made. All others begin where what they make is read, or just before."""


def phased(
    traces: Sequence[Trace], shares: Sequence[tuple[int, int]], model: nn.Module, starts: Sequence[int], index: int,
    again: Collection[tuple[int, int]], apart: Callable[[int], bool],
) -> PhasedCode:  # fmt: skip
    """Cut a stage. ``traces`` are those of all samples and then of each share, sharded; ``apart`` tells of an op
    whether it treats samples one by one.

    Raises ValueError, with the reason, for a stage that cannot be cut so.
    """
    return _Phases(traces, shares, model, starts, index, again, apart).code()


class _Phases:
    def __init__(
        self, traces: Sequence[Trace], shares: Sequence[tuple[int, int]], model: nn.Module, starts: Sequence[int],
        index: int, again: Collection[tuple[int, int]], apart: Callable[[int], bool],
    ) -> None:  # fmt: skip
        self.traces, self.shares, self.starts, self.index, self.again = traces, shares, starts, index, again
        self.first, self.stop = starts[index], starts[index + 1]
        self.codes = [[n for n in trace.code.nodes if self.mine(n)] for trace in traces]
        if any([n.name for n in code] != [n.name for n in self.codes[0]] for code in self.codes):
            raise ValueError("fewer samples are converted between ranks in other places")
        self.nodes = self.codes[0]
        random = {n.meta["index"] for n in self.nodes if self.op(n).random and not self.drawable(n)}
        shares_wanted = len(shares) > 1
        self.apart = [shares_wanted and apart(i) and i not in random for i in range(self.first, self.stop)]
        turns = [i for i in range(self.first + 1, self.stop) if self.way(i) != self.way(i - 1)]
        finer = sorted({*starts, *turns})
        whole, *some = traces
        self.builders = [StageBuilder(t, model, finer, asked=True) for t in (whole, *map(_drawing_openly, some))]
        self.made_here = {node.name for node in self.nodes}

    def mine(self, node: fx.Node) -> bool:
        return node.op != "placeholder" and self.first <= node.meta["index"] < self.stop

    def op(self, node: fx.Node) -> Any:
        return self.traces[0].graph.ops[node.meta["index"]]

    def way(self, op: int) -> tuple[bool, bool]:
        return self.apart[op - self.first], any(a <= op < b for a, b in self.again)

    def drawable(self, node: fx.Node) -> bool:
        return not self.draws(node) or self.drawn(node) is not None

    def draws(self, node: fx.Node) -> bool:
        """Whether this node of a random op may be the one that draws."""
        return isinstance(node.target, Draw) or (node.op != "get_attr" and not isinstance(node.target, Target))

    def drawn(self, node: fx.Node) -> Draw | None:
        """What draws, as in one process, for some samples of this step."""
        if isinstance(node.target, Draw):
            return node.target
        shape = self.traces[0].graph.values[node.name].shape if node.name in self.traces[0].graph.values else None
        if shape is None or not callable(node.target):
            return None
        layout: Layout = tuple((Axis(size),) for size in shape)
        return drawing(word_of(node), node.target, layout, 0)

    def code(self) -> PhasedCode:
        groups = self.groups()
        home = {node.name: at for at, group in enumerate(groups) for node in group.nodes}
        home |= {entry.name: at for at, group in enumerate(groups) for entry in group.entries}
        home |= {one.name: at + 1 for at, group in enumerate(groups) for one in group.sums}
        for node in self.nodes:
            for name in self.op(node).mutates if node.name == self.op(node).name else ():
                self.change(node, name, home, groups)
        received, sent, results = crossed(self.traces[0], self.starts, self.index)
        made = {name: self.traces[0].graph.outputs[name] for name in results}
        outputs = {*made.values(), *sent}
        segments = [self.segment(group, outputs) for group in groups]
        names = {name for s in segments for p in s.pieces for name in (*p.received, *p.made)}
        names |= {entry.source for s in segments for entry in s.entries} | {
            one.name for s in segments for one in s.sums
        }
        inputs = tuple(name for name in self.traces[0].inputs if name in names | outputs)
        dims = {name: self.dim(name) for name in {*names, *received, *outputs}}
        return PhasedCode(
            self.index, tuple(segments), tuple(self.shares), dims, inputs, received, sent, made
        )  # fmt: skip

    def change(self, node: fx.Node, name: str, home: Mapping[str, int], groups: Sequence[_Group]) -> None:
        """A segment may change in place what it was given if it is the last that reads it."""
        at, value = home.get(node.name), self.builders[0].named.get(name)
        if at is None or value is None or (home.get(name) == at and name in {n.name for n in groups[at].nodes}):
            return
        later = [user.name for user in value.users if home.get(user.name, at) > at]
        if later or groups[at].way[1]:
            raise ValueError(
                f"{node.name} changes {name} in place, which {(later or ['a recomputed segment'])[0]} reads"
            )
        groups[at].changed.add(name)

    def groups(self) -> list[_Group]:
        found = [_Group(self.way(self.first))]
        for node in self.nodes:
            last, way = found[-1], self.way(node.meta["index"])
            if way != last.way and last.nodes:
                last = _Group(way)
                found.append(last)
            last.way = way
            target: Any = node.target
            source: Any = node.args[0] if node.args else None
            if isinstance(target, SUMS):
                last.sums.append(Converted(node.name, source.name, (target,)))
                found.append(_Group(way))
            elif isinstance(target, Collective) and _is_value(source):
                if last.nodes:
                    found.append(_Group(way))
                found[-1].entries.append(Converted(node.name, source.name, (target,)))
            else:
                last.nodes.append(node)
                continue
            found[-1].waits_for(target)
        return [group for group in found if group.nodes]

    def segment(self, group: _Group, outputs: Collection[str]) -> Segment:
        at = {node.name for node in group.nodes}
        reads = dict.fromkeys(a.name for n in group.nodes for a in n.all_input_nodes if a.op != "get_attr")
        reads = tuple(name for name in reads if name not in at)
        made = [n.name for n in group.nodes if n.op != "get_attr" and (
            n.name in outputs or any(u.name not in at and u.name in self.made_here for u in n.users))]  # fmt: skip
        shared, repeated = not group.way[0], group.way[1]
        which = [0] if shared else list(range(1, len(self.traces)))
        pieces = tuple(self.piece(group, reads, made, trace, repeated) for trace in which)
        entries, sums = (
            tuple(replace(one, nodes=tuple(self.builders[i].named[one.name].target for i in which)) for one in several)
            for several in (group.entries, group.sums)
        )
        return Segment(pieces, entries, sums, frozenset(group.changed), frozenset(group.borders))

    def piece(self, group: _Group, reads: tuple[str, ...], made: Sequence[str], which: int, again: bool) -> Piece:
        builder = self.builders[which]
        at = {node.name for node in group.nodes}
        nodes = [n for n in self.codes[which] if n.name in at]
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for name in reads:
            env[builder.named[name]] = graph.placeholder(name)
        for node in nodes:
            for argument in node.all_input_nodes:
                if argument.op == "get_attr" and argument.name not in at and argument not in env:
                    env[argument] = graph.create_node("get_attr", argument.target)
        changed = [(n, n.target, n.args, n.kwargs) for n in nodes if which and self.draw_share(n, which)]
        builder.body(graph, nodes, env)
        for node, target, args, kwargs in changed:
            node.target, node.args, node.kwargs = target, args, kwargs
        graph.output(tuple(env[builder.named[name]] for name in made))
        random = any(self.op(n).random for n in nodes)
        name = f"ops {self.op(nodes[0]).name} to {self.op(nodes[-1]).name}"
        ops = {n.meta["index"] for n in nodes}
        return builder.finished(graph, name, (), reads, tuple(made), again, random, ops)

    def draw_share(self, node: fx.Node, which: int) -> bool:
        """Let a step of a share draw its rows of what all samples would draw."""
        whole = self.builders[0].named[node.name] if self.op(node).random else None
        draw = self.drawn(whole) if whole is not None and self.draws(whole) else None
        dim = None if draw is None else self.dim(node.name)
        if draw is None or whole is None or dim is None:
            return False
        start, stop = self.shares[which - 1]
        rows = self.traces[0].graph.values[node.name].shape[dim] // self.shares[-1][1]
        drawn: Any = draw.for_rows(Rows(dim, start * rows, stop * rows), whole.args, whole.kwargs)
        node.target = drawn
        return True

    def dim(self, name: str) -> int | None:
        """The dimension of a value along which its samples lie."""
        node: Any = self.builders[0].named[name]
        whole, some = self.traces[0].graph.values, self.traces[-1].graph.values
        while node.name not in whole:
            readers = [user for user in node.users if isinstance(user.target, SUMS)]
            if not readers and not isinstance(node.target, Target):
                raise ValueError(f"{name} crosses a collective and is no tensor")
            node = readers[0] if readers else node.args[0]
        if len(self.traces) == 1:
            return None
        start, stop = self.shares[-1]
        return sample_dim(whole[node.name].shape, some[node.name].shape, self.shares[-1][1], stop - start)


def _drawing_openly(trace: Trace) -> Trace:
    """Without the module calls that draw random numbers: of a share they draw some rows."""
    ops = trace.graph.ops
    return replace(trace, calls=tuple(c for c in trace.calls if not any(op.random for op in ops[c.first : c.stop])))


class _Group:
    def __init__(self, way: tuple[bool, bool]) -> None:
        self.way, self.borders = way, set[str]()
        self.nodes: list[fx.Node] = []
        self.entries: list[Converted] = []
        self.sums: list[Converted] = []
        self.changed: set[str] = set()

    def waits_for(self, target: Collective) -> None:
        """A collective is between this and the group before."""
        self.borders.update(("forward",) * target.sends + ("backward",) * target.sends_back)


def _is_value(item: Any) -> bool:
    """Not a weight, nor what another entry made."""
    made = isinstance(item, fx.Node) and item.op != "get_attr"
    return made and (isinstance(item.target, SUMS) or not isinstance(item.target, Collective))
