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
from torch import Tensor, nn
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
        probe = copy.deepcopy(module)
    except Exception:  # what cannot be copied cannot be tried
        return None
    before = repr(_own(probe))
    found = _formula(probe.forward)
    if found is None or repr(_own(probe)) != before:  # one that counts its calls, say, must go on counting them
        return None
    return FORMS.get(_text(found))


class _NoAlgebra(Exception):
    pass


class _Term:
    """Stands for a tensor: what is done with it is written down as a sum. Nothing of torch is replaced meanwhile."""

    def __init__(self, value: Sum) -> None:
        self.value = value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Term:
        return _done(func.__name__, args, kwargs)

    def __getattr__(self, name: str) -> Callable[..., _Term]:
        if name not in RULES and name not in FUNCTIONS:
            raise _NoAlgebra  # a question about the tensor, on which the module's Python may depend
        return lambda *args, **kwargs: _done(name, (self, *args), kwargs)

    def __add__(self, other: Any) -> _Term:
        return _done("add", (self, other))

    def __sub__(self, other: Any) -> _Term:
        return _done("sub", (self, other))

    def __rsub__(self, other: Any) -> _Term:
        return _done("sub", (other, self))

    def __mul__(self, other: Any) -> _Term:
        return _done("mul", (self, other))

    def __truediv__(self, other: Any) -> _Term:
        return _done("div", (self, other))

    def __pow__(self, other: Any) -> _Term:
        return _done("pow", (self, other))

    def __neg__(self) -> _Term:
        return _done("neg", (self,))

    def __bool__(self) -> bool:
        raise _NoAlgebra

    def __eq__(self, other: object) -> bool:
        raise _NoAlgebra

    def _in_place(self, other: Any) -> _Term:
        raise _NoAlgebra  # a kernel would leave the argument as it was

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = _in_place
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    __radd__, __rmul__ = __add__, __mul__


def _formula(forward: Callable[..., Any]) -> Sum | None:
    """What a forward computes from its one input; None for anything but algebra."""
    try:
        made = forward(_Term({("x",): 1.0}))
    except Exception:  # any Python may be in there; what cannot be followed stays as it is
        return None
    return made.value if isinstance(made, _Term) else None


def _done(name: str, args: Any, kwargs: Any = None) -> _Term:
    values = [arg.value if isinstance(arg, _Term) else arg for arg in args]
    if kwargs or not all(isinstance(value, (dict, int, float)) for value in values):
        raise _NoAlgebra
    if name in FUNCTIONS and len(values) == 1:
        return _Term({(f"{name}({_text(values[0])})",): 1.0})
    made = RULES[name](*values) if name in RULES else None
    if made is None or len(made) > LARGEST:
        raise _NoAlgebra
    return _Term(made)


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
    found = _formula(formula)
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
