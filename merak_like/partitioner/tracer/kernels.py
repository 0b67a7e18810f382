"""Activations that a model spells out in several operations, and the one kernel of torch that computes the same.

A spelled-out GELU takes eight passes over the largest activation of a block and saves most of them; torch's kernel
takes one and saves its input. A module is believed to be such an activation only if its own code is, as algebra: sums
of products of the input and of functions of such sums, compared with the textbook forms coefficient by coefficient.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from math import pi, sqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

Kernel = Callable[[Tensor], Tensor]
Sum = dict[tuple[str, ...], float]
"""Coefficients by product; a product is its sorted factors: ``x``, or a function of a sum as text."""

LARGEST = 16
"""Products in a sum that is still multiplied out."""


def kernels(model: nn.Module) -> Mapping[str, Kernel]:
    """Path to kernel, for every childless module without tensors whose forward is a known activation."""
    known: dict[Any, Kernel | None] = {}
    found: dict[str, Kernel] = {}
    for path, module in model.named_modules():
        if not path or not _plain(module):
            continue
        key = type(module), module.training, tuple(sorted((k, repr(v)) for k, v in _own(module).items()))
        if key not in known:
            known[key] = _kernel(module)
        if (kernel := known[key]) is not None:
            found[path] = kernel
    return found


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_ALL}


_OF_ALL = frozenset(vars(nn.Module()))


def _plain(module: nn.Module) -> bool:
    """Whether the call of the module is its forward alone, on no tensors but its arguments."""
    inside = (module._modules, module._parameters, module._buffers)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not type(module).__module__.startswith("torch.") and not any((*inside, *hooks))


def _kernel(module: nn.Module) -> Kernel | None:
    try:
        graph = fx.symbolic_trace(copy.copy(module)).graph
    except Exception:  # any Python may be in there; what cannot be followed stays as it is
        return None
    found = _form(graph)
    return None if found is None else FORMS.get(_text(found))


def _form(graph: fx.Graph) -> Sum | None:
    """What a graph computes from its one input; None for anything but algebra."""
    values: dict[fx.Node, Sum] = {}
    for node in graph.nodes:
        if node.op == "output":
            result = node.args[0]
            return values.get(result) if isinstance(result, fx.Node) else None
        if node.op == "placeholder":
            made = {("x",): 1.0} if not values and not node.args else None
        elif node.op in ("call_function", "call_method") and not node.kwargs:
            made = _apply(node, [values[a] if isinstance(a, fx.Node) else a for a in node.args])
        else:
            made = None
        if made is None or len(made) > LARGEST:
            return None
        values[node] = made
    return None


def _apply(node: fx.Node, args: list[Any]) -> Sum | None:
    name = node.target if isinstance(node.target, str) else node.target.__name__  # pyright: ignore
    if name in FUNCTIONS:
        return {(f"{name}({_text(args[0])})",): 1.0} if len(args) == 1 else None
    if not all(isinstance(arg, (dict, int, float)) for arg in args):
        return None
    return RULES[name](*args) if name in RULES else None


def _sum(value: Sum | float) -> Sum:
    return value if isinstance(value, dict) else {(): float(value)}


def _add(a: Sum | float, b: Sum | float) -> Sum:
    total: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for product, coefficient in (*_sum(a).items(), *_sum(b).items()):
        total[product] += coefficient
    return dict(total)


def _times(a: Sum | float, b: Sum | float) -> Sum:
    total: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for left, first in _sum(a).items():
        for right, second in _sum(b).items():
            total[tuple(sorted(left + right))] += first * second
    return dict(total)


def _over(a: Sum | float, b: Sum | float) -> Sum | None:
    return _times(a, 1.0 / b) if isinstance(b, (int, float)) and b else None


def _power(a: Sum | float, exponent: Sum | float) -> Sum | None:
    if not isinstance(exponent, (int, float)) or exponent not in (1, 2, 3):
        return None
    result = _sum(a)
    for _ in range(int(exponent) - 1):
        result = _times(result, a)
    return result


RULES: Mapping[str, Callable[..., Sum | None]] = MappingProxyType(
    {
        "add": _add,
        "sub": lambda a, b: _add(a, _times(b, -1.0)),
        "mul": _times,
        "truediv": _over,
        "div": _over,
        "pow": _power,
        "square": lambda a: _times(a, a),
        "neg": lambda a: _times(a, -1.0),
    }
)
FUNCTIONS = frozenset({"tanh", "erf", "sigmoid"})


def _text(value: Sum) -> str:
    """A sum as text, its coefficients to ten digits: so many does a constant have that somebody wrote out."""
    return " + ".join(f"{c:.10g}*{'*'.join(product)}" for product, c in sorted(value.items()) if c)


def _textbook(formula: Callable[[Any], Any]) -> str:
    class Formula(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return formula(x)

    found = _form(fx.symbolic_trace(Formula()).graph)
    assert found is not None
    return _text(found)


FORMS: Mapping[str, Kernel] = MappingProxyType(
    {
        _textbook(formula): kernel
        for formula, kernel in (
            # Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2
            (
                lambda x: 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))),
                partial(F.gelu, approximate="tanh"),
            ),
            (lambda x: 0.5 * x * (1 + torch.erf(x / sqrt(2))), F.gelu),
            (lambda x: x * torch.sigmoid(x), F.silu),
        )
    }
)
