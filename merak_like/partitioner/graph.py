"""The proxy graph: what a model computes, as plain data. No weights, no torch.

::

    input_ids ──► wte ──► h.0.ln_1 ──► h.0.attn.c_attn ──► ... ──► loss
    (an Op reads Values by name and makes Values; parameters are named as the user's model names them)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx

ITEMSIZE: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex128": 16, "complex64": 8, "complex32": 4,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes per element, by torch's name of the dtype."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor on an edge of the graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Collective:
    """A sum over a tensor-parallel group that follows a call: its output, or (backward) its output's gradient."""

    degree: int
    nbytes: int
    """On one rank."""
    backward: bool = False
    parted: bool = False
    """Whether it is a reduce-scatter and an all-gather, of the sequence-parallel form."""
    beside: int = 0
    """Flops of the products whose weights' gradients can be computed meanwhile."""


@dataclass(frozen=True, slots=True)
class Packing:
    """What is done to what a call keeps, on top of the call: into few bits in the forward, and back in the backward."""

    forward_bytes: float
    """Read and written."""
    backward_bytes: float
    forward_kernels: int
    backward_kernels: int


@dataclass(frozen=True, slots=True)
class Plain:
    """What a call keeps for the backward where nothing is packed or goes elsewhere, as where it is computed again."""

    saved_bytes: int
    keeps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One traced call.

    ``inputs`` are the names of the values read, each once. ``params`` and ``buffers`` are names as in the user's
    ``state_dict``. ``mutates`` names what the call changes in place: values, parameters or buffers.
    """

    name: str
    kind: str
    """``input``, ``module``, ``function``, ``method``, ``attribute`` (a parameter or constant read), ``guard``."""
    target: str
    """A module path, a function's dotted name, a method's name or an attribute's path."""
    scope: str
    """Path of the innermost module that made the call."""
    inputs: tuple[str, ...] = ()
    outputs: tuple[Value, ...] = ()
    params: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    flops: int = 0
    """Floating-point operations of the forward (a multiply-add counts 2)."""
    moved_bytes: int = 0
    """Bytes read and written by the forward's kernels, parameters included."""
    saved_bytes: int = 0
    """Bytes kept for the backward that no earlier op already keeps; parameters and buffers excluded."""
    kernels: int = 0
    """Number of torch functions the call runs, for the launch overhead."""
    random: bool = False
    """Whether the call draws random numbers (dropout)."""
    keeps: tuple[str, ...] = ()
    """Names of the values among ``saved_bytes``, views of them included."""
    streamed_bytes: int = 0
    """Bytes read and written by kernels that multiply nothing, on top of ``moved_bytes`` and of the matmuls' time."""
    replayed: bool = False
    """Whether the backward runs the forward first, because that kept less than it needs."""
    collectives: tuple[Collective, ...] = ()
    """Sums over tensor-parallel ranks."""
    copied_seconds: float = 0.0
    """Of copying what it keeps to another memory, beside the forward, and back, beside the backward."""
    packing: Packing | None = None
    plain: Plain | None = None
    """None: what it keeps as it is."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: the ops ``first <= i < stop`` ran inside it."""

    path: str
    type: str
    first: int
    stop: int
    depth: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of the model, under its first name; ``tied`` are its other names."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    tied: tuple[str, ...] = ()
    buffer: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class ProxyGraph:
    """The ops of one forward pass in the order they ran, which is a topological order.

    ``pinned`` are op intervals ``(first, last)``, both included, that may not be cut: a tensor changed in place must
    be made in the stage that changes it, and an atomic module stays whole.
    ``outputs`` maps the names of the results (``loss`` first) to value names.
    """

    ops: tuple[Op, ...]
    parameters: tuple[Parameter, ...]
    calls: tuple[Call, ...] = ()
    pinned: tuple[tuple[int, int], ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict[str, str])
    model: str = ""
    """The model's class name."""

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """Every value by name."""
        return {value.name: value for op in self.ops for value in op.outputs}

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Index of the op that makes each value."""
        return {value.name: index for index, op in enumerate(self.ops) for value in op.outputs}

    @cached_property
    def uses(self) -> Mapping[str, tuple[int, ...]]:
        """For each value its producer, then the ops that read it, in order and each once."""
        found = {name: [index] for name, index in self.producer.items()}
        for index, op in enumerate(self.ops):
            for name in op.inputs:
                if found[name][-1] != index:
                    found[name].append(index)
        return {name: tuple(uses) for name, uses in found.items()}

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """Index of the last op that reads each value (its producer if nothing does)."""
        return {name: uses[-1] for name, uses in self.uses.items()}

    @cached_property
    def canonical(self) -> Mapping[str, str]:
        """First name of the storage behind each parameter or buffer name: the same for tied names."""
        return {alias: p.name for p in self.parameters for alias in (p.name, *p.tied)}

    @cached_property
    def alike(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ops that cost the same: the first op of each kind, and for each op its kind."""
        values, seen = self.values, dict[object, int]()
        first, kinds = list[int](), list[int]()
        for index, op in enumerate(self.ops):
            # In place of the inputs' names, what a cost may depend on: gradients, and which are read from the model.
            read = tuple(
                (values[name].requires_grad, maker.params if maker.kind == "attribute" else ())
                for name in op.inputs
                for maker in (self.ops[self.producer[name]],)
            )
            held = tuple((p.shape, p.dtype, p.trainable) for p in map(self.parameter, dict.fromkeys(op.params)))
            made = tuple((v.shape, v.dtype, v.requires_grad) for v in op.outputs)
            word = op.kind if op.kind == "module" else op.target
            key = (
                word, op.kind, op.flops, op.moved_bytes, op.streamed_bytes, op.saved_bytes, op.kernels, op.replayed,
                op.collectives, op.copied_seconds, op.packing, read, held, made,
                len({self.canonical[n] for n in op.params}),
            )  # fmt: skip
            kind = seen.setdefault(key, len(first))
            if kind == len(first):
                first.append(index)
            kinds.append(kind)
        return tuple(first), tuple(kinds)

    def parameter(self, name: str) -> Parameter:
        """The parameter or buffer known by this name or a name tied to it."""
        return self._by_name[self.canonical[name]]

    @cached_property
    def _by_name(self) -> Mapping[str, Parameter]:
        return {p.name: p for p in self.parameters}

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that share one storage."""
        return tuple((p.name, *p.tied) for p in self.parameters if p.tied)

    def params_of(self, ops: Iterable[Op]) -> tuple[str, ...]:
        """Distinct parameters (first names) read by some ops, in order of first use."""
        return tuple(dict.fromkeys(self.canonical[name] for op in ops for name in op.params))

    def to_networkx(self) -> networkx.DiGraph[str]:
        """The graph for networkx: a node per op (attribute ``op``), an edge per value read (attribute ``value``)."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        for op in self.ops:
            graph.add_node(op.name, op=op)
            for name in op.inputs:
                source = self.ops[self.producer[name]]
                if graph.has_edge(source.name, op.name):
                    graph.edges[source.name, op.name]["values"].append(self.values[name])
                else:
                    graph.add_edge(source.name, op.name, values=[self.values[name]])
        return graph
