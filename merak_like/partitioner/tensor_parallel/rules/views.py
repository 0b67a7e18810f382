"""Operations that only rearrange elements: views, permutations, repetitions, joining and taking apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from merak_like.partitioner.tensor_parallel.axes import Dim
from merak_like.partitioner.tensor_parallel.call import Call
from merak_like.partitioner.tensor_parallel.rules.elementwise import broadcast
from merak_like.partitioner.tensor_parallel.rules.table import register


@register("view", "reshape", "_unsafe_view")
def view(call: Call) -> None:
    """Row-major order stays: the flattened dimensions are the same."""
    assert call.shape is not None
    call.linear = "sum"
    path, given = call.varargs(1, "shape" if "shape" in call.step.kwargs else "size")
    dims = _reshaped(call, call.shape)
    if len(given) == len(dims) and all(isinstance(size, int) for size in given):
        for index, (dim, size) in enumerate(zip(dims, given, strict=True)):
            if size != -1:
                call.sizes.append(((*path, index) if path else (index + 1,), dim))
    call.out(dims)


@register("flatten", "unflatten", "view_as", "reshape_as", "squeeze")
def reshaped(call: Call) -> None:
    """A view whose sizes follow from the argument's."""
    assert call.shape is not None
    call.linear = "sum"
    dims = _reshaped(call, call.shape)
    if call.step.word == "unflatten":
        at, path = call.axis(call.arg(1, "dim")), call.path(2, "sizes")
        for index, size in enumerate(call.arg(2, "sizes")):
            if size != -1:
                call.sizes.append(((*path, index), dims[at + index]))
    elif call.step.word.endswith("_as"):
        for mine, theirs in zip(dims, call.operands[1,].dims, strict=True):
            call.axes.unify(mine, theirs)
    call.out(dims)


def _reshaped(call: Call, shape: Sequence[int]) -> tuple[Dim, ...]:
    own = call.first.dims
    if tuple(call.size(dim) for dim in own) == tuple(shape):
        return own
    dims = call.fresh(shape)
    call.axes.unify(chain(*own), chain(*dims))
    return dims


@register("transpose", "swapaxes", "swapdims", "moveaxis", "permute", "t", "getattr T", "getattr mT", "unsqueeze")
def permuted(call: Call) -> None:
    """Dimensions change places."""
    dims, word = list(call.first.dims), call.step.word
    call.linear = "sum"
    if word == "unsqueeze":
        dims.insert(call.axis(call.arg(1, "dim"), len(dims) + 1), ())
    elif word == "permute":
        dims = [dims[call.axis(i)] for i in call.varargs(1, "dims")[1]]
    elif word in ("t", "getattr T"):
        dims.reverse()
    elif word == "moveaxis":
        one, two = call.axis(call.arg(1, "source")), call.axis(call.arg(2, "destination"))
        dims.insert(two, dims.pop(one))
    else:
        mine = (-2, -1) if word == "getattr mT" else (call.arg(1, "dim0"), call.arg(2, "dim1"))
        one, two = (call.axis(i) for i in mine)
        dims[one], dims[two] = dims[two], dims[one]
    call.out(dims)


@register("expand", "broadcast_to")
def expand(call: Call) -> None:
    """Dimensions of size 1 are stretched to new axes."""
    assert call.shape is not None
    call.linear = "sum"
    own = ((),) * (len(call.shape) - len(call.first.dims)) + call.first.dims
    dims = [dim if call.size(dim) == size else call.axes.fresh(size) for dim, size in zip(own, call.shape, strict=True)]
    path, given = call.varargs(1, "size")
    for index, (dim, size) in enumerate(zip(dims, given, strict=True)):
        if size != -1:
            call.sizes.append(((*path, index) if path else (index + 1,), dim))
    call.out(dims)


@register("repeat", "tile")
def repeat(call: Call) -> None:
    """The whole is repeated: the count is the slower axis."""
    path, counts = call.varargs(1, "repeats")
    call.linear = "sum"
    own = ((),) * (len(counts) - len(call.first.dims)) + call.first.dims
    dims: list[Dim] = []
    for index, (dim, count) in enumerate(zip(own, counts, strict=True)):
        times = call.axes.fresh(count)
        call.sizes.append(((*path, index) if path else (index + 1,), times))
        dims.append(times + dim)
    call.out(dims)


@register("repeat_interleave")
def repeat_interleave(call: Call) -> None:
    """Each element is repeated: the count is the faster axis."""
    count, dim = call.arg(1, "repeats"), call.arg(2, "dim")
    call.linear = "sum"
    if not isinstance(count, int) or dim is None:
        call.pin(*call.first.dims)
        call.out(call.fresh(call.shape or (), "repeat_interleave makes it whole"))
        return
    dims = list(call.first.dims)
    times = call.axes.fresh(count)
    call.sizes.append((call.path(1, "repeats"), times))
    dims[call.axis(dim)] = dims[call.axis(dim)] + times
    if call.arg(3, "output_size") is not None:
        call.sizes.append((call.path(3, "output_size"), dims[call.axis(dim)]))
    call.out(dims)


@register("cat", "concat", "concatenate")
def cat(call: Call) -> None:
    """One dimension becomes a row of segments, the others are the same."""
    assert call.shape is not None
    # torch lets an empty vector stand among tensors of any rank
    parts = [part for part in call.within(0, "tensors") if len(part.dims) == len(call.shape)]
    at = call.arg(1, "dim", 0) % len(call.shape)
    call.linear = "sum"
    leaders = [part for part in parts if not part.side] or parts[:1]
    dims = list(leaders[0].dims)
    row = call.axes.row(part.dims[at] for part in parts)
    for part in parts:
        wanted = [*dims[:at], part.dims[at], *dims[at + 1 :]]
        if part is not leaders[0]:
            call.follow(part, [() if call.size(o) == 1 else w for o, w in zip(part.dims, wanted, strict=True)])
    dims[at] = row
    call.out(dims)


@register("stack")
def stack(call: Call) -> None:
    """A new dimension, whole."""
    assert call.shape is not None
    at = call.arg(1, "dim", 0) % len(call.shape)
    call.linear = "sum"
    parts = call.within(0, "tensors")
    dims = broadcast(call, parts, [*call.shape[:at], *call.shape[at + 1 :]])
    dims.insert(at, call.axes.fresh(call.shape[at], "stack makes it whole"))
    call.out(dims)


@register("chunk", "split", "tensor_split", "split_with_sizes", "unbind")
def apart(call: Call) -> None:
    """Equal parts: a whole axis over the part's axis, as in fused projections. Unequal parts: segments."""
    word, own = call.step.word, call.first.dims
    call.linear = "sum"
    at = call.axis(call.arg(1, "dim", 0) if word == "unbind" else call.arg(2, "dim", 0))
    total = call.size(own[at])
    if word == "unbind":
        call.pin(own[at], why="unbind takes it apart")
        for _ in range(total):
            call.out([*own[:at], *own[at + 1 :]])
        return
    given, path = call.arg(1, "chunks"), call.path(1, "chunks")
    if not call.has(1, "chunks"):
        key = next(key for key in ("split_size", "split_size_or_sections", "split_sizes") if key in call.step.kwargs)
        given, path = call.step.kwargs[key], (key,)
    listed = isinstance(given, (tuple, list))
    if listed:
        sizes = list(given)
    else:
        step = -(-total // given) if word in ("chunk", "tensor_split") else given
        sizes = [min(step, total - start) for start in range(0, total, step)]
    for index, dim in enumerate(take_apart(call, own[at], sizes)):
        if listed:
            call.sizes.append(((*path, index), dim))
        elif word == "split" and index == 0:
            call.sizes.append((path, dim))
        call.out([*own[:at], dim, *own[at + 1 :]])


def take_apart(call: Call, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """A dimension in consecutive parts."""
    axes, count = call.axes, len(sizes)
    dim = axes.resolve(dim)
    segments = axes.segments(dim[0]) if len(dim) == 1 else ()
    if count > 1 and len(set(sizes)) == 1 and tuple(map(axes.size, segments)) != tuple(sizes) and not segments:
        part = axes.fresh(sizes[0])
        axes.unify(dim, (*axes.fresh(count, f"{call.step.word} takes it apart"), *part))
        return [part] * count
    starts = [sum(sizes[:i]) for i in range(count)]
    why = f"{call.step.word} does not follow its segments"
    return [axes.part(dim, start, start + size, why) for start, size in zip(starts, sizes, strict=True)]
