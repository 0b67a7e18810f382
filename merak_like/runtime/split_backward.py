"""The backward in two halves: B gives the gradients of the inputs, W those of the weights, later (Qi et al., arXiv
2401.10241).

The halves come apart where a weight meets an activation: a function of ``ROWS`` that is called with a parameter hands
its input and output gradient to ``PutOff`` instead of multiplying them. Autograd's graph is left alone, so whatever
else the model does works as ever; the weight's gradient goes through autograd's own accumulation, with all hooks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Operands(NamedTuple):
    """A call taken apart."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    options: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Row:
    """How one function is computed and differentiated; each gets the options of the call last."""

    operands: Callable[..., Operands | None]
    """The call's arguments; None if this call cannot be split."""
    forward: Callable[..., Tensor]
    """(x, weight, bias, *options) to the output."""
    input_gradient: Callable[..., Tensor | None]
    """(output's gradient, weight, x, *options) to the gradient of x."""
    weight_gradient: Callable[..., Tensor]
    """(output's gradient, x, weight, *options) to the gradient of the weight."""
    bias_gradient: Callable[[Tensor], Tensor] = lambda g: g.flatten(0, -2).sum(0)
    autocast: bool = True
    """Whether autocast runs it in the lower precision."""


class PutOff:
    """The weight gradients of one micro-batch on one stage that wait for their W."""

    def __init__(self, pending: Counter[int]) -> None:
        """``pending`` counts, for each parameter by ``id``, the gradients that wait on this rank."""
        self._pending = pending
        self._items: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []
        self.held: list[Tensor] = []
        """What waits: inputs and output gradients."""

    def add(self, parameter: Any, gradient: Callable[[], Tensor]) -> None:
        """Put off one gradient."""
        self._items.append((parameter, gradient))
        self._pending[id(parameter)] += 1

    def run(self) -> None:
        """Compute them; those of a parameter that is used twice come as one sum, as in a whole backward."""
        sums: dict[int, Tensor] = {}
        for parameter, gradient in self._items:
            made = gradient().to(parameter.dtype)
            key = id(parameter)
            sums[key] = sums[key] + made if key in sums else made
            self._pending[key] -= 1
        parameters = {id(parameter): parameter for parameter, _ in self._items}
        self._items.clear()
        self.held.clear()
        if parameters:
            torch.autograd.backward(list(parameters.values()), [sums[key] for key in parameters])


class SplitBackward(TorchFunctionMode):
    """While it is on, the functions of ``ROWS`` put off the gradients of their parameters."""

    def __init__(self, later: PutOff) -> None:
        super().__init__()
        self._later = later

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        row = ROWS.get(func)
        if row is not None and torch.is_grad_enabled():
            found = row.operands(*args, **(kwargs or {}))
            if found is not None and isinstance(found.weight, nn.Parameter) and found.weight.requires_grad:
                x, weight, bias, options = found
                if row.autocast:
                    x, bias = _cast(x), _cast(bias)
                # the weight goes in a tuple: as an argument of its own its hooks would run in B, without a gradient
                return _Split.apply(row, self._later, (weight, *options), _anchor(x), x, bias)
        return func(*args, **(kwargs or {}))


def _cast(tensor: Any) -> Any:
    """As autocast would before it runs a matrix product; the cast is part of the graph."""
    if tensor is None:
        return None
    kind = tensor.device.type
    lower = torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if lower else tensor


def _anchor(x: Tensor) -> Tensor:
    """Makes the output require a gradient where the input needs none."""
    return torch.empty(0, device=x.device, requires_grad=True)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        row, later, (weight, *options), _, x, bias = args
        ctx.save_for_backward(x)
        ctx.row, ctx.later, ctx.options, ctx.weight = row, later, options, weight
        made = row.forward(x, _like(weight, x), bias, *options)
        return made.detach()  # no view (linear of three dimensions makes one): the model may go on in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,), row, options, weight = ctx.saved_tensors, ctx.row, ctx.options, ctx.weight
        g = _own(gradients[0])
        ctx.later.add(weight, lambda: row.weight_gradient(g, x, _like(weight, x), *options))
        ctx.later.held += (x, g)
        _, _, _, _, needs_x, needs_bias = ctx.needs_input_grad
        of_x = row.input_gradient(g, _like(weight, x), x, *options) if needs_x else None
        return None, None, None, None, of_x, row.bias_gradient(g) if needs_bias else None


def _own(tensor: Tensor) -> Tensor:
    """The tensor without the larger one it is a part of: what waits for a W keeps no more than it needs."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _like(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the precision that the product is computed in."""
    return weight.detach().to(x.dtype) if x.is_floating_point() else weight.detach()


# --- the rows ----------------------------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return Operands(input, weight, bias) if input.ndim > 1 else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    plain = beta == 1 and alpha == 1 and out is None and input.shape == mat2.shape[1:]
    return Operands(mat1, mat2, input) if plain else None


def _matmul(input: Tensor, other: Tensor, *, out: Any = None) -> Any:
    return Operands(input, other, None) if other.ndim == 2 and input.ndim > 1 and out is None else None


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if max_norm is not None or sparse:
        return None
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    return Operands(input, weight, None, (padding, scale_grad_by_freq))


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Any:  # fmt: skip
    return None if isinstance(padding, str) else _convolution(input, weight, bias, stride, padding, dilation, groups)


def _conv_transpose(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    return _convolution(input, weight, bias, stride, padding, dilation, groups, True, output_padding)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
    transposed: bool = False, output_padding: Any = 0,
) -> Operands | None:  # fmt: skip
    """In the words of torch.convolution; None for an input without a batch dimension."""
    spaces = weight.ndim - 2

    def each(size: Any) -> tuple[int, ...]:
        return tuple(size) * (spaces // len(size)) if isinstance(size, Sequence) else (size,) * spaces

    options = (each(stride), each(padding), each(dilation), transposed, each(output_padding), groups)
    return Operands(x, weight, bias, options) if x.ndim == weight.ndim else None


def _convolution_gradient(g: Tensor, x: Tensor, weight: Tensor, options: Sequence[Any], which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(g, x, weight, None, *options, mask)[which]


CONV, CONV_TRANSPOSE = (
    Row(
        operands,
        forward=torch.convolution,
        input_gradient=lambda g, w, x, *o: _convolution_gradient(g, x, w, o, 0),
        weight_gradient=lambda g, x, w, *o: _convolution_gradient(g, x, w, o, 1),
        bias_gradient=lambda g: g.sum([0, *range(2, g.ndim)]),
    )
    for operands in (_conv, _conv_transpose)
)
MATMUL = Row(
    _matmul,
    forward=lambda x, w, b: torch.matmul(x, w),
    input_gradient=lambda g, w, x: torch.matmul(g, w.t()),
    weight_gradient=lambda g, x, w: x.flatten(0, -2).t() @ g.flatten(0, -2),
)

ROWS: dict[Any, Row] = {
    F.linear: Row(
        _linear,
        forward=F.linear,
        input_gradient=lambda g, w, x: torch.matmul(g, w),
        weight_gradient=lambda g, x, w: g.flatten(0, -2).t() @ x.flatten(0, -2),
    ),
    torch.addmm: Row(
        _addmm,
        forward=lambda x, w, b: torch.addmm(b, x, w),
        input_gradient=MATMUL.input_gradient,
        weight_gradient=MATMUL.weight_gradient,
    ),
    torch.matmul: MATMUL,
    torch.Tensor.matmul: MATMUL,
    torch.Tensor.__matmul__: MATMUL,
    F.embedding: Row(
        _embedding,
        forward=lambda ids, w, b, padding, by_frequency: F.embedding(ids, w),
        input_gradient=lambda *_: None,
        weight_gradient=lambda g, ids, w, padding, by_frequency: torch.ops.aten.embedding_dense_backward(
            g, ids, len(w), padding, by_frequency
        ),
        autocast=False,
    ),
    F.conv1d: CONV,
    F.conv2d: CONV,
    F.conv3d: CONV,
    F.conv_transpose1d: CONV_TRANSPOSE,
    F.conv_transpose2d: CONV_TRANSPOSE,
    F.conv_transpose3d: CONV_TRANSPOSE,
}
"""Functions whose weight gradient can wait. Any other function computes it in B, which is as right, only earlier. Add a
row for your own function if it goes through ``torch.overrides``."""
