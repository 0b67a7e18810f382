"""Define-by-run tracing: run the model's own forward once on tensors without data and write down what happened.

One trace serves two granularities: its ops are childless modules and torch functions (to decide), and every module
call it saw can be folded back into one node (to execute).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from merak_like._compat import FakeTensorMode, as_in_a_real_run, fake_like
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tracer.assemble import assemble
from merak_like.partitioner.tracer.calls import Calls, Choices, ModuleCall, routed
from merak_like.partitioner.tracer.draft import CannotStayWhole, Descend, Draft, ReadsData
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.example import (
    LossFn,
    arguments,
    distinct,
    find_loss,
    leaves,
    name_of,
    replace_tensors,
)
from merak_like.partitioner.tracer.fakes import (
    FakeModel,
    changed_attributes,
    clean_caches,
    fake_model,
    no_garbage,
    plain_attributes,
)
from merak_like.partitioner.tracer.kernels import kernels
from merak_like.partitioner.tracer.recorder import Recorder
from merak_like.partitioner.tracer.repeatable import accept_changes, surely
from merak_like.partitioner.tracer.shadow import Question, questions
from merak_like.partitioner.tracer.writer import Writer

__all__ = ["LossFn", "Trace", "TraceError", "trace"]

_ONE_AT_A_TIME = threading.RLock()


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
    questions: tuple[Question, ...] = ()
    """What the model asked of the batch's data."""

    def fits(self, batch: Any) -> bool:
        """Whether a batch of the traced shape gets the answers the example got, and so takes the same way."""
        if not self.questions:
            return True
        found = leaves(batch)
        inputs = {name: found[path] for name, path in self.inputs.items()}
        return all(question.holds(inputs) for question in self.questions)


def trace(
    model: nn.Module,
    example: Any,
    loss_fn: LossFn | None = None,
    *,
    atomic: Collection[str] = (),
    device: torch.device | str | None = None,
    fuse: bool = True,
) -> Trace:
    """Record one forward pass of an unmodified model, without allocating a weight.

    ``example`` is a batch as training will see it (tensors, nested containers, scalars, None); its values are looked
    at only where the model's Python asks for data. ``loss_fn(outputs, batch)`` is recorded too; without it the model
    must give its own loss. ``atomic`` names modules (by path or class) that must stay whole. With ``fuse``, activations
    that the model spells out become the one kernel that computes the same, up to rounding (see ``kernels``). The model
    may be on the meta device and is left exactly as it was.

    Threads take turns: a trace replaces functions of torch for a while, which are the process's and not the thread's.

    Raises TraceError (a ValueError) for whatever cannot be recorded faithfully.
    """
    if torch.is_inference_mode_enabled():
        raise TraceError("tracing under torch.inference_mode() would record no gradients: leave that context")
    where = torch.device(device) if device is not None else _device_of(model)
    choices = Choices(frozenset(atomic), kernels=kernels(model) if fuse else {})

    def attempt() -> Trace:
        return surely(lambda: _with_choices(model, example, loss_fn, choices, where))

    with _ONE_AT_A_TIME:
        with as_in_a_real_run() as asked:
            try:
                return attempt()
            except TraceError as error:
                if not asked():
                    raise
                first = error
        try:  # what the model checks in a real run cannot be known here: take the way it keeps for fake tensors
            return attempt()
        except TraceError:
            raise first from None


def _with_choices(
    model: nn.Module, example: Any, loss_fn: LossFn | None, choices: Choices, device: torch.device
) -> Trace:
    """Begin again with another choice wherever the model turns out to need one."""
    memo = True
    while True:
        try:
            return _trace(model, example, loss_fn, choices, device, memo)
        except KeepWhole as keep:
            choices = replace(choices, atomic=choices.atomic | keep.paths)
        except Descend as leaf:
            path = str(leaf)
            if path in choices.descend:
                raise TraceError(f"a tensor made inside {path} is used outside it, past its results") from None
            choices = replace(choices, descend=choices.descend | {path})
        except ReadsData as reads:
            choices = _rehearse(model, choices, reads.path, reads.error)
        except CannotStayWhole as cannot:
            choices = _rehearse(model, choices, cannot.caller, cannot.error, instead_of=cannot.path)
        except RuntimeError:
            if not memo:
                raise
            memo = False  # see memo.py: the model may need real autograd history


def _rehearse(model: nn.Module, choices: Choices, path: str, error: TraceError, instead_of: str = "") -> Choices:
    """Keep a module whole that looks at its data, and all others of its class. Raises the error for a large part."""
    modules = dict(model.named_modules())
    module = modules.get(path)
    if not path or module is None or path in choices.rehearse or _share(model, module) > LARGEST_SHARE:
        raise error
    alike = {path}
    if not type(module).__module__.startswith("torch."):
        alike |= {p for p, m in modules.items() if type(m) is type(module)}
    inner = {p for p in choices.rehearse if type(modules[p]) is type(modules.get(instead_of))}
    return replace(choices, rehearse=(choices.rehearse - inner) | alike)


LARGEST_SHARE = 0.6
"""Of a model's parameters: a module that holds more is no piece of it, and keeping it whole leaves nothing to cut."""


def _share(model: nn.Module, module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / max(1, sum(p.numel() for p in model.parameters()))


class KeepWhole(Exception):
    """Modules whose Python changes its own attributes at every call: they must run as they are."""

    def __init__(self, paths: set[str]) -> None:
        super().__init__(paths)
        self.paths = paths


def _device_of(model: nn.Module) -> torch.device:
    first = next((t.device for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta"), None)
    return first or torch.device("cpu")


def _trace(
    model: nn.Module, example: Any, loss_fn: LossFn | None, choices: Choices, device: torch.device, memo: bool
) -> Trace:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with no_garbage(), fake_model(model, mode, device) as fake:
        before = plain_attributes(model)
        recorder, calls, outputs = _record(model, fake, example, loss_fn, choices, device, memo)
        ours = {c.path for c in calls.calls if c.opaque == "a leaf"}
        if any(name.rpartition(".")[0] not in ours for name in changed_attributes(model, before)):
            # A second pass from the changed state must come to rest, or the model behaves differently each step.
            before, first = plain_attributes(model), recorder
            recorder, calls, outputs = _record(model, fake, example, loss_fn, choices, device, memo)
            again = [n for n in changed_attributes(model, before, tensors=False) if n.rpartition(".")[0] not in ours]
            owners = {n.rpartition(".")[0] for n in again} - choices.atomic
            if "" in owners:
                accept_changes(first.writer.graph, recorder.writer.graph, [n for n in again if "." not in n])
            if owners := owners - {""}:
                raise KeepWhole(owners)
        graph = assemble(recorder.writer, calls.calls, fake, outputs, type(model).__name__)
    writer = recorder.writer
    return Trace(
        graph, writer.graph, tuple(calls.calls), writer.constants,
        {node.name: node.meta["path"] for node in writer.inputs}, device, _state(device), model.training,
        questions(writer.graph, recorder.shadow),
    )  # fmt: skip


def _state(device: torch.device) -> tuple[Any, ...]:
    return True, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _record(
    model: nn.Module, fake: FakeModel, example: Any, loss_fn: LossFn | None, choices: Choices, device: torch.device,
    memo: bool,
) -> tuple[Recorder, Calls, dict[str, str]]:  # fmt: skip
    """One forward pass on fake tensors; the names of the output values, loss first."""
    recorder = Recorder(fake, device, memo)
    calls = Calls(recorder, choices)
    batch = _inputs(recorder.writer, fake, example)
    passed = arguments(model, batch, loss_fn is not None)
    with (
        warnings.catch_warnings(),
        clean_caches(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(recorder.costs.pack, lambda t: t),
        fake.mode,
        routed(calls),
        recorder,
    ):
        warnings.simplefilter("ignore", UserWarning)  # the real run will say them again
        outputs = model(*passed.args, **passed.kwargs)
        loss = find_loss(outputs, model) if loss_fn is None else loss_fn(outputs, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.dim() > 1:
        raise TraceError(f"loss_fn must give a scalar tensor, found {getattr(loss, 'shape', type(loss).__name__)}")
    names = {"loss": recorder.writer.nodes[id(loss)].name}
    for path, leaf in leaves(outputs).items():
        node = recorder.writer.nodes.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
        if node is not None and leaf is not loss:
            key = name_of(path).removeprefix("batch_") if path else "output"
            names["model_loss" if key == "loss" else key] = node.name  # a loss_fn's loss is the one that counts
    return recorder, calls, names


def _inputs(writer: Writer, fake: FakeModel, example: Any) -> Any:
    """A placeholder and a fake tensor for each tensor of the example."""
    example = distinct(example)
    paths = {id(leaf): path for path, leaf in leaves(example).items() if isinstance(leaf, torch.Tensor)}

    def new(tensor: torch.Tensor) -> torch.Tensor:
        stand_in = fake_like(fake.mode, tensor.detach(), writer.device)
        stand_in.requires_grad_(tensor.requires_grad)
        node = writer.graph.placeholder(name_of(paths[id(tensor)]))
        node.meta.update(index=len(writer.drafts), path=paths[id(tensor)])
        writer.inputs[node] = tensor
        draft = Draft(node.name, "input", node.name, "", node)
        writer.drafts.append(draft)
        writer.adopt(draft, node, stand_in)
        return stand_in

    return replace_tensors(example, new)
