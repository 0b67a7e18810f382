"""When memory does not suffice: what a rank was doing, what its memory holds, and what would fit.

The error stays torch's own kind. ``save`` leaves a record that outlives the process:

    folder/rank-0.json      what was doing, bytes by kind
           rank-0.memory    of a GPU: what was allocated, for pytorch.org/memory_viz
"""

from __future__ import annotations

import json
import re
import resource
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merak_like._compat import dump_memory, tree_leaves
from merak_like.partitioner.report.text import bytes_text, parse_bytes
from merak_like.partitioner.schedules.action import Action, Kind

if TYPE_CHECKING:
    from merak_like.runtime.engine import Engine

DOING = {Kind.F: "forward", Kind.R: "recompute", Kind.B: "backward", Kind.W: "gradients of weights"}
ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")
"""In what torch's allocators say."""
SAFE = 0.9
"""Of a device's memory: what a plan should use at most, since allocators lose some of it between tensors."""


class NoMemory(torch.OutOfMemoryError):
    """A rank ran out of memory; the message says where, what its memory holds, and what to change."""

    def __init__(self, message: str, record: dict[str, Any], device: torch.device) -> None:
        super().__init__(message)
        self.record, self.device = record, device

    def save(self, folder: Path) -> None:
        """Write the record, and of a GPU the snapshot."""
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / f"rank-{self.record['rank']}"
        name.with_suffix(".json").write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        if self.device.type == "cuda":
            dump_memory(name.with_suffix(".memory"))


@contextmanager
def explained(engine: Engine) -> Iterator[None]:
    """Raise NoMemory for whatever an allocator refuses inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, NoMemory) or not _is_shortage(error):
            raise
        record = recorded(engine, error)
        raise NoMemory(told(engine, record), record, engine.world.device) from error


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def recorded(engine: Engine, error: Exception) -> dict[str, Any]:
    """What this rank was doing, and the bytes in its memory by kind."""
    frames = [frame.f_locals.get("action") for frame, _ in traceback.walk_tb(error.__traceback__)]
    doing = next((one for one in reversed(frames) if isinstance(one, Action)), None)
    asked = ASKED.search(str(error))
    used = in_use(engine.world.device)
    seen, kinds = set[int](), dict[str, int]()
    for kind, tensors in _kinds(engine):
        kinds[kind] = _bytes(tensors, seen)
    device = engine.world.device
    return {
        "rank": engine.world.rank, "step": engine.steps, "said": str(error).strip().splitlines()[0][:300],
        "doing": f"the {DOING.get(doing.kind, 'transfer')} of micro-batch {doing.micro_batch} on stage {doing.stage}"
        if doing is not None else "what is outside of stages (sums of gradients, the update)",
        "asked": parse_bytes(asked[1].replace("bytes", "B")) if asked else 0, "used": used, "kinds": kinds,
        "rest": max(0, used - sum(kinds.values())),
        "live": sorted({index for index, _ in engine._made}),
        "planned": sum(s.memory.total for s in engine.plan.stages if s.rank == engine.groups.coord.pp),
        "has": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }  # fmt: skip


def in_use(device: torch.device) -> int:
    """Bytes allocated on a GPU; on a CPU the resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no Linux: the most it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kinds(engine: Engine) -> Iterator[tuple[str, Iterable[Any]]]:
    """What is in memory, a tensor of two kinds under the first."""
    yield "weights", [*engine.model.parameters(), *engine.model.buffers()]
    yield "gradients", [p.grad for p in engine._parameters.values()]
    optimizer = engine.optimizer
    targets = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    states = [] if optimizer is None else [optimizer.state.get(p, {}) for p in targets]
    yield "optimizer", [*targets, *(value for state in states for value in state.values())]
    yield "batch", tree_leaves(engine._batches)
    between = (*engine._made.values(), *engine._gradients.values())
    yield "between stages", [tensor for one in between for tensor in one.values()]


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    """Of storages that were not counted yet, and whose numbers are there."""
    total = 0
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def told(engine: Engine, record: dict[str, Any]) -> str:
    """The record in words, and what would fit."""
    plan = engine.plan
    kinds = [f"{kind} {bytes_text(n)}" for kind, n in record["kinds"].items() if n]
    asked = f" for {bytes_text(record['asked'])} more" if record["asked"] else ""
    where = f"step {record['step']}, in {record['doing']}"
    return (
        f"rank {record['rank']} has no memory{asked} in {where} ({record['said']}): "
        f"it holds {bytes_text(record['used'])}: {', '.join(kinds)}, and {bytes_text(record['rest'])} of other things, "
        f"activations of {len(record['live'])} micro-batches among them; the plan expected "
        f"{bytes_text(record['planned'])}; {', or '.join(_fits(plan, record))}"
    )


def _fits(plan: Any, record: dict[str, Any]) -> Iterator[str]:
    """What to change, what costs least first."""
    needed = record["used"] + record["asked"]
    share = min(SAFE, SAFE * record["has"] / needed) if record["has"] else SAFE
    yield (
        f"plan again with memory_limit={int(record['planned'] * share)}, which leaves room for what the plan did not "
        "expect"
    )
    if plan.micro_batch > 1:
        yield f"micro_batches={2 * plan.micro_batches} (half as many samples in each)"
    if plan.mesh.dp > 1 and plan.zero == 0:
        yield f"zero=1 (1/{plan.mesh.dp} of the optimizer's state on a rank)"
    if plan.mesh.size == 1:
        yield "more ranks"
