"""Operations element by element, with broadcasting, and tensors made from nothing."""

from __future__ import annotations

from collections.abc import Sequence

from merak_like.partitioner.tensor_parallel.axes import Dim
from merak_like.partitioner.tensor_parallel.call import Call, Operand
from merak_like.partitioner.tensor_parallel.rules.table import register

UNARY = """abs exp expm1 log log1p log2 log10 sqrt rsqrt square sin cos tan tanh sigmoid relu relu6 silu gelu mish elu
    selu celu leaky_relu softplus softsign hardswish hardsigmoid hardtanh log_sigmoid logsigmoid erf erfinv neg
    reciprocal floor ceil round trunc sign positive clamp clip clamp_min clamp_max nan_to_num isnan isinf isfinite
    logical_not bitwise_not threshold logit erfc lgamma digamma hardshrink softshrink tanhshrink frac
    float double half bfloat16 long int bool short type to contiguous clone detach dropout alpha_dropout
    requires_grad alias cpu cuda type_as dropout1d relu_ angle conj real imag cfloat"""
BINARY = """add sub mul div rsub rdiv rpow pow multiply divide subtract true_divide floor_divide remainder fmod maximum
    minimum fmax fmin atan2 logaddexp eq ne lt le gt ge greater less greater_equal less_equal not_equal equal
    logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor where masked_fill addcmul addcdiv lerp
    copy polar complex isclose float_power xlogy prelu_elementwise"""
LINEAR = {
    **dict.fromkeys(
        "neg float double half bfloat16 to contiguous clone type_as dropout alias type cfloat".split(), "sum"
    ),
    **dict.fromkeys("add sub rsub subtract".split(), "sum"),
    **dict.fromkeys("mul multiply".split(), "product"),
}
NUMERATOR = frozenset("div divide true_divide".split())
ONLY_FIRST = frozenset("to type_as type".split())
"""The second tensor gives only its dtype."""
LIKE = """zeros_like ones_like empty_like full_like rand_like randn_like randint_like bernoulli uniform normal
    exponential zero fill"""
CREATED = "zeros ones empty full new_zeros new_ones new_empty new_full"
PINNED = "arange linspace rand randn randint randperm eye tensor scalar_tensor as_tensor one_hot bartlett_window"


@register(*UNARY.split(), *BINARY.split())
def elementwise(call: Call) -> None:
    """Dimensions align from the right; those of size 1 are stretched."""
    word = call.step.word
    if not call.operands:
        pinned(call)
        return
    if word in ONLY_FIRST or (word in UNARY_WORDS and (0,) in call.operands):
        call.operands = {(0,): call.first}
    call.linear = LINEAR.get(word, "")
    if word in NUMERATOR and (1,) not in call.operands:
        call.linear = "sum"
    elif call.linear == "sum" and len(call.operands) == 1 and len(call.step.args) > 1 and word in BINARY_WORDS:
        call.linear = ""  # a number is added: once, not by every rank
    shape = call.shape
    if shape is None:
        shape = tuple(call.size(dim) for dim in call.first.dims)
    call.out(broadcast(call, list(call.operands.values()), shape, bool(call.step.mutates)))


UNARY_WORDS, BINARY_WORDS = frozenset(UNARY.split()), frozenset(BINARY.split())


def broadcast(call: Call, operands: Sequence[Operand], shape: Sequence[int], in_place: bool = False) -> list[Dim]:
    """The dimensions that operands have together; side operands follow the others."""
    leaders = [operand for operand in operands if not operand.side]
    if in_place and operands[0] not in leaders:
        leaders.insert(0, operands[0])
    leaders = leaders or [operand for operand in operands if operand.grad][:1] or [operands[0]]
    out: list[Dim] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        here = [o.dims[-back] for o in leaders if len(o.dims) >= back and call.size(o.dims[-back]) == size]
        dim = here[0] if here else call.axes.fresh(size)
        for other in here[1:]:
            call.axes.unify(dim, other)
        out.append(dim)
    for operand in operands:
        if not any(operand is leader for leader in leaders):
            rank = len(operand.dims)
            wanted = out[len(out) - rank :] if rank else []
            operand.dims = tuple(
                () if call.size(own) == 1 else dim for own, dim in zip(operand.dims, wanted, strict=True)
            )
            operand.soft = True
    return out


@register(*LIKE.split())
def like(call: Call) -> None:
    """A tensor of the same dimensions, or one filled in place."""
    call.zero = call.step.word in ("zeros_like", "zero")
    call.operands = {(0,): call.first}
    if len(call.first.dims) != len(call.shape or call.first.dims):
        pinned(call)
        return
    call.out(call.first.dims)


@register(*CREATED.split())
def created(call: Call) -> None:
    """A constant tensor: it may as well be made smaller."""
    method = call.step.word.startswith("new_")
    call.zero = call.step.word in ("zeros", "new_zeros")
    call.operands.clear()
    assert call.shape is not None
    dims = call.fresh(call.shape)
    path, _ = call.varargs(int(method), "size")
    if call.step.word in ("full", "new_full"):
        path = call.path(int(method), "size")
    for index, dim in enumerate(dims):
        call.sizes.append(((*path, index) if path else (index + int(method),), dim))
    call.out(dims)


@register(*PINNED.split())
def pinned(call: Call) -> None:
    """A tensor whose elements are told apart by their place."""
    call.keep_whole(f"{call.step.word} needs it whole")


@register("expand_as")
def expand_as(call: Call) -> None:
    """Stretched to another tensor's dimensions, which follows by its shape only."""
    assert call.shape is not None
    other = call.operands[1,]
    call.linear = "sum"
    call.operands = {(0,): call.first, (1,): other}
    dims: list[Dim] = []
    own = ((),) * (len(call.shape) - len(call.first.dims)) + call.first.dims
    for mine, theirs in zip(own, other.dims, strict=True):
        if call.size(mine) == call.size(theirs):
            call.axes.unify(mine, theirs)
        dims.append(theirs)
    call.out(dims)
