"""Operations that sum products over a dimension: a partial sum appears where that dimension is sharded."""

from __future__ import annotations

from merak_like.partitioner.tensor_parallel.axes import Dim, Dims
from merak_like.partitioner.tensor_parallel.call import Call, Operand
from merak_like.partitioner.tensor_parallel.rules.table import register


@register("linear")
def linear(call: Call) -> None:
    """``x (..., i) @ weight (o, i).T + bias (o)``."""
    x, weight, bias = call.first, call.operands[call.path(1, "weight")], call.operand(2, "bias")
    if len(weight.dims) == 1:
        contraction(call, x.dims[-1], weight.dims[0], x.dims[:-1])
        return
    if bias is not None:
        call.axes.unify(bias.dims[-1], weight.dims[0])
        call.addends = (call.path(2, "bias"),)
    contraction(call, x.dims[-1], weight.dims[1], (*x.dims[:-1], weight.dims[0]))


def contraction(call: Call, one: Dim, other: Dim, out: Dims) -> None:
    """Sum over a dimension that two operands share."""
    call.axes.unify(one, other)
    call.contracted.append(one)
    call.linear = "product"
    call.out(out)


@register("matmul", "bmm", "mm", "mv", "dot")
def matmul(call: Call) -> None:
    """``(..., m, k) @ (..., k, n)``; a vector has no m or n."""
    a, b = call.first, call.operands[call.path(1, "other" if "other" in call.step.kwargs else "mat2")]
    batch = batches(call, a.dims[:-2], b.dims[:-2])
    rows, columns = a.dims[-2:-1], b.dims[-1:] * (len(b.dims) > 1)
    inner = b.dims[max(0, len(b.dims) - 2)]
    contraction(call, a.dims[len(a.dims) - 1], inner, (*batch, *rows, *columns))


def batches(call: Call, one: Dims, other: Dims) -> Dims:
    """Batch dimensions of two operands, aligned from the right."""
    rank = max(len(one), len(other))
    pairs = zip(((),) * (rank - len(one)) + one, ((),) * (rank - len(other)) + other, strict=True)
    out: list[Dim] = []
    for mine, theirs in pairs:
        if call.size(mine) == call.size(theirs):
            call.axes.unify(mine, theirs)
        out.append(mine if call.size(mine) != 1 else theirs)
    return tuple(out)


@register("addmm", "baddbmm")
def addmm(call: Call) -> None:
    """``input + a (..., m, k) @ b (..., k, n)``."""
    names = ("mat1", "mat2") if call.step.word == "addmm" else ("batch1", "batch2")
    added, a, b = (call.operands[call.path(i, key)] for i, key in enumerate(("input", *names)))
    batch = batches(call, a.dims[:-2], b.dims[:-2])
    out = (*batch, a.dims[-2], b.dims[-1])
    wanted = out[len(out) - len(added.dims) :]
    call.follow(added, [() if call.size(own) == 1 else dim for own, dim in zip(added.dims, wanted, strict=True)])
    call.addends = (call.path(0, "input"),)
    contraction(call, a.dims[-1], b.dims[-2], out)


@register("_grouped_mm", "grouped_mm")
def grouped_mm(call: Call) -> None:
    """Rows of ``x (s, k)`` in groups, each with its own matrix of ``b (e, k, n)``; or columns of x in groups."""
    a, b = call.first, call.operands[call.path(1, "mat2")]
    if len(a.dims) == 2 and len(b.dims) == 3:
        call.pin(a.dims[0], b.dims[0], why="rows are grouped by expert")
        contraction(call, a.dims[1], b.dims[1], (a.dims[0], b.dims[2]))
    else:
        for operand in call.operands.values():
            call.pin(*operand.dims)
        call.out(call.fresh(call.shape or (), "grouped in an unknown way"))


@register("einsum")
def einsum(call: Call) -> None:
    """Letters are dimensions; those missing in the result are summed over."""
    equation = call.arg(0, "equation").replace(" ", "")
    inputs, _, output = equation.partition("->")
    names: dict[str, Dim] = {}
    operands = list(call.operands.values())
    rank = max(len(o.dims) - len(t.replace("...", "")) for o, t in zip(operands, inputs.split(","), strict=True))
    dots = "".join(chr(0x391 + i) for i in range(rank))
    for operand, term in zip(operands, inputs.split(","), strict=True):
        missing = len(operand.dims) - len(term.replace("...", ""))
        for letter, dim in zip(term.replace("...", dots[rank - missing :]), operand.dims, strict=True):
            known = names.get(letter, ())
            if call.size(known) == call.size(dim):
                call.axes.unify(known, dim)
            names[letter] = dim if call.size(known) == 1 else known
    if "->" not in equation:
        letters = inputs.replace(",", "")
        output = dots + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    output = output.replace("...", dots)
    call.contracted.extend(dim for letter, dim in names.items() if letter not in output)
    call.linear = "product"
    call.out([names[letter] for letter in output])


@register("embedding")
def embedding(call: Call) -> None:
    """Rows of a table: a sharded vocabulary gives zeros for rows that are elsewhere."""
    ids, table = call.first, call.operands[call.path(1, "weight")]
    if call.arg(3, "max_norm") is not None:
        call.pin(*table.dims)
    call.contracted.append(table.dims[0])
    call.form = "embedding"
    call.linear = "product"
    call.out([*ids.dims, table.dims[1]])


@register("cross_entropy")
def cross_entropy(call: Call) -> None:
    """The classes may be sharded: the maximum, the sum of exponentials and the target's logit are reduced."""
    logits, target = call.first, call.operands[call.path(1, "target")]
    at = 1 if len(logits.dims) > 1 else 0
    plain = (
        call.operand(2, "weight") is None and not call.arg(7, "label_smoothing", 0.0)
        and len(target.dims) == len(logits.dims) - 1 and len(logits.dims) == 2
    )  # fmt: skip
    for index, dim in enumerate(logits.dims):
        if index != at or not plain:
            call.pin(dim, why="the loss is a mean over it" if index != at else "this cross-entropy needs all classes")
    if plain:
        call.form = "cross_entropy"
        call.contracted.append(logits.dims[at])
    call.out(call.fresh(call.shape or (), "a loss"))


@register("sum", "mean", "nansum")
def reduction(call: Call) -> None:
    """Sums over dimensions; a mean of equal shards is the mean of their means."""
    dims = call.first.dims
    given = call.arg(1, "dim")
    if given is None:
        given = call.arg(1, "axis")
    keep = bool(call.arg(2, "keepdim", False))
    if given is None or isinstance(given, bool):
        given = range(len(dims))
    at = {call.axis(i) for i in ((given,) if isinstance(given, int) else given or range(len(dims)))}
    call.contracted.extend(dims[i] for i in at)
    if call.step.word == "mean":
        call.form = "mean"
    call.linear = "sum"
    call.out([() if i in at else dim for i, dim in enumerate(dims) if i not in at or keep])


@register("scaled_dot_product_attention")
def attention(call: Call) -> None:
    """Heads stay apart; with grouped queries those of q are (heads of k, group)."""
    q, k, v = (call.operands[call.path(i, key)] for i, key in enumerate(("query", "key", "value")))
    mask, grouped = call.operand(3, "attn_mask"), bool(call.arg(7, "enable_gqa", False))
    call.axes.unify(k.dims[-2], v.dims[-2])
    call.pin(q.dims[-1], k.dims[-1], q.dims[-2], k.dims[-2], why="attention needs it whole")
    call.axes.unify(q.dims[-1], k.dims[-1])
    kv = batches(call, k.dims[:-2], v.dims[:-2])
    batch = q.dims[:-2]
    if grouped and len(kv) and call.size(batch[-1]) != call.size(kv[-1]):
        group = call.axes.fresh(call.size(batch[-1]) // call.size(kv[-1]))
        call.axes.unify(batch[-1], kv[-1] + group)
        batches(call, batch[:-1], kv[:-1])
    else:
        batch = batches(call, batch, kv)
    if mask is not None:
        scores = (*batch, q.dims[-2], k.dims[-2])
        if mask.side:
            broadcast_to(call, mask, scores)
        else:
            for own, dim in zip(mask.dims, scores[len(scores) - len(mask.dims) :], strict=True):
                if call.size(own) == call.size(dim):
                    call.axes.unify(own, dim)
    call.out([*batch, q.dims[-2], v.dims[-1]])


def broadcast_to(call: Call, operand: Operand, dims: Dims) -> None:
    """A side operand follows these dimensions where it is not of size 1."""
    wanted = dims[len(dims) - len(operand.dims) :] if operand.dims else ()
    operand.dims = tuple(() if call.size(own) == 1 else dim for own, dim in zip(operand.dims, wanted, strict=True))
    operand.soft = True
