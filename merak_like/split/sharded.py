"""A cloud's half as tensor-parallel ranks run it: on a trace down to torch functions, with parts of weights.

Edge and host agree on one trace, in which a module is one op. The ranks' own trace may need less of what travels, and
calls it by other names:

    agreed   sent add_6, cos, sin    rebuilt mask
    own      sent add_8              rebuilt mask, cos, sin

What is saved is whole, whatever parts it was in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merak_like.runtime.links import Spec
from merak_like.runtime.tensor_parallel.shards import Shards
from merak_like.split.halves import Halves


def as_agreed(agreed: Halves, own: Halves) -> Halves:
    """The ranks' own trace, sending and receiving what was agreed.

    Raises ValueError where it is not clear which of its values these are.
    """
    sent, returned = _named(agreed.sent, own.sent), _named(agreed.returned, own.returned)
    if len(returned) != len(own.returned) or any(spec not in own.returned for spec in returned):
        raise ValueError(
            "tensor-parallel ranks would return other values than the edge takes: serve this cut with tp=1"
        )
    return replace(own, sent=sent, returned=returned, digest=agreed.digest)


def _named(agreed: Sequence[Spec], own: Sequence[Spec]) -> tuple[Spec, ...]:
    """What travels, under the names of the ranks' own trace; what that does not need keeps a name of no value."""
    names = dict[str, str]()
    for kind in dict.fromkeys(spec[1:] for spec in own):
        ours = [spec.name for spec in own if spec[1:] == kind]
        theirs = [spec.name for spec in agreed if spec[1:] == kind]
        if len(ours) != len(theirs):
            raise ValueError(
                f"{len(theirs)} values of shape {kind[0]} travel, tensor-parallel ranks would need {len(ours)}: serve "
                "this cut with tp=1"
            )
        names.update(zip(theirs, ours, strict=True))
    return tuple(spec._replace(name=names.get(spec.name, f"unread {spec.name}")) for spec in agreed)


def require_whole(specs: Sequence[Spec], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError for a value that travels, but of which each rank has a part; ``shapes`` are a rank's."""
    if parted := [s.name for s in specs if s.name in shapes and tuple(shapes[s.name]) != s.shape]:
        raise ValueError(f"each tensor-parallel rank has a part of {parted[0]}, which travels: cut elsewhere, or tp=1")


def whole(shards: Shards, name: str, parts: Sequence[Tensor]) -> Tensor:
    """A tensor of a checkpoint from what the tensor-parallel ranks have of it."""
    weight = _weight(shards, name, parts[0].shape, whole=False)
    return parts[0] if weight is None else shards.assemble(weight, parts)


def part(shards: Shards, name: str, tensor: Tensor) -> Tensor:
    """What a tensor-parallel rank has of a tensor of a checkpoint."""
    weight = _weight(shards, name, tensor.shape, whole=True)
    return tensor if weight is None else shards.cut(weight, tensor)


def fitting(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], fixed: Collection[str], *, alone: bool
) -> tuple[str, ...]:  # fmt: skip
    """The names of what is taken up of a checkpoint.

    ``fixed`` are buffers that no step changes: how a half lies on ranks decides whether it has them. A rank that is
    not ``alone`` leaves others what is theirs. Raises ValueError for a checkpoint of another model.
    """
    odd = {n for n in mine if n not in theirs} | {n for n in theirs if alone and n not in mine}
    odd = sorted(odd - set(fixed)) or [n for n in mine if n in theirs and mine[n].shape != theirs[n].shape]
    if odd:
        raise ValueError(f"the checkpoint is of another model or cut: {odd[:3]} differ")
    return tuple(name for name in mine if name in theirs)


def _weight(shards: Shards, name: str, shape: torch.Size, *, whole: bool) -> str | None:
    """The weight that a tensor lies like: ``model/NAME`` and ``mask/MEMBER/NAME`` do; ``optimizer/NAME/KEY`` and
    ``learner/MEMBER/NAME/KEY`` may."""
    kind, _, rest = name.partition("/")
    rest = rest.partition("/")[2] if kind in ("mask", "learner") else rest
    weight = rest.rpartition("/")[0] if kind in ("optimizer", "learner") else rest
    kinds = ("model", "weights", "buffers", "optimizer", "mask", "learner")
    layout = shards.layouts.get(weight) if kind in kinds else None
    if layout is None or len(layout) != len(shape):
        return None
    local = shards.shape(weight, ())
    due = shards.whole_shape(weight, local) if whole else local
    return weight if tuple(shape) == tuple(due) else None
