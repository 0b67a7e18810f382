"""Operations that need some dimensions whole and leave the others alone."""

from __future__ import annotations

from merak_like.partitioner.tensor_parallel.call import Call
from merak_like.partitioner.tensor_parallel.rules.contract import batches
from merak_like.partitioner.tensor_parallel.rules.elementwise import elementwise
from merak_like.partitioner.tensor_parallel.rules.table import register


@register("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "normalize",
          "sort", "argsort", "flip", "roll", "diff", "glu")  # fmt: skip
def along(call: Call) -> None:
    """The same dimensions, some of them whole."""
    word, rank = call.step.word, len(call.first.dims)
    place = {"normalize": 2, "roll": 2, "flip": 1, "diff": 2}.get(word, 1)
    key = "dims" if word in ("flip", "roll") else "dim"
    if word == "flip":
        at = {call.axis(i) for i in call.varargs(1, "dims")[1]}
    else:
        default = {"normalize": 1, "roll": range(rank), "diff": -1, "sort": -1, "argsort": -1, "glu": -1}.get(word)
        given = call.arg(place, key)
        given = default if given is None else given
        assert given is not None, f"{word} without a dimension"
        at = {call.axis(i) for i in ((given,) if isinstance(given, int) else given)}
    for i in at:
        call.pin(call.first.dims[i])
    for operand in list(call.operands.values())[1:]:
        call.pin(*operand.dims)
    for _ in range(2 if word in ("sort", "cummax", "cummin") else 1):
        dims = list(call.first.dims)
        if call.shape is not None:
            sizes = zip(dims, call.shape, strict=True)
            dims = [d if call.size(d) == n else call.axes.fresh(n, f"{word} makes it whole") for d, n in sizes]
        call.out(dims)


@register("amax", "amin", "max", "min", "argmax", "argmin", "std", "var", "prod", "any", "all", "norm",
          "linalg_vector_norm", "linalg_norm", "logsumexp", "median", "count_nonzero", "kthvalue", "mode", "aminmax",
          "std_mean", "var_mean", "nanmean")  # fmt: skip
def reduced(call: Call) -> None:
    """Dimensions that disappear are needed whole."""
    word, dims = call.step.word, call.first.dims
    if word in ("max", "min") and (1,) in call.operands:
        elementwise(call)
        return
    place = 2 if word in ("norm", "linalg_vector_norm", "linalg_norm", "kthvalue") else 1
    given = call.arg(place, "dim")
    if given is None:
        given = call.arg(place, "axis")
    if given is None or isinstance(given, bool):
        given = range(len(dims))
    at = {call.axis(i) for i in ((given,) if isinstance(given, int) else given)}
    for i in at:
        call.pin(dims[i])
    left = [dim for i, dim in enumerate(dims) if i not in at]
    kept = [() if i in at else dim for i, dim in enumerate(dims)]
    if call.shape is not None:
        call.out(left if len(left) == len(call.shape) else kept)
        return
    keep = bool(call.arg(place + 1, "keepdim", False))
    for _ in range(2):
        call.out(kept if keep else left)


@register("layer_norm", "rms_norm")
def layer_norm(call: Call) -> None:
    """Normalized dimensions with their weight and bias; where they are sharded, the sums over them are reduced."""
    shape, path = call.arg(1, "normalized_shape"), call.path(1, "normalized_shape")
    rank = len(shape) if isinstance(shape, (tuple, list)) else 1
    last = call.first.dims[-rank:]
    for operand in list(call.operands.values())[1:]:
        for own, dim in zip(operand.dims, last, strict=True):
            call.axes.unify(own, dim)
    call.contracted.extend(last)
    call.sizes.extend(((*path, i), dim) for i, dim in enumerate(last))
    call.form = call.step.word
    call.out(call.first.dims)


@register("batch_norm", "instance_norm")
def batch_norm(call: Call) -> None:
    """Each channel for itself; statistics are over the other dimensions."""
    dims = call.first.dims
    for index, dim in enumerate(dims):
        if index != 1:
            call.pin(dim, why="batch_norm is over it")
    for operand in list(call.operands.values())[1:]:
        call.axes.unify(operand.dims[0], dims[1])
    call.out(dims)


@register("group_norm")
def group_norm(call: Call) -> None:
    """Channels are (groups, channels of a group); a group is whole."""
    dims, groups = call.first.dims, call.arg(1, "num_groups")
    number, inside = call.axes.fresh(groups), call.axes.fresh(call.size(dims[1]) // groups)
    call.axes.unify(dims[1], number + inside)
    call.pin(inside, *dims[2:])
    for operand in list(call.operands.values())[1:]:
        call.axes.unify(operand.dims[0], dims[1])
    call.sizes.append((call.path(1, "num_groups"), number))
    call.out(dims)


@register("triu", "tril")
def triangle(call: Call) -> None:
    """The last two dimensions are told apart by place."""
    call.linear = "sum"
    call.pin(*call.first.dims[-2:])
    call.out(call.first.dims)


@register("pad")
def pad(call: Call) -> None:
    """Padded dimensions are whole."""
    assert call.shape is not None
    pads, dims = call.arg(1, "pad"), list(call.first.dims)
    for back in range(len(pads) // 2):
        if any(pads[2 * back : 2 * back + 2]):
            at = len(dims) - 1 - back
            call.pin(dims[at])
            dims[at] = call.axes.fresh(call.shape[at], "pad makes it whole")
    call.out(dims)


@register("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv(call: Call) -> None:
    """Channels are contracted; in groups, each group for itself. Places are whole."""
    assert call.shape is not None
    x, weight, bias = call.first, call.operands[call.path(1, "weight")], call.operand(2, "bias")
    turned = "transpose" in call.step.word
    groups = call.arg(6, "groups", 1)
    spatial = len(weight.dims) - 2
    lead = len(x.dims) - spatial - 1
    channels = x.dims[lead]
    call.pin(*x.dims[lead + 1 :], *weight.dims[2:], why="a convolution moves along it")
    if turned:
        call.pin(channels, *weight.dims[:2])
        out = call.axes.fresh(call.shape[lead], "a transposed convolution makes it whole")
    elif groups == 1:
        call.axes.unify(channels, weight.dims[1])
        call.contracted.append(channels)
        out = weight.dims[0]
    else:
        group = call.axes.fresh(groups)
        call.axes.unify(channels, group + weight.dims[1])
        call.axes.unify(weight.dims[0], group + call.axes.fresh(call.size(weight.dims[0]) // groups))
        call.contracted.append(weight.dims[1])
        call.sizes.append((call.path(6, "groups"), group))
        out = weight.dims[0]
    if bias is not None:
        if not turned:
            call.axes.unify(bias.dims[0], weight.dims[0])
        call.addends = (call.path(2, "bias"),)
    call.linear = "product"
    call.out([*x.dims[:lead], out, *call.fresh(call.shape[lead + 1 :], "a convolution moves along it")])


@register("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
          "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate",
          "upsample")  # fmt: skip
def pool(call: Call) -> None:
    """Places are whole, samples and channels pass."""
    assert call.shape is not None
    word, dims = call.step.word, call.first.dims
    spatial = int(word[-2]) if word.endswith("d") else len(dims) - 2
    call.pin(*dims[-spatial:])
    call.out([*dims[:-spatial], *call.fresh(call.shape[-spatial:], f"{word} makes it whole")])


@register("linalg_solve_triangular", "linalg_inv", "inverse", "linalg_solve", "cholesky", "linalg_cholesky")
def solve(call: Call) -> None:
    """Matrices are whole; batches pass, and so do the columns of a right-hand side."""
    matrix, batch = call.first, call.first.dims[:-2]
    call.pin(*matrix.dims[-2:])
    if (1,) not in call.operands:
        call.out(matrix.dims)
        return
    right = call.operands[1,]
    left = call.arg(3, "left", True)
    call.pin(right.dims[-2 if left else -1])
    out = batches(call, batch, right.dims[:-2])
    call.out([*out, *right.dims[-2:]])


@register("view_as_complex", "view_as_real")
def complex_view(call: Call) -> None:
    """The last dimension of two is real and imaginary."""
    call.linear = "sum"
    if call.step.word == "view_as_real":
        call.out([*call.first.dims, call.axes.fresh(2, "real and imaginary")])
    else:
        call.pin(call.first.dims[-1])
        call.out(call.first.dims[:-1])


@register("check_value", "check_shape")
def check(call: Call) -> None:
    """A question about the tensor is asked of the whole tensor."""
    for operand in call.operands.values():
        call.pin(*operand.dims, why="the model's Python asks about it")


@register("unfold")
def unfold(call: Call) -> None:
    """Windows: of an image (channels pass, the window is the faster axis), or of one dimension."""
    assert call.shape is not None
    dims, why = call.first.dims, "windows move along it"
    if isinstance(call.step.target, str):
        at = call.axis(call.arg(1, "dimension"))
        call.pin(dims[at], why=why)
        call.out([*dims[:at], *call.fresh((call.shape[at],), why), *dims[at + 1 :], *call.fresh(call.shape[-1:], why)])
        return
    call.pin(*dims[-2:], why=why)
    window = call.axes.fresh(call.shape[-2] // call.size(dims[-3]), why)
    call.out([*dims[:-3], dims[-3] + window, *call.fresh(call.shape[-1:], why)])
