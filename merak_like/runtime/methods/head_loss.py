"""A pass over a recorded model: output layer and cross-entropy become one op that never makes the logits.

    hidden -> Linear -> float -> view(-1, V) -> cross_entropy(.., target)
    hidden ------------------> view(-1, D) -> linear_cross_entropy(.., weight, bias, target)

What stands between the two acts on rows alone, so it moves before the layer and works on the hidden states.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like._compat import tree_leaves
from merak_like.partitioner.graph import Op, ProxyGraph
from merak_like.partitioner.tracer import Trace
from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods import liger
from merak_like.runtime.methods.chunked_loss import CHUNK_BYTES, linear_cross_entropy
from merak_like.runtime.methods.method import Job, Method, Place

Node = Any
"""A node of the recorded code."""
RESHAPING = frozenset("view reshape contiguous flatten __getitem__".split())
KERNELS: Mapping[str, Callable[..., Tensor]] = {
    "own": linear_cross_entropy, "liger": liger.linear_cross_entropy
}  # fmt: skip
"""What computes layer and loss together."""
CASTING = frozenset("float to type double half bfloat16".split())


class ChunkedLoss(Method):
    """Never makes the logits of more than a few rows in training; the model's ``logits`` are not among its results.

    Evaluation stays as it is. Raises ValueError for a model whose loss is not the cross-entropy of a Linear layer's
    output, naming what stands between them. ``kernel`` "liger" lets Liger's kernels do it, on a GPU; they choose
    their chunks. Without the library, or on another device, that is a ValueError before the first step.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, *, kernel: str = "own") -> None:
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes={chunk_bytes}: it is the bytes of a chunk's logits, at least 1")
        if kernel not in KERNELS:
            raise ValueError(f"no kernel {kernel!r} for the loss: there are {', '.join(KERNELS)}")
        self.chunk_bytes, self.kernel = chunk_bytes, kernel
        if kernel == "liger":
            liger.require()

    def check(self, job: Job) -> None:
        """A vocabulary that is spread over ranks has its own cross-entropy."""
        if job.tp > 1:
            raise ValueError(f"chunked_loss does not go with tp={job.tp}: use tp=1, or leave it out")

    def traced(self, trace: Trace, model: nn.Module) -> Trace:
        """The same model without its logits."""
        if not trace.training:
            return trace
        own = {"chunk_bytes": self.chunk_bytes} if self.kernel == "own" else {}
        return fused(trace, find(trace, model), KERNELS[self.kernel], own)

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """The same; where it runs is known now."""
        if self.kernel == "liger":
            liger.check(place.world.device)
        return reducer


@dataclass
class Head:
    """An output layer, what stands after it, and the loss."""

    layer: Node
    """Or what was found on the way to it."""
    loss: Node
    target: Node
    options: dict[str, Any]
    between: list[Node] = field(default_factory=list)
    """From the layer to the loss."""
    biased: bool = False


def find(trace: Trace, model: nn.Module) -> Head:
    """Where a recorded model's loss comes from. Raises ValueError if that is not a Linear layer."""
    modules = dict(model.named_modules())
    why = ["the model's loss does not come from torch's cross_entropy"]
    for node in reversed(list(trace.code.nodes)):
        options = _options(node, modules)
        if options is None:
            continue
        target = options.pop("target")
        values = trace.graph.values
        logits = node.args[0] if node.args else None
        if options.pop("weight", None) is not None or options.get("reduction", "mean") not in ("mean", "sum"):
            why.append(f"{node.name} has weights of classes or no reduction")
        elif not (hasattr(target, "name") and values[target.name].dtype == "int64" and logits is not None):
            why.append(f"{node.name} has no target of class numbers")
        elif len(values[logits.name].shape) != 2:
            why.append(f"{node.name} reads logits of shape {values[logits.name].shape}, not rows of them")
        else:
            found = Head(logits, node, target, options)
            stopped = _walk(found, trace, modules)
            if not stopped:
                return found
            why.append(stopped)
    raise ValueError(
        f"chunked_loss needs a Linear layer whose output goes to cross_entropy and nowhere else: {why[-1]}. "
        "Leave it out for this model"
    )


def _options(node: Node, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """The target and the options of a cross-entropy; None for any other node."""
    if node.op == "call_function" and node.target is F.cross_entropy:
        given: dict[str, Any] = dict(zip(("target", "weight"), node.args[1:], strict=False))
        given.update(node.kwargs)
        unknown = [k for k in ("size_average", "reduce") if given.pop(k, None) is not None]
        return None if unknown or len(node.args) > 3 else given
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if type(module) is nn.CrossEntropyLoss and len(node.args) == 2:
        return {
            "target": node.args[1], "weight": module.weight, "ignore_index": module.ignore_index,
            "reduction": module.reduction, "label_smoothing": module.label_smoothing,
        }  # fmt: skip
    return None


def _walk(head: Head, trace: Trace, modules: dict[str, nn.Module]) -> str:
    """Follow the logits back to their layer; why that cannot be, or nothing."""
    node, reader = head.layer, head.loss
    shape = trace.graph.values[node.name].shape
    while True:
        if others := [user.name for user in node.users if user is not reader]:
            return f"{node.name} is read by {others[0]} too"
        if node.op == "call_module":
            module = modules.get(str(node.target))
            if type(module) is not nn.Linear:
                return f"the logits come from {node.target}, a {type(module).__name__}"
            if module._forward_hooks or module._forward_pre_hooks or len(node.args) != 1:
                return f"{node.target} has hooks"
            head.layer, head.biased = node, module.bias is not None
            return ""
        if node.op != "call_method":
            return f"{node.name} stands between the layer and the loss"
        source = node.args[0]
        before, after = (trace.graph.values[n.name].shape for n in (source, node))
        rows_only = node.target in CASTING or (node.target in RESHAPING and _keeps_columns(node, before, after))
        if not rows_only or after[-1] != shape[-1]:
            return f"{node.name} ({node.target}) stands between the layer and the loss and is no change of rows alone"
        head.between.insert(0, node)
        node, reader = source, node


def _keeps_columns(node: Node, before: Sequence[int], after: Sequence[int]) -> bool:
    if not before or not after or before[-1] != after[-1]:
        return False
    if node.target != "__getitem__":
        return all(isinstance(size, int) for size in _sizes(node)) and not node.kwargs
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(not isinstance(i, (int, slice)) and i is not Ellipsis for i in index):
        return False
    last = index[-1] == slice(None, None, None) if Ellipsis in index or len(index) == len(before) else True
    return last and None not in index


def _sizes(node: Node) -> list[Any]:
    return list(node.args[1]) if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else [*node.args[1:]]


def fused(trace: Trace, head: Head, kernel: Callable[..., Tensor], own: dict[str, Any]) -> Trace:
    """The trace with layer and loss as one op, ``own`` its own options. Its code and calls are changed in place."""
    graph, values = trace.graph, trace.graph.values
    hidden, width = head.layer.args[0], values[head.layer.args[0].name].shape[-1]
    shapes = {n.name: (*values[n.name].shape[:-1], width) for n in head.between if n.target in RESHAPING}
    gone = [head.layer, *(n for n in head.between if n.target in CASTING)]
    removed = sorted(node.meta["index"] for node in gone)
    wide = [values[n.name].dtype for n in head.between if n.target in CASTING]
    touched = {head.layer, head.loss, *head.between}
    for call in trace.calls:
        read = set(map(id, tree_leaves((call.args, call.kwargs))))
        inside = any(call.first <= node.meta["index"] < call.stop for node in touched)
        if not call.opaque and (inside or any(id(node) in read for node in touched)):
            call.opaque = "its output layer is one op with the loss"
    source = hidden
    for node in head.between:
        if node in gone:
            continue
        sizes = _sizes(node)
        resized = node.target in ("view", "reshape")
        node.args = (source, *sizes[:-1], width) if resized else (source, *node.args[1:])
        source = node
    path = head.layer.target
    with trace.code.inserting_before(head.loss):
        read = [trace.code.create_node("get_attr", f"{path}.weight")]
        read += [trace.code.create_node("get_attr", f"{path}.bias")] if head.biased else []
    for node in read:
        node.meta["index"] = head.loss.meta["index"]
    names = {"ignore_index", "reduction", "label_smoothing"}
    options = {k: v for k, v in head.options.items() if k in names} | own
    if wide:
        options["dtype"] = getattr(torch, wide[-1])
    head.loss.op, head.loss.target = "call_function", kernel
    head.loss.args, head.loss.kwargs = (source, read[0], (*read, None)[1], head.target), options
    for node in reversed(gone):
        trace.code.erase_node(node)
    ops = _ops(graph, head, source, hidden, removed, shapes, [n.name for n in gone])

    def at(index: int) -> int:
        return index - bisect_left(removed, index)

    for node in trace.code.nodes:
        node.meta["index"] = at(node.meta["index"])
    for call in trace.calls:
        call.first, call.stop = at(call.first), at(call.stop)
    unmade = {head.layer.name, *(n.name for n in head.between)}
    return replace(trace, graph=_renumbered(graph, ops, at, unmade))


def _renumbered(graph: ProxyGraph, ops: tuple[Op, ...], at: Callable[[int], int], unmade: set[str]) -> ProxyGraph:
    calls = tuple(replace(c, first=at(c.first), stop=at(c.stop)) for c in graph.calls if at(c.first) < at(c.stop))
    return replace(
        graph, ops=ops, calls=calls, pinned=tuple((at(a), at(b)) for a, b in graph.pinned),
        outputs={name: value for name, value in graph.outputs.items() if value not in unmade},
    )  # fmt: skip


def _ops(
    graph: ProxyGraph, head: Head, source: Node, hidden: Node, removed: Sequence[int],
    shapes: dict[str, tuple[int, ...]], gone: Sequence[str],
) -> tuple[Op, ...]:  # fmt: skip
    """Without the layer; its costs and parameters are the loss's."""
    layer, loss = (graph.ops[graph.producer[node.name]] for node in (head.layer, head.loss))
    logits = graph.values[head.layer.name]
    rename = dict.fromkeys(gone, hidden.name)
    found: list[Op] = []
    for index, op in enumerate(graph.ops):
        if index in removed:
            continue
        if op is loss:
            kept = max(0, loss.saved_bytes - logits.nbytes)
            op = replace(
                loss, kind="function", target=f"{linear_cross_entropy.__module__}.{linear_cross_entropy.__name__}",
                inputs=(source.name, *(n for n in loss.inputs if n == head.target.name)), params=layer.params,
                flops=layer.flops + loss.flops, moved_bytes=layer.moved_bytes + loss.moved_bytes,
                saved_bytes=layer.saved_bytes + kept, keeps=(*layer.keeps, *loss.keeps), replayed=True,
                kernels=layer.kernels + loss.kernels,
            )  # fmt: skip
        else:
            outputs = tuple(replace(v, shape=shapes[v.name]) if v.name in shapes else v for v in op.outputs)
            op = replace(op, inputs=tuple(rename.get(n, n) for n in op.inputs), outputs=outputs)
        found.append(op)
    return tuple(found)
