"""Define-by-run tracing: run the model's own forward once on tensors without data and write down what happened.

One trace serves two granularities: its ops are childless modules and torch functions (to decide), and every module
call it saw can be folded back into one node (to execute).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from merak_like._compat import FakeTensorMode, fake_like
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tracer.assemble import assemble
from merak_like.partitioner.tracer.calls import Calls, ModuleCall, routed
from merak_like.partitioner.tracer.draft import Descend, Draft
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.example import LossFn, arguments, find_loss, leaves, name_of, replace_tensors
from merak_like.partitioner.tracer.fakes import (
    FakeModel,
    changed_attributes,
    clean_caches,
    fake_model,
    plain_attributes,
)
from merak_like.partitioner.tracer.recorder import Recorder

__all__ = ["LossFn", "Trace", "TraceError", "trace"]


@dataclass(frozen=True)
class Trace:
    """One recorded forward pass: as data for the planner and as code for the stages."""

    graph: ProxyGraph
    code: fx.Graph
    """The same ops as nodes; ``node.meta["index"]`` is the op's index."""
    calls: tuple[ModuleCall, ...]
    constants: Mapping[str, Any]
    """Tensors and objects the code reads that are neither parameters nor buffers."""
    inputs: Mapping[str, tuple[Any, ...]]
    """Input value name to its path in the batch."""
    device: torch.device
    """Where the fake tensors claimed to be: device constants in the code say so."""
    state: tuple[Any, ...]
    """Grad mode and autocast in force around the model."""
    training: bool


def trace(
    model: nn.Module,
    example: Any,
    loss_fn: LossFn | None = None,
    *,
    atomic: Collection[str] = (),
    device: torch.device | str | None = None,
) -> Trace:
    """Record one forward pass of an unmodified model, without allocating a weight.

    ``example`` is a batch as training will see it (tensors, nested containers, scalars, None); its values are looked
    at only where the model's Python asks for data. ``loss_fn(outputs, batch)`` is recorded too; without it the model
    must give its own loss. ``atomic`` names modules (by path or class) that must stay whole. The model may be on the
    meta device and is left exactly as it was.

    Raises TraceError (a ValueError) for whatever cannot be recorded faithfully.
    """
    if torch.is_inference_mode_enabled():
        raise TraceError("tracing under torch.inference_mode() would record no gradients: leave that context")
    where = torch.device(device) if device is not None else _device_of(model)
    descend: set[str] = set()
    whole = set(atomic)
    memo = True
    while True:
        try:
            return _trace(model, example, loss_fn, frozenset(whole), frozenset(descend), where, memo)
        except RuntimeError:
            if not memo:
                raise
            memo = False  # see memo.py: the model may need real autograd history
        except KeepWhole as keep:
            whole |= keep.paths
        except Descend as leaf:
            path = str(leaf)
            if path in descend:
                raise TraceError(f"a tensor made inside {path} is used outside it, past its results") from None
            descend.add(path)


class KeepWhole(Exception):
    """Modules whose Python changes its own attributes at every call: they must run as they are."""

    def __init__(self, paths: set[str]) -> None:
        super().__init__(paths)
        self.paths = paths


def _device_of(model: nn.Module) -> torch.device:
    first = next((t.device for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta"), None)
    return first or torch.device("cpu")


def _trace(
    model: nn.Module, example: Any, loss_fn: LossFn | None, atomic: frozenset[str], descend: frozenset[str],
    device: torch.device, memo: bool,
) -> Trace:  # fmt: skip
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_model(model, mode, device) as fake:
        before = plain_attributes(model)
        recorder, calls, outputs = _record(model, fake, mode, example, loss_fn, atomic, descend, device, memo)
        leaf_paths = {c.path for c in calls.calls if c.opaque == "a leaf"}
        changed = [n for n in changed_attributes(model, before) if n.rpartition(".")[0] not in leaf_paths]
        if (
            changed
        ):  # a second pass from the changed state must come to rest, or the model behaves differently each step
            before, first = plain_attributes(model), recorder
            recorder, calls, outputs = _record(model, fake, mode, example, loss_fn, atomic, descend, device, memo)
            again = [
                n for n in changed_attributes(model, before, tensors=False) if n.rpartition(".")[0] not in leaf_paths
            ]
            owners = {n.rpartition(".")[0] for n in again} - atomic
            if "" in owners:
                unread = [n for n in again if "." not in n]
                _same_ops(first, recorder, unread)
                warnings.warn(
                    f"forward changes the attributes {unread} of the model itself at every call; they did not change what it "
                    "computes, and training will leave them alone",
                    stacklevel=4,
                )
                owners.discard("")
            if owners:
                raise KeepWhole(owners)
        graph = assemble(recorder, calls.calls, fake, outputs, type(model).__name__)
    return Trace(
        graph, recorder.graph, tuple(calls.calls), recorder.constants,
        {node.name: node.meta["path"] for node in recorder.inputs}, device, _state(device), model.training,
    )  # fmt: skip


def _same_ops(first: Recorder, second: Recorder, attributes: list[str]) -> None:
    """Raise TraceError if the model computed something else once its attributes had changed."""
    one, two = ([(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in r.graph.nodes] for r in (first, second))
    if one != two:
        raise TraceError(
            f"forward changes the attributes {attributes} of the model and computes something else at the next call: a "
            "recorded graph cannot follow; register them as buffers, or move them into a sub-module, which can stay whole"
        )


def _state(device: torch.device) -> tuple[Any, ...]:
    return True, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _record(
    model: nn.Module, fake: FakeModel, mode: FakeTensorMode, example: Any, loss_fn: LossFn | None,
    atomic: frozenset[str], descend: frozenset[str], device: torch.device, memo: bool,
) -> tuple[Recorder, Calls, dict[str, str]]:  # fmt: skip
    """One forward pass on fake tensors; the names of the output values, loss first."""
    recorder = Recorder(fake, device, mode, memo)
    calls = Calls(recorder, model, atomic, descend)
    batch = _inputs(recorder, mode, example)
    passed = arguments(model, batch, loss_fn is not None)
    with (
        warnings.catch_warnings(),
        clean_caches(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda t: t),
        mode,
        routed(calls),
        recorder,
    ):
        warnings.simplefilter("ignore", UserWarning)  # the real run will say them again
        outputs = model(*passed.args, **passed.kwargs)
        loss = find_loss(outputs, model) if loss_fn is None else loss_fn(outputs, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.dim() > 1:
        raise TraceError(f"loss_fn must give a scalar tensor, found {getattr(loss, 'shape', type(loss).__name__)}")
    names = {"loss": recorder.nodes[id(loss)].name}
    for path, leaf in leaves(outputs).items():
        node = recorder.nodes.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
        if node is not None and leaf is not loss:
            names[name_of(path).removeprefix("batch_") if path else "output"] = node.name
    return recorder, calls, names


def _inputs(recorder: Recorder, mode: FakeTensorMode, example: Any) -> Any:
    """A placeholder and a fake tensor for each tensor of the example."""
    names = {id(leaf): name_of(path) for path, leaf in leaves(example).items() if isinstance(leaf, torch.Tensor)}
    paths = {id(leaf): path for path, leaf in leaves(example).items() if isinstance(leaf, torch.Tensor)}
    made: dict[int, torch.Tensor] = {}

    def new(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in made:
            return made[id(tensor)]
        fake = fake_like(mode, tensor.detach(), recorder.device)
        fake.requires_grad_(tensor.requires_grad)
        node = recorder.graph.placeholder(names[id(tensor)])
        node.meta.update(index=len(recorder.drafts), path=paths[id(tensor)], changes=())
        recorder.inputs[node] = tensor
        draft = Draft(node.name, "input", node.name, "", node)
        recorder.drafts.append(draft)
        recorder.adopt(draft, node, fake)
        made[id(tensor)] = fake
        return fake

    return replace_tensors(example, new)
