"""How the software of a device runs a graph: which calls are one kernel, what they stream through memory and keep.

``torch`` runs each call by itself, which is what the engine does. ``fused`` is what large-scale trainers run, and what
published measurements were made with: neighbouring element-wise calls, norms and dropouts are one kernel that reads
its inputs and writes its outputs once, and keeps for the backward what cannot be computed again from what is kept
anyway (as the hand-written kernels of Megatron-LM do: of a GELU its input, of a dropout one byte for each element).

Fused attention is ``flash`` (Dao et al. 2022: nothing as large as the scores is written) or ``math``: scores, their
softmax and its dropout are tensors in memory, 5 bytes for each score with dropout (Korthikanti et al. 2022, eq. 1).
``selective`` recompute (the same, sec. 5) keeps only queries, keys and values of such an attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from merak_like.partitioner.graph import ITEMSIZE, Op, ProxyGraph
from merak_like.partitioner.schedules.action import known

KERNELS = ("torch", "fused")
ATTENTION = ("flash", "math")
MATMULS = frozenset({
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "addbmm", "conv1d", "conv2d", "conv3d", "einsum",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "grouped_mm", "scaled_dot_product_attention",
})  # fmt: skip
FUSED = frozenset({
    "add", "radd", "sub", "rsub", "mul", "rmul", "div", "truediv", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt",
    "tanh", "erf", "sigmoid", "relu", "gelu", "silu", "softplus", "leaky_relu", "elu", "hardswish", "mish", "clamp",
    "dropout", "layer_norm", "rms_norm", "group_norm", "softmax", "mean", "sum", "var", "square", "where", "cat",
    "masked_fill", "to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "getitem", "stack",
    "reshape", "expand", "repeat", "sin", "cos", "reciprocal", "max", "min", "iadd", "imul", "isub",
})  # fmt: skip
"""Calls that become part of one kernel."""
ATTEND = "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class Software:
    """What runs on the devices."""

    kernels: str = "torch"
    attention: str = "flash"
    selective: bool = False

    def __post_init__(self) -> None:
        known(self.kernels, "kernels", KERNELS)
        known(self.attention, "attention", ATTENTION)
        if self.selective and self.kernels != "fused":
            raise ValueError("recompute = 'selective' is a way of fused kernels: use 'auto', 'full' or 'none' here")

    def __str__(self) -> str:
        """For plans and people."""
        if self.kernels == "torch":
            return "torch"
        return f"fused, {self.attention} attention{', computed again' * self.selective}"


TORCH = Software()
"""What the engine runs."""


class Sizes:
    """Bytes of the values of a graph on one rank, views taken for what they are views of."""

    def __init__(self, graph: ProxyGraph, local: Mapping[str, float]) -> None:
        self.graph, self.local = graph, local
        """``local``: the share of a value, parameter or buffer that a rank has, where it is not all of it."""
        self.root: dict[str, str] = {}
        for op in graph.ops:
            viewed = op.inputs and not op.moved_bytes and op.kind in ("method", "function")
            for value in op.outputs:
                self.root[value.name] = self.root[op.inputs[0]] if viewed else value.name

    def share(self, name: str) -> float:
        return self.local.get(name, 1.0)

    def nbytes(self, name: str) -> int:
        return round(self.graph.values[name].nbytes * self.share(name))

    def held(self, name: str) -> int:
        """Bytes of a parameter or buffer."""
        parameter = self.graph.parameter(name)
        return round(parameter.nbytes * self.share(parameter.name))

    def of(self, op: Op) -> float:
        """The smallest share of anything that a call touches: its part of the whole call's work."""
        names = (*op.inputs, *(v.name for v in op.outputs), *(self.graph.canonical[n] for n in op.params))
        return min((self.share(name) for name in names), default=1.0)

    def touched(self, op: Op) -> float:
        """The share of what a call reads and writes."""
        values = [self.graph.values[name] for name in op.inputs] + list(op.outputs)
        held = [self.graph.parameter(name) for name in op.params]
        whole = sum(v.nbytes for v in (*values, *held))
        part = sum(v.nbytes * self.share(v.name) for v in (*values, *held))
        return part / whole if whole else 1.0


def word(op: Op) -> str:
    """What a call does, in one word."""
    return op.target.rpartition(".")[2].strip("_") if op.kind in ("function", "method") else op.kind


def run_with(sizes: Sizes, software: Software) -> ProxyGraph:
    """A fine trace as one rank's kernels: with the flops and bytes of its shares, fused if the software does that."""
    kept = _Kept(sizes, software)
    ops = [_own(op, sizes, kept.saved[i], kept.keeps[i]) for i, op in enumerate(sizes.graph.ops)]
    if software.kernels == "fused":
        ops = _fuse(ops, sizes, kept)
        ops = [_attend(op, sizes, software) if word(op) == ATTEND else op for op in ops]
    return replace(sizes.graph, ops=tuple(ops))


def _own(op: Op, sizes: Sizes, saved: int, keeps: tuple[str, ...]) -> Op:
    share = sizes.touched(op) if op.moved_bytes else 1.0
    return replace(
        op, flops=round(op.flops * sizes.of(op)), moved_bytes=round(op.moved_bytes * share), saved_bytes=saved,
        keeps=keeps,
    )  # fmt: skip


def _attend(op: Op, sizes: Sizes, software: Software) -> Op:
    """Attention with its scores in memory: written, scaled and masked with softmax, dropped out, read (forward)."""
    if software.attention == "flash":
        return op
    scores = _scores(op, sizes)
    passes = (8 + 5 * op.random) * scores  # 2 bytes each way for each of these kernels, and the mask of the dropout
    return replace(op, streamed_bytes=round(passes), replayed=software.selective, kernels=3 + op.random)


def _scores(op: Op, sizes: Sizes) -> float:
    """Elements of the scores on a rank."""
    query, key = (sizes.graph.values[name] for name in op.inputs[:2])
    return query.numel // query.shape[-1] * key.shape[-2] * sizes.share(op.inputs[0])


class _Kept:
    """What each call keeps for the backward: values, each storage once, and what has no name."""

    def __init__(self, sizes: Sizes, software: Software) -> None:
        self.sizes, self.software, graph = sizes, software, sizes.graph
        self.fused = software.kernels == "fused"
        names: list[tuple[str, ...]] = [self._named(op) for op in graph.ops]
        owner: dict[str, int] = {}
        for index, roots in enumerate(names):
            for root in roots:
                owner.setdefault(root, index)
        if self.fused:
            self._drop(owner)
        self.kept = frozenset(owner)
        groups: list[list[str]] = [[] for _ in graph.ops]
        for root, index in owner.items():
            groups[index].append(root)
        self.keeps: list[tuple[str, ...]] = []
        self.saved: list[int] = []
        for index, op in enumerate(graph.ops):
            self.keeps.append(tuple(groups[index]))
            self.saved.append(sum(map(sizes.nbytes, groups[index])) + self._nameless(op))

    def _named(self, op: Op) -> tuple[str, ...]:
        names = op.keeps
        if self.fused and word(op) == ATTEND:
            names = (*op.inputs[:3], *(v.name for v in op.outputs if self.software.attention == "flash"))
        return tuple(dict.fromkeys(self.sizes.root[name] for name in names))

    def _nameless(self, op: Op) -> int:
        """Masks and statistics: bytes that are no value of the graph."""
        if self.fused and word(op) == ATTEND:
            return self._attention(op)
        whole = sum(self.sizes.graph.values[root].nbytes for root in self._first(op))
        rest = max(op.saved_bytes - whole, 0) * self.sizes.of(op)
        if self.fused and word(op) == "dropout":
            rest = min(rest, sum(v.numel * self.sizes.share(v.name) for v in op.outputs))  # one byte each
        return round(rest)

    def _first(self, op: Op) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.sizes.root[name] for name in op.keeps))

    def _attention(self, op: Op) -> int:
        query = self.sizes.graph.values[op.inputs[0]]
        scores = _scores(op, self.sizes)
        if self.software.attention == "flash":  # the logarithm of the sum of each row
            return round(4 * query.numel // query.shape[-1] * self.sizes.share(query.name))
        if self.software.selective:
            return 0
        item = ITEMSIZE[query.dtype]
        return round(scores * (item + op.random * (item + 1)))

    def _drop(self, owner: dict[str, int]) -> None:
        """Leave out, largest first, what fused kernels can compute again from what else is kept."""
        graph, root = self.sizes.graph, self.sizes.root
        needed = {root[name] for op in graph.ops if word(op) in MATMULS for name in op.inputs}
        for name in sorted(owner, key=lambda n: (-graph.values[n].nbytes, n)):
            if name in needed or not self._fusible(graph.ops[graph.producer[name]]):
                continue
            found = self._sources(name, owner)
            if found is not None and sum(map(self.sizes.nbytes, found)) < self.sizes.nbytes(name):
                index = owner.pop(name)
                for source in found:
                    owner.setdefault(source, index)

    def _sources(self, name: str, owner: Mapping[str, int]) -> set[str] | None:
        """What would have to be kept instead of a value; None if it cannot be computed again by a fused kernel."""
        graph, root = self.sizes.graph, self.sizes.root
        found, waiting, seen = set[str](), [name], {name}
        while waiting:
            op = graph.ops[graph.producer[waiting.pop()]]
            if op.random:
                return None
            for read in {root[i] for i in op.inputs}:
                if read in seen or (read in owner and read != name):
                    continue
                seen.add(read)
                value = graph.values[read]
                made = graph.ops[graph.producer[read]]
                cast = word(op) in ("to", "float", "half", "bfloat16", "type_as")
                if not value.requires_grad and "float" not in value.dtype:
                    found.add(read) if made.kind != "input" and value.nbytes > 2**20 else None
                elif self._fusible(made) and not cast:
                    waiting.append(read)
                else:
                    found.add(read)
        return found

    @staticmethod
    def _fusible(op: Op) -> bool:
        return word(op) in FUSED


def _fuse(ops: list[Op], sizes: Sizes, kept: _Kept) -> list[Op]:
    """Runs of neighbouring element-wise calls become one kernel, charged to the first of them."""
    graph, made, last = sizes.graph, list(ops), sizes.graph.last_use
    run: list[int] = []
    for index, op in enumerate([*ops, None]):
        if op is not None and (word(op) in FUSED or not op.moved_bytes) and op.kind in ("function", "method"):
            run.append(index)
            continue
        real = [i for i in run if ops[i].moved_bytes]
        if real:
            inside = {v.name for i in run for v in ops[i].outputs}
            read = {sizes.root[n] for i in run for n in ops[i].inputs if sizes.root[n] not in inside}
            written = {
                sizes.root[v.name]
                for i in run
                for v in ops[i].outputs
                if last[v.name] > run[-1] or sizes.root[v.name] in kept.kept
            } & inside
            held = {graph.canonical[n] for i in run for n in ops[i].params}
            streamed = sum(map(sizes.nbytes, read | written)) + sum(map(sizes.held, held))
            norms = sum(word(ops[i]) in ("layer_norm", "rms_norm", "softmax", "rsqrt") for i in real)
            for i in real:
                made[i] = replace(ops[i], flops=0, moved_bytes=0, kernels=0)
            made[real[0]] = replace(made[real[0]], streamed_bytes=streamed, kernels=max(norms, 1))
        run = []
    return made
