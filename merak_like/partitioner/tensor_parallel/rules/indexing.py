"""Operations that pick or put elements by place."""

from __future__ import annotations

from typing import Any

from merak_like.partitioner.tensor_parallel.axes import Dim, Dims
from merak_like.partitioner.tensor_parallel.call import Call, Operand, Path
from merak_like.partitioner.tensor_parallel.rules.table import register
from merak_like.partitioner.tracer.fine import Name


@register("getitem")
def getitem(call: Call) -> None:
    """``x[...]``: whole dimensions pass, ranges are segments, tensors pick from whole dimensions."""
    key = call.step.args[1]
    if odd := _odd(key):
        call.keep_whole(f"it is indexed by {odd}")
        return
    call.linear = "sum"
    call.out(_picked(call, call.first.dims, key, (1,)))


def _odd(key: Any) -> str:
    """The index of no kind that ``_picked`` can follow; empty if there is none."""
    keys = key if isinstance(key, tuple) else (key,)
    kinds = (Name, slice, list, int, type(None), type(Ellipsis))
    return next((repr(k) for k in keys if isinstance(k, bool) or not isinstance(k, kinds)), "")


def _picked(call: Call, dims: Dims, key: Any, path: Path) -> list[Dim]:
    keys = list(key) if isinstance(key, tuple) else [key]
    if not any(isinstance(k, Name) for k in keys):  # x[..., [-1]] is a range of one
        keys = [_one(k) if isinstance(k, list) and len(k) == 1 and type(k[0]) is int else k for k in keys]
    at = {id(k): (*path, i) if isinstance(key, tuple) else path for i, k in enumerate(keys)}
    consumed = sum(_rank(call, k, at) for k in keys if k is not Ellipsis)
    if not any(k is Ellipsis for k in keys):
        keys.append(Ellipsis)
    place, out, indexed = 0, list[Dim](), list[Operand]()
    first_index, apart, advanced = -1, False, any(isinstance(k, (Name, list)) for k in keys)
    for index, k in enumerate(keys):
        where = (*path, index) if isinstance(key, tuple) else path
        if k is Ellipsis:
            out.extend(dims[place : place + len(dims) - consumed])
            place += len(dims) - consumed
            apart = apart or (first_index >= 0 and any(isinstance(x, (Name, list)) for x in keys[index + 1 :]))
        elif k is None:
            out.append(())
        elif isinstance(k, slice):
            out.append(_range(call, dims[place], k, where))
            place += 1
        elif isinstance(k, (Name, list)) or advanced:
            width = _rank(call, k, {id(k): where})
            call.pin(*dims[place : place + width], why="elements are picked from it")
            place += width
            if first_index < 0:
                first_index = len(out)
            if isinstance(k, Name):
                indexed.append(call.operands[where])
                call.pin(*call.operands[where].dims, why="it tells which elements are picked")
        else:
            dim = call.axes.resolve(dims[place])
            call.pin(dim, why="one element of it is picked")
            place += 1
    if advanced:
        assert call.shape is not None or call.step.word == "setitem"
        rank = (len(call.shape) if call.shape is not None else len(out) + _width(indexed)) - len(out)
        start = 0 if apart else first_index
        sizes = call.shape[start : start + rank] if call.shape is not None else _sizes(call, indexed, rank)
        picked = list(call.fresh(sizes, "picked by a tensor"))
        out[start:start] = picked
    return out


def _one(key: list[int]) -> slice:
    return slice(key[0], key[0] + 1 or None)


def _width(indexed: list[Operand]) -> int:
    return max((len(o.dims) for o in indexed), default=1)


def _sizes(call: Call, indexed: list[Operand], rank: int) -> list[int]:
    sizes = [1] * rank
    for operand in indexed:
        for back, dim in enumerate(reversed(operand.dims), 1):
            sizes[-back] = max(sizes[-back], call.size(dim))
    return sizes


def _rank(call: Call, k: Any, at: dict[int, Path]) -> int:
    """How many dimensions an index takes."""
    if k is None or k is Ellipsis:
        return 0
    if isinstance(k, Name):
        operand = call.operands[at[id(k)]]
        return len(operand.dims) if _boolean(call, k) else 1
    return 1


def _boolean(call: Call, k: Name) -> bool:
    return k in call.booleans


def _range(call: Call, dim: Dim, k: slice, path: Path) -> Dim:
    total = call.size(dim)
    if any(isinstance(x, Name) for x in (k.start, k.stop, k.step)):
        call.pin(dim, why="its range is a tensor")
        return call.axes.fresh(total, "its range is a tensor")
    start, stop, step = k.indices(total)
    if (start, stop, step) == (0, total, 1):
        if k.stop is not None and k.stop >= 0:
            call.sizes.append(((*path, "stop"), dim))
        return dim
    if step != 1:
        count = len(range(start, stop, step))
        if total % step or count != total // step or start >= step:
            call.pin(dim, why="every few elements are picked")
            return call.axes.fresh(count, "every few elements are picked")
        slow = call.axes.fresh(total // step)
        call.axes.unify(dim, slow + call.axes.fresh(step, "every few elements are picked"))
        return slow
    why = "a range of it is picked"
    if start >= stop:
        call.pin(dim, why=why)
        return call.axes.fresh(0, why)
    out = call.axes.part(dim, start, stop, why)
    for end, place in (("start", start), ("stop", stop)):
        if getattr(k, end) is not None and place:
            call.sizes.append(((*path, end), call.axes.part(dim, 0, place, why)))
    return out


@register("setitem")
def setitem(call: Call) -> None:
    """``x[...] = value``: in place."""
    value, key = call.operands.get((2,)), call.step.args[1]
    if isinstance(key, Name) and _boolean(call, key) and value is None:  # a mask and a number: element by element
        mask = call.operands[1,]
        call.follow(mask, call.first.dims[: len(mask.dims)])
        return
    if odd := _odd(key):
        call.keep_whole(f"it is indexed by {odd}")
        return
    call.linear = "sum"
    target = _picked(call, call.first.dims, key, (1,))
    if value is not None:
        shared = len(value.dims)
        wanted = target[len(target) - shared :] if shared else []
        if len(wanted) == shared:
            call.follow(value, [() if call.size(o) == 1 else w for o, w in zip(value.dims, wanted, strict=True)])


@register("select")
def select(call: Call) -> None:
    """One element of a dimension."""
    call.linear = "sum"
    at = call.axis(call.arg(1, "dim"))
    call.pin(call.first.dims[at], why="one element of it is picked")
    call.out([*call.first.dims[:at], *call.first.dims[at + 1 :]])


@register("narrow")
def narrow(call: Call) -> None:
    """A range of a dimension."""
    call.linear = "sum"
    at, start, length = call.axis(call.arg(1, "dim")), call.arg(2, "start"), call.arg(3, "length")
    dims = list(call.first.dims)
    if not isinstance(start, int) or not isinstance(length, int):
        assert call.shape is not None
        call.pin(dims[at], why="its range is a tensor")
        dims[at] = call.axes.fresh(call.shape[at], "its range is a tensor")
        call.out(dims)
        return
    if start:
        call.sizes.append((call.path(2, "start"), call.axes.part(dims[at], 0, start, "a range of it is picked")))
    dims[at] = call.axes.part(dims[at], start, start + length, "a range of it is picked")
    call.sizes.append((call.path(3, "length"), dims[at]))
    call.out(dims)


@register("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce")
def gather(call: Call) -> None:
    """Elements are picked along one whole dimension; the others agree."""
    picks = call.step.word in ("gather", "take_along_dim")
    at = call.axis(call.arg(2, "dim") if call.step.word == "take_along_dim" else call.arg(1, "dim"))
    index = call.operands[call.path(1, "indices") if call.step.word == "take_along_dim" else call.path(2, "index")]
    others = [o for o in call.operands.values() if o is not call.first]
    call.pin(call.first.dims[at])
    for operand in others:
        call.pin(operand.dims[at])
        for i, (own, dim) in enumerate(zip(operand.dims, call.first.dims, strict=True)):
            if i != at and call.size(own) != call.size(dim):
                call.pin(own, dim)
        wanted = [
            own if i == at or call.size(own) != call.size(dim) else dim
            for i, (own, dim) in enumerate(zip(operand.dims, call.first.dims, strict=True))
        ]
        call.follow(operand, wanted)
    if picks:
        shape = zip(call.first.dims, index.dims, strict=True)
        call.out([i if n == at or call.size(d) != call.size(i) else d for n, (d, i) in enumerate(shape)])
    else:
        call.out(call.first.dims)


@register("index_select", "index_add", "index_copy", "index_fill")
def index(call: Call) -> None:
    """Whole slices are picked or put along one dimension."""
    call.linear = "sum" if call.step.word in ("index_select", "index_add") else ""
    at, dims = call.axis(call.arg(1, "dim")), list(call.first.dims)
    call.pin(dims[at], why="elements are picked from it")
    if call.step.word == "index_select":
        indices = call.operands[call.path(2, "index")]
        call.pin(*indices.dims, why="it tells which elements are picked")
        dims[at] = call.axes.fresh(call.size(indices.dims[0]) if indices.dims else 1, "picked by a tensor")
    elif (source := call.operand(3, "source")) is not None:
        call.pin(*call.operands[call.path(2, "index")].dims, why="it tells where elements are put")
        call.pin(source.dims[at])
        call.follow(source, [*dims[:at], source.dims[at], *dims[at + 1 :]])
    call.out(dims)


@register("topk")
def topk(call: Call) -> None:
    """The dimension is whole, the others pass."""
    k, at = call.arg(1, "k"), call.axis(call.arg(2, "dim", -1))
    call.pin(call.first.dims[at])
    for _ in range(2):
        dims = list(call.first.dims)
        dims[at] = call.axes.fresh(k, "topk makes it whole")
        call.out(dims)


@register("index", "masked_select", "nonzero", "unique", "unique_consecutive", "histc", "bincount", "masked_scatter",
          "searchsorted", "bucketize", "argwhere", "multinomial")  # fmt: skip
def whole(call: Call) -> None:
    """Everything is needed whole."""
    call.keep_whole(f"{call.step.word} needs it whole")
