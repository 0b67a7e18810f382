"""Proxy graphs made by hand, for the tests of what is decided from a graph: no torch, no tracer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from merak_like.partitioner.graph import Call, Op, Parameter, ProxyGraph, Value
from merak_like.partitioner.hardware import Hardware, Link

#: One flop, byte moved or kernel costs about what one expects: easy to reckon with.
TOY = Hardware(
    "toy",
    peak_flops={"float32": 1e12},
    memory_bytes=10**12,
    memory_bandwidth=1e12,
    intra=Link(1e10, 1e-5),
    inter=Link(1e9, 1e-4),
    devices_per_node=8,
    efficiency=1.0,
    half_flops=0.0,
    launch_seconds=0.0,
    usable_memory=1.0,
    source="made up",
)


class GraphBuilder:
    """Writes a graph down as a model runs: ops one after the other, inside the modules that call them."""

    def __init__(self, model: str = "Toy") -> None:
        self.model = model
        self.ops: list[Op] = []
        self.parameters: dict[str, Parameter] = {}
        self.named: dict[str, Parameter] = {}
        self.calls: list[Call] = []
        self.values: dict[str, Value] = {}
        self.path: list[str] = []
        self.pinned: list[tuple[int, int]] = []

    def weight(self, name: str, *shape: int, trainable: bool = True, tied: tuple[str, ...] = ()) -> str:
        if name not in self.parameters:
            self.parameters[name] = Parameter(name, shape, "float32", trainable, tied)
            self.named.update(dict.fromkeys((name, *tied), self.parameters[name]))
        return name

    def op(
        self,
        target: str,
        *inputs: str,
        shape: Sequence[int] = (2, 4),
        kind: str = "function",
        params: Sequence[str] = (),
        flops: int = 0,
        saved: int | None = None,
        grad: bool | None = None,
        dtype: str = "float32",
    ) -> str:
        """Add an op of one output; the output's name."""
        name = f"{target.replace('.', '_')}_{len(self.ops)}"
        needs = any(self.values[i].requires_grad for i in inputs) or any(self.named[p].trainable for p in params)
        value = Value(name, tuple(shape), dtype, needs if grad is None else grad)
        moved = 2 * value.nbytes + sum(self.named[p].nbytes for p in params)
        self.ops.append(
            Op(
                name,
                kind,
                target,
                ".".join(part for part in self.path if part),
                tuple(dict.fromkeys(inputs)),
                (value,),
                params=tuple(params),
                flops=flops,
                moved_bytes=moved,
                saved_bytes=value.nbytes if saved is None else saved,
                kernels=kind not in ("input", "attribute"),
            )
        )
        self.values[name] = value
        return name

    def input(self, name: str = "input_ids", shape: Sequence[int] = (2, 4), dtype: str = "int64") -> str:
        return self.op(name, kind="input", shape=shape, saved=0, grad=False, dtype=dtype)

    def linear(self, name: str, x: str, *shape: int, out: Sequence[int] | None = None, weight: str = "") -> str:
        """A leaf module with a weight, as the tracer writes one."""
        with self.module(name, "Linear") as path:
            held = weight or self.weight(f"{path}.weight", *shape)
            rows = self.values[x].numel // shape[-1]
            size = (*self.values[x].shape[:-1], shape[0]) if out is None else out
            return self.op(path, x, kind="module", params=(held,), shape=size, flops=2 * rows * shape[0] * shape[1])

    @contextmanager
    def module(self, name: str, kind: str) -> Iterator[str]:
        """What is added inside was called by this module."""
        self.path.append(name)
        path, first, depth = ".".join(p for p in self.path if p), len(self.ops), len(self.path) - 1
        at = len(self.calls)
        yield path
        self.calls.insert(at, Call(path, kind, first, len(self.ops), depth))
        self.path.pop()

    def graph(self, **outputs: str) -> ProxyGraph:
        return ProxyGraph(
            tuple(self.ops),
            tuple(self.parameters.values()),
            tuple(self.calls),
            tuple(self.pinned),
            outputs or {"loss": self.ops[-1].outputs[0].name},
            self.model,
        )


def chain(
    flops: Sequence[int], width: int = 8, *, samples: int = 2, calls: bool = True, widths: Sequence[int] = ()
) -> ProxyGraph:
    """An input and one op of its own parameter per entry, each reading the one before; ``widths`` of the values."""
    made = GraphBuilder("Chain")
    x = made.input("x", (samples, width), "float32")
    for index, each in enumerate(flops):
        out = widths[index] if widths else width
        name = f"layer_{index}"
        if calls:
            with made.module(name, "Layer"):
                weight = made.weight(f"{name}.weight", out)
                x = made.op(name, x, kind="module", params=(weight,), shape=(samples, out), flops=each)
        else:
            x = made.op("f", x, params=(made.weight(f"w{index}", out),), shape=(samples, out), flops=each)
    return made.graph()


def gpt(
    layers: int, d: int = 16, s: int = 8, vocabulary: int = 64, *, tied: bool = True, samples: int = 2
) -> ProxyGraph:
    """A GPT of Linear-level ops, 15 per block, with its loss outside the model."""
    made = GraphBuilder("GPT")
    with made.module("", "GPT"):
        ids = made.input("input_ids", (samples, s))
        with made.module("wte", "Embedding") as path:
            table = made.weight(f"{path}.weight", vocabulary, d, tied=("lm_head.weight",) if tied else ())
            x = made.op(path, ids, kind="module", params=(table,), shape=(samples, s, d))
        for index in range(layers):
            x = block(made, f"h.{index}", x, d)
        x = made.linear("lm_head", x, vocabulary, d, weight="lm_head.weight" if tied else "")
    made.op("cross_entropy", x, ids, shape=())
    return made.graph()


def block(made: GraphBuilder, name: str, x: str, d: int, memory: str = "") -> str:
    """A transformer block: attention, perhaps attention to an encoder's output, feed-forward."""
    shape = made.values[x].shape
    with made.module(name, "Block"):
        x = attention(made, "attn", x, d)
        if memory:
            x = attention(made, "cross", x, d, memory)
        residual = x
        x = norm(made, "ln_2", x, d)
        with made.module("mlp", "MLP"):
            x = made.linear("fc", x, 4 * d, d)
            x = made.op("gelu", x, shape=(*shape[:-1], 4 * d))
            x = made.linear("proj", x, d, 4 * d)
        return made.op("add", x, residual, shape=shape)


def attention(made: GraphBuilder, name: str, x: str, d: int, memory: str = "") -> str:
    shape, residual = made.values[x].shape, x
    x = norm(made, f"ln_{name}", x, d)
    with made.module(name, "Attention"):
        q = made.linear("q", x, d, d)
        k = made.linear("k", memory or x, d, d, out=shape)
        v = made.linear("v", memory or x, d, d, out=shape)
        rows = made.values[q].numel // d
        x = made.op("scaled_dot_product_attention", q, k, v, shape=shape, flops=4 * rows * d * shape[1])
        x = made.linear("o", x, d, d)
    return made.op("add", x, residual, shape=shape)


def norm(made: GraphBuilder, name: str, x: str, d: int) -> str:
    with made.module(name, "LayerNorm") as path:
        weight = made.weight(f"{path}.weight", d)
        return made.op(path, x, kind="module", params=(weight,), shape=made.values[x].shape)


def encoder_decoder(layers: int, d: int = 16, s: int = 8, vocabulary: int = 64, samples: int = 2) -> ProxyGraph:
    """A T5: one table for embeddings and head, a mask from the batch, the encoder read by every decoder block."""
    made = GraphBuilder("T5")
    with made.module("", "T5"):
        ids, mask = made.input("input_ids", (samples, s)), made.input("attention_mask", (samples, s), "float32")
        labels = made.input("labels", (samples, s))
        table = made.weight("shared.weight", vocabulary, d, tied=("decoder.embed.weight", "lm_head.weight"))
        with made.module("encoder", "Stack"):
            x = made.op("embedding", ids, params=(table,), shape=(samples, s, d))
            bias = made.op("mask", mask, shape=(samples, 1, 1, s), grad=False)
            x = made.op("add_bias", x, bias, shape=(samples, s, d))
            for index in range(layers):
                x = block(made, f"block.{index}", x, d)
        memory = x
        with made.module("decoder", "Stack"):
            x = made.op("embedding", labels, params=("decoder.embed.weight",), shape=(samples, s, d))
            for index in range(layers):
                x = block(made, f"block.{index}", x, d, memory)
        x = made.linear("lm_head", x, vocabulary, d, weight="lm_head.weight")
    made.op("cross_entropy", x, labels, shape=())
    return made.graph()


def skips(depth: int, width: int = 8, samples: int = 2) -> ProxyGraph:
    """A U-Net: level i on the way up reads level i on the way down."""
    made = GraphBuilder("UNet")
    x = made.input("x", (samples, width), "float32")
    kept: list[str] = []
    for level in range(depth):
        x = made.linear(f"down.{level}", x, width, width)
        kept.append(x)
    for level in reversed(range(depth)):
        x = made.linear(f"up.{level}", x, width, width)
        x = made.op("add", x, kept[level], shape=(samples, width))
    return made.graph()


def two_towers(layers: int, width: int = 8, samples: int = 2) -> ProxyGraph:
    """Two chains from two inputs that meet in the last op: the second does not wait for the first."""
    made = GraphBuilder("Towers")
    ends: list[str] = []
    for tower in ("left", "right"):
        x = made.input(tower, (samples, width), "float32")
        for layer in range(layers):
            x = made.linear(f"{tower}_tower.{layer}", x, width, width)
        ends.append(x)
    made.op("cosine", *ends, shape=())
    return made.graph()
