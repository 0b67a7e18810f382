"""Find a layer's feed-forward in the graph: its first matrices, its last, and the residual link around it.

h --> first (one, or gate and up) --> activation, product, norm --> last --> ... --> + --> y
x ----------------------------------- residual -----------------------------------> +
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn

from merak_like.partitioner.graph import Op, ProxyGraph

ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
MIXES = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "softmax"})
"""What a feed-forward does not do between its matrices: attention does."""


@dataclass(frozen=True)
class FeedForward:
    """Module paths of a layer's feed-forward."""

    layer: str
    first: tuple[str, ...]
    """The matrices that read the feed-forward's input: one, or the gate and the up matrix."""
    last: str
    residual: str
    """The value that is added to the feed-forward's result."""


def find_feed_forward(graph: ProxyGraph, model: nn.Module, layer: str) -> FeedForward:
    """The last feed-forward of the layer with this path.

    Raises ValueError for a path that the model does not call just once, or a layer whose last matrix is not a
    feed-forward's with one residual link around it.
    """
    calls = [call for call in graph.calls if call.path == layer]
    if len(calls) != 1:
        paths = sorted({call.path for call in graph.calls if call.path})
        near = ", ".join(get_close_matches(layer, paths, 3, cutoff=0.3)) or "no other"
        raise ValueError(f"a layer that runs once is needed; {layer!r} runs {len(calls)} times. Near it: {near}")
    ops = graph.ops[calls[0].first : calls[0].stop]
    made = {value.name: op for op in ops for value in op.outputs}
    matrices = [op for op in ops if op.kind == "module" and matrix_of(model.get_submodule(op.target)) is not None]
    if not matrices:
        raise ValueError(f"{layer} has no matrix: no module of it is a Linear")
    last = matrices[-1]
    first = _first(last, made, matrices, layer)
    residual = _residual(ops, made, first, layer)
    return FeedForward(layer, tuple(op.target for op in first), last.target, residual)


def matrix_of(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight (out, in) and the bias of a linear layer; None for any other module."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    if isinstance(module, nn.Linear):
        return weight, bias
    # The transposed Linear that GPT-2's family calls Conv1D; known by its features, as transformers stays outside.
    return (
        (weight.T, bias) if type(module).__name__ == "Conv1D" and getattr(module, "nf", 0) == weight.shape[1] else None
    )


def _first(last: Op, made: dict[str, Op], matrices: list[Op], layer: str) -> tuple[Op, ...]:
    """The nearest matrices before the last one."""
    found: dict[str, Op] = {}
    todo, seen = list(last.inputs), set[str]()
    while todo:
        name = todo.pop()
        op = made.get(name)
        if op is None or op.name in seen:
            continue
        seen.add(op.name)
        if op.target.rpartition(".")[2] in MIXES:
            raise ValueError(f"{layer} ends with {last.target} behind {op.name}: that is attention, not a feed-forward")
        if op in matrices:
            found[op.target] = op
        else:
            todo += op.inputs
    first = tuple(op for op in matrices if op.target in found)
    if not first:
        raise ValueError(f"{layer} has no feed-forward: nothing in it leads from one matrix to {last.target}")
    if len({op.inputs for op in first}) != 1:
        names = ", ".join(op.target for op in first)
        raise ValueError(f"the matrices {names} of {layer} do not read one value, so that no one product can travel")
    return first


def _residual(ops: tuple[Op, ...], made: dict[str, Op], first: tuple[Op, ...], layer: str) -> str:
    """What is added to the feed-forward's result; the feed-forward's input must have been computed from it."""
    own = {value.name for op in first for value in op.outputs}
    shapes = {value.name: value.shape for op in ops for value in op.outputs}
    links: list[str] = []
    for op in ops[ops.index(first[0]) + 1 :]:
        others = [name for name in op.inputs if name not in own]
        if len(others) == len(op.inputs):
            continue
        if op.target.rpartition(".")[2] in ADDS and others and op.outputs:
            links += [name for name in others if shapes.get(name, op.outputs[0].shape) == op.outputs[0].shape]
        own |= {value.name for value in op.outputs}
    found = f"{len(links)} ({', '.join(links)})" if links else "none"
    if len(links) == 1:
        behind, link = _behind(first[0].inputs, made), links[0]
        while link not in behind and (op := made.get(link)) is not None and len(op.inputs) == 1:
            link = op.inputs[0]  # a cast or a scaled residual
        if link in behind:
            return links[0]
        found = f"{links[0]}, which its input does not come from"
    raise ValueError(
        f"the feed-forward of {layer} must have one residual link around it, found {found}: a layer that adds its "
        f"attention and feed-forward side by side, or adds nothing, has no narrow place here"
    )


def _behind(names: tuple[str, ...], made: dict[str, Op]) -> set[str]:
    """These values and all in the layer they were computed from."""
    found, todo = set[str](), list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += made[name].inputs if name in made else ()
    return found
