"""What is spread over the stages, brought together on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.partitioner.mesh import Coord
from merak_like.partitioner.plan import Plan
from merak_like.runtime.groups import Groups
from merak_like.runtime.initialize import World
from merak_like.runtime.tensor_parallel.shards import Shards
from merak_like.runtime.watch import Watch


def state_dict(
    own: Mapping[str, Tensor], plan: Plan, shards: Shards, groups: Groups, world: World, watch: Watch
) -> dict[str, Tensor]:
    """Every entry of the model's state_dict, full, on rank 0; {} elsewhere. ``own`` are a rank's, and its own parts."""
    first = {alias: names[0] for names in plan.ties for alias in names}
    entries = {first.get(name, name): tensor for name, tensor in own.items()}
    rank_of = {name: rank for name, rank in holders(plan).items() if name in entries}
    gathered = _gather(entries, rank_of, shards, groups, world, watch)
    return {name: gathered[first.get(name, name)] for name in own} if world.rank == 0 else {}


def gradients(
    mine: Mapping[str, Tensor | None], plan: Plan, shards: Shards, groups: Groups, world: World, watch: Watch
) -> dict[str, Tensor]:
    """The gradient of every trainable parameter that has one, by first name, on rank 0; {} elsewhere."""
    rank_of = holders(plan)
    found = {name: grad for name, grad in mine.items() if grad is not None}
    everyone = _everyones(list(found), world, watch)
    trained = dict.fromkeys(n for stage in plan.stages for n in stage.params if n in everyone)
    return _gather(found, {n: rank_of[n] for n in trained}, shards, groups, world, watch)


def holders(plan: Plan) -> dict[str, int]:
    """For each parameter and buffer (first names), the pipeline rank that answers for it: that of its first stage."""
    found: dict[str, int] = {}
    for stage in plan.stages:
        for name in (*stage.params, *stage.buffers):
            found.setdefault(name, stage.rank)
    return found


def _everyones(names: Sequence[str], world: World, watch: Watch) -> set[str]:
    if world.alone:
        return set(names)
    lists: list[Any] = [None] * world.size
    with watch.waiting("the names of all gradients"):
        dist.all_gather_object(lists, list(names))
    return {name for part in lists for name in part}


def _gather(
    own: Mapping[str, Tensor], rank_of: Mapping[str, int], shards: Shards, groups: Groups, world: World, watch: Watch
) -> dict[str, Tensor]:
    """Send each tensor, or each part of one, from its ranks in the first replica to rank 0, one after the other."""
    out: dict[str, Tensor] = {}
    for pp in sorted(set(rank_of.values())):
        names = [name for name, on in rank_of.items() if on == pp]
        divided = [name for name in names if name in shards.layouts]
        parts = {
            tp: _bring(own, names if tp == 0 else divided, groups.mesh.rank(Coord(0, pp, tp)), world, watch)
            for tp in range(groups.mesh.tp)
        }
        if world.rank == 0:
            for name in names:
                holders = groups.mesh.tp if name in divided else 1
                out[name] = shards.assemble(name, [parts[tp][name] for tp in range(holders)])
    return out


def _bring(
    own: Mapping[str, Tensor], names: Sequence[str], owner: int, world: World, watch: Watch
) -> dict[str, Tensor]:
    """Tensors of one rank as CPU tensors on rank 0; {} elsewhere."""
    out: dict[str, Tensor] = {}
    if world.rank not in (0, owner):
        return out
    if owner == 0:
        return {name: own[name].detach().cpu().clone() for name in names}
    if world.rank == owner:
        meta: list[Any] = [[(name, tuple(own[name].shape), own[name].dtype) for name in names]]
        with watch.waiting("rank 0 to take the names of tensors"):
            dist.send_object_list(meta, 0)
        for name in names:
            work = dist.isend(own[name].detach().contiguous(), 0)
            watch.wait(work, f"the end of sending {name}", "to rank 0")
        return out
    received: list[Any] = [None]
    with watch.waiting(f"the names of tensors from rank {owner}"):
        dist.recv_object_list(received, owner)
    for name, shape, dtype in received[0]:
        buffer = torch.empty(shape, dtype=dtype, device=world.device)
        watch.wait(dist.irecv(buffer, owner), name, f"from rank {owner}")
        out[name] = buffer.cpu()
    return out


def barrier(world: World, watch: Watch) -> None:
    """Wait for every rank."""
    if not world.alone:
        token = torch.zeros(1, device=world.device)
        watch.wait(dist.all_reduce(token, async_op=True), "a barrier", "with all ranks")


def from_first(make: Callable[[], Any] | None, world: World, watch: Watch) -> Any:
    """What rank 0 makes, on every rank."""
    box = [make() if make is not None else None]
    if not world.alone:
        with watch.waiting("what rank 0 measures"):
            dist.broadcast_object_list(box, src=0)
    return box[0]


def to_first(mine: Any, world: World, watch: Watch) -> list[Any]:
    """What every rank brings, by rank, on rank 0; [] elsewhere."""
    if world.alone:
        return [mine]
    everyone: list[Any] | None = [None] * world.size if world.rank == 0 else None
    with watch.waiting("what every rank has recorded"):
        dist.gather_object(mine, everyone, dst=0)
    return everyone or []


def from_all(mine: Any, world: World, watch: Watch) -> list[Any]:
    """What every rank brings, by rank, on every rank."""
    if world.alone:
        return [mine]
    everyone: list[Any] = [None] * world.size
    with watch.waiting("what every rank has found"):
        dist.all_gather_object(everyone, mine)
    return everyone


PLAN_HINT = (
    ". If all run the same code and configuration, the model's Python may go through a set, whose order differs from "
    "process to process: start the job with PYTHONHASHSEED=0"
)


def agree(facts: Mapping[str, str], world: World, watch: Watch) -> None:
    """Raise ValueError on every rank, naming the odd ranks, unless all ranks state the same facts."""
    if world.alone:
        return
    said: list[Any] = [None] * world.size
    with watch.waiting("the plans of all ranks"):
        dist.all_gather_object(said, dict(facts))
    problems = list(_odd(facts, said))
    if problems:
        hint = "" if "plan" not in " ".join(problems) else PLAN_HINT
        raise ValueError("the ranks do not agree: " + "; ".join(problems) + hint)


def agree_on_weights(tensors: Mapping[str, Tensor], world: World, watch: Watch) -> None:
    """Raise ValueError on every rank, naming the odd ones, unless all that hold a tensor hold the same numbers."""
    if theirs := odd_weights(tensors, world, watch):
        raise ValueError(
            f"the ranks do not start from the same weights: {theirs}: call torch.manual_seed on every rank before the "
            "model is built, build it on the meta device, or pass weights="
        )


def odd_weights(tensors: Mapping[str, Tensor], world: World, watch: Watch) -> str:
    """Which ranks hold other numbers than the rest that hold the same tensors; empty if none does. Every rank asks."""
    if world.alone:
        return ""
    said: list[Any] = [None] * world.size
    with watch.waiting("the fingerprints of all weights"):
        dist.all_gather_object(said, _fingerprints(tensors))
    odd: dict[int, list[str]] = {}
    for name in dict.fromkeys(name for one in said for name in one):
        prints = {rank: one[name] for rank, one in enumerate(said) if name in one}
        values = list(prints.values())
        usual = max(dict.fromkeys(values), key=values.count)
        for rank, value in prints.items():
            if value != usual:
                odd.setdefault(rank, []).append(name)
    return "; ".join(f"rank {rank} has its own {names[0]} ({len(names)} differ)" for rank, names in odd.items())


def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A sum over the bits of each tensor."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {
        name: tensor.detach().contiguous().view(whole[tensor.element_size()]).sum(dtype=torch.int64)
        for name, tensor in tensors.items()
        if tensor.element_size() in whole
    }
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def _odd(facts: Mapping[str, str], said: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for key in facts:
        answers = [one.get(key, "nothing") for one in said]
        usual = max(dict.fromkeys(answers), key=answers.count)
        odd = [rank for rank, answer in enumerate(answers) if answer != usual]
        if odd:
            shorten: Callable[[str], str] = lambda text: text[:12]  # noqa: E731
            theirs = ", ".join(f"rank {rank} has {shorten(answers[rank])}" for rank in odd)
            yield f"{key}: {theirs}, the others {shorten(usual)}"
