"""The finest trace as plain steps: torch functions only, no module and no torch.fx in sight.

Whoever must know what happens to each dimension (tensor parallelism) cannot use a leaf module: a norm of the model's
own may do anything. Here every childless module is recorded inside, so that what is left is one vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from merak_like._compat import as_in_a_real_run
from merak_like.partitioner.graph import Value
from merak_like.partitioner.tracer import LossFn, Trace, TraceError, _device_of, _with_choices
from merak_like.partitioner.tracer.calls import Choices, CustomFunction
from merak_like.partitioner.tracer.kernels import kernels
from merak_like.partitioner.tracer.repeatable import surely

__all__ = ["Name", "Step", "fine_trace", "steps"]


@dataclass(frozen=True, slots=True)
class Name:
    """An argument that is a tensor: of the graph (``value``), a parameter or buffer (``weight``), or a ``constant``."""

    name: str
    kind: str = "value"


@dataclass(frozen=True, slots=True)
class Step:
    """One node of the code. Arguments are Names, Python constants, and tuples, lists, dicts and slices of them."""

    name: str
    """Of the node, and of the value if it gives one tensor."""
    word: str
    """What is done, one word for all spellings: ``add`` for ``torch.add``, ``Tensor.add_`` and ``__radd__``."""
    kind: str
    """``input``, ``function``, ``method``, ``item`` (one result of a step that has several), ``module``, ``guard``."""
    target: Any
    """The function, the method's name, the module's path."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int
    """Of the op in the graph."""
    value: Value | None = None
    """The tensor it gives; None for none or several."""
    mutates: tuple[str, ...] = ()
    """Names of what it changes in place."""
    weights: tuple[str, ...] = ()
    """Parameters of a module that was kept whole, which are no arguments."""
    grad: bool = True
    """Whether gradients were recorded; False inside ``no_grad``."""


def fine_trace(
    model: nn.Module, example: Any, loss_fn: LossFn | None = None, *, device: torch.device | str | None = None,
    fuse: bool = True,
) -> Trace:  # fmt: skip
    """Like ``trace``, but with the inside of every childless module recorded, torch's own layers included."""
    where = torch.device(device) if device is not None else _device_of(model)
    childless = frozenset(path for path, module in model.named_modules() if path and not module._modules)

    choices = Choices(descend=childless, kernels=kernels(model) if fuse else {})

    def attempt() -> Trace:
        return surely(lambda: _with_choices(model, example, loss_fn, choices, where))

    with as_in_a_real_run() as asked:
        try:
            return attempt()
        except TraceError:
            if not asked():
                raise
    return attempt()


def steps(trace: Trace) -> tuple[Step, ...]:
    """The code of a trace, node by node; reading a parameter or constant is no step but a Name where it is used."""
    values, canonical = trace.graph.values, trace.graph.canonical
    return tuple(_step(node, trace, values, canonical) for node in trace.code.nodes if node.op != "get_attr")


def _step(node: fx.Node, trace: Trace, values: Mapping[str, Value], canonical: Mapping[str, str]) -> Step:
    def name(argument: fx.Node) -> Name:
        if argument.op != "get_attr":
            return Name(argument.name)
        target = str(argument.target)
        return Name(canonical[target], "weight") if target in canonical else Name(target, "constant")

    args, kwargs = (_translate(x, name) for x in (node.args, node.kwargs))
    op = trace.graph.ops[node.meta["index"]]
    mutates = op.mutates if op.name == node.name else ()
    if op.name != node.name and op.kind != "input":
        kind = "item"
    else:
        kind = op.kind
    whole = tuple(canonical[name] for name in op.params) if kind == "module" else ()
    return Step(
        node.name, word_of(node), kind, node.target, args, kwargs, node.meta["index"], values.get(node.name), mutates,
        whole, node.meta.get("state", (True,))[0],
    )  # fmt: skip


def _translate(item: Any, name: Callable[[fx.Node], Name]) -> Any:
    if isinstance(item, fx.Node):
        return name(item)
    if isinstance(item, (tuple, list)):
        return (
            type(item)([_translate(x, name) for x in item])
            if type(item) in (tuple, list)
            else [_translate(x, name) for x in item]
        )
    if isinstance(item, dict):
        return {key: _translate(x, name) for key, x in item.items()}
    if isinstance(item, slice):
        return slice(*(_translate(x, name) for x in (item.start, item.stop, item.step)))
    return item


def word_of(node: fx.Node) -> str:
    """One word for an operation, however it is spelled: without ``torch.``, underscores and the reflected ``r``."""
    if node.op == "placeholder":
        return "input"
    if node.op == "call_module":
        return "module"
    if isinstance(node.target, CustomFunction):
        return node.target.cls.__name__
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name in ("getattr", "setattr"):
        return f"{name} {node.args[1]}"
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        return DUNDER.get(inner, inner)
    return name.rstrip("_") if not name.startswith("_") else name


DUNDER = {
    **{f"{prefix}{name}": name for prefix in ("r", "i", "") for name in ("add", "sub", "mul", "matmul", "pow")},
    "rsub": "rsub", "truediv": "div", "rtruediv": "rdiv", "itruediv": "div", "rpow": "rpow", "floordiv": "floor_divide",
    "ifloordiv": "floor_divide", "mod": "remainder", "imod": "remainder", "and": "bitwise_and", "iand": "bitwise_and",
    "or": "bitwise_or", "ior": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not", "rand": "bitwise_and",
    "ror": "bitwise_or",
}  # fmt: skip
