"""ZeRO-3 by torch's ``fully_shard``: weights, gradients and the optimizer's state over the replicas, with pp = tp = 1.

    forward    a block's weights are gathered before it runs and let go after
    backward   gathered again; its gradients are summed over the replicas after every micro-batch, each keeps its rows
    update     the optimizer updates plain tensors that share the memory of this rank's rows

``fully_shard`` works by hooks on calls of the user's modules, and a stage is code that calls some of them only. So the
model is called whole here, which is what a pipeline of one stage is. It is traced on a copy without memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import schedule_of
from merak_like.partitioner.schedules.action import Kind
from merak_like.partitioner.tracer import LossFn, Trace, trace
from merak_like.partitioner.tracer.example import arguments, find_loss, leaves, name_of
from merak_like.runtime.batches import to_device
from merak_like.runtime.exchange import all_gather, reduce_scatter
from merak_like.runtime.groups import Group, Groups
from merak_like.runtime.optimizer import Slot
from merak_like.runtime.prepared import Prepared, Ranges, StageLike
from merak_like.runtime.shared_rows import whole
from merak_like.runtime.tensor_parallel.blueprint import on_meta
from merak_like.runtime.tensor_parallel.sharding import Prepare, Unsharded
from merak_like.runtime.watch import Watch


class WholeCode:
    """A stage that receives and sends nothing."""

    received: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()
    results: Collection[str] = ("loss",)


class WholeModel:
    """The one stage, run by calling the model."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, device: torch.device) -> None:
        self.code = WholeCode()
        self._model, self._loss_fn, self._device = model, loss_fn, device
        self._live: dict[int, Tensor] = {}

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """Run one micro-batch; the loss and the outputs, by name, detached."""
        assert not put_off, "refused before"
        batch = to_device(batch, self._device)
        passed = arguments(self._model, batch, self._loss_fn is not None)
        outputs = self._model(*passed.args, **passed.kwargs)
        loss = find_loss(outputs, self._model) if self._loss_fn is None else self._loss_fn(outputs, batch)
        if torch.is_grad_enabled():
            self._live[micro_batch] = loss
        made = {"loss": loss.detach()}
        for path, leaf in leaves(outputs).items():
            if isinstance(leaf, Tensor) and leaf is not loss:
                key = name_of(path).removeprefix("batch_") if path else "output"
                made["model_loss" if key == "loss" else key] = leaf.detach()
        self.code.results = tuple(made)
        return made

    def recompute(self, micro_batch: int) -> None:
        """Nothing: plans with recompute are refused."""

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch backward from the gradient of its loss."""
        self._live.pop(micro_batch).backward(gradients["loss"])
        return {}

    def weight(self, micro_batch: int) -> None:
        """Nothing: schedules with a W are refused."""
        raise AssertionError("refused before")


class Whole(Unsharded):
    """A model that will be called whole; what it looks like is asked of a copy without memory."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None) -> None:
        super().__init__(model, loss_fn, fuse=False)  # no stage code, no kernels in it
        self.blueprint = on_meta(model)

    def trace(self, batch: Any, device: torch.device | str) -> Trace:
        for ours, theirs in zip(self.model.modules(), self.blueprint.modules(), strict=True):
            theirs.training = ours.training
        return trace(self.blueprint, batch, self.loss_fn, device=device, fuse=self.fuse)

    def check(self, plan: Plan) -> None:
        """Raise ValueError for a plan of more than one stage, or one that puts gradients of weights off."""
        order = schedule_of(plan)
        if len(order.stage_rank) > 1 or order.apart(Kind.W):
            raise ValueError(
                f"zero=3 calls the model whole, in one stage and with whole backwards; schedule {plan.schedule!r} has "
                "others: use 1f1b or gpipe, or zero=2"
            )

    def prepare(self, groups: Groups, watch: Watch) -> Prepare:
        def make(index: int, again: Ranges, device: torch.device, pending: Counter[int] | None) -> StageLike:
            if again:
                raise ValueError(
                    "zero=3 calls the model whole and keeps all activations, but the plan computes some again: pass "
                    "recompute='none', or use torch's checkpoint in the model"
                )
            return WholeModel(self.model, self.loss_fn, device)

        return lambda traced, starts, batch: Prepared(traced, make, lambda batch: True)


class _Comm:
    """A collective of ``fully_shard``, waited for under the watch; torch asks where its memory comes from, too."""

    def __init__(self, watch: Watch, what: str) -> None:
        self._watch, self._what = watch, what

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for what is sent or comes."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _flying(self, start: Callable[[], Any], async_op: bool) -> Any:
        with self._watch.waiting(f"the start of {self._what}"):
            work = start()
        waited = _Waited(work, self._watch, self._what)
        if async_op:
            return waited
        waited.wait()
        return None


class _Waited(dist.Work):
    """A collective on its way; whoever waits for it is told what is missing and from whom."""

    def __init__(self, work: Any, watch: Watch, what: str) -> None:
        super().__init__()
        self._work, self._watch, self._what = work, watch, what

    def wait(self, timeout: Any = None) -> bool:
        self._watch.wait(self._work, self._what, "with the replicas")
        return True


class _Gather(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return self._flying(partial(all_gather, output_tensor, input_tensor, group), async_op)


class _ReduceScatter(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:  # fmt: skip
        assert op == dist.ReduceOp.SUM, "micro-batches come with their share of the whole batch"
        return self._flying(partial(reduce_scatter, output_tensor, input_tensor, group), async_op)


class FullySharded:
    """Both the sums of gradients and the store of what the optimizer updates, on ``fully_shard``'s rows."""

    def __init__(
        self, model: nn.Module, trained: Mapping[str, nn.Parameter], watch: Watch, group: Group,
        device: torch.device, compute: torch.dtype | None, called: Iterable[str],
    ) -> None:  # fmt: skip
        """Shards the model in place, frozen parameters excepted; ``called`` are the modules that its forward calls."""
        mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("dp",))
        policy = MixedPrecisionPolicy()
        if compute is not None:
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mine = {id(p) for p in trained.values()}
        frozen = {p for p in model.parameters() if id(p) not in mine}
        for path in blocks(model, called):
            fully_shard(model.get_submodule(path), mesh=mesh, mp_policy=policy, ignored_params=frozen)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)  # micro-batches come with their share of the whole batch
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_all_gather(_Gather(watch, "the weights of a block"))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(_ReduceScatter(watch, "the gradients of a block"))  # type: ignore[arg-type]
        self._watch, self._group = watch, group
        self.parameters = {name: model.get_parameter(name) for name in trained}
        self.slots: list[Slot] = []
        self._places: list[tuple[Slot, nn.Parameter]] = []
        for name, parameter in self.parameters.items():
            slot = _slot(name, parameter, trained[name].shape, mesh)
            if slot is not None:
                self.slots.append(slot)
                self._places.append((slot, parameter))

    def begin(self) -> None:
        """Forget the last step's gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for slot in self.slots:
            slot.target.grad = None

    def enter(self, stage: int, *, last: bool, whole: bool) -> None:
        """Nothing: ``fully_shard`` sums in the backward."""

    def finish(self) -> None:
        """Give every slot the gradient of its rows."""
        for slot, parameter in self._places:
            slot.target.grad = None if parameter.grad is None else _rows(parameter.grad)

    def gradients(self) -> dict[str, Tensor | None]:
        """The last step's gradients by name, whole on the first replica and empty on the others; every rank asks."""
        return {
            name: self.whole(name, parameter.grad)
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model, whole on the first replica; every rank asks."""
        return whole(tensor, name, self._group, self._watch)

    def close(self) -> None:
        """Let go of the gradients; the model stays sharded."""
        self.begin()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's step: the weights are gathered when they are next needed."""
        optimizer.step()

    def publish(self) -> None:
        """What is gathered now is of weights before."""
        for module in self._modules:
            module.reshard()


def _slot(name: str, parameter: nn.Parameter, shape: Sequence[int], mesh: DeviceMesh) -> Slot | None:
    """This rank's rows of a parameter as the optimizer has them; None if it has none."""
    assert isinstance(parameter, DTensor)
    flat = _rows(parameter)
    if not flat.numel():
        return None
    row, count = prod(shape[1:]), -(-shape[0] // mesh.size())  # rows of every rank but the last ones
    start = mesh.get_local_rank() * count * row
    return Slot(name, nn.Parameter(flat), tuple(shape), (start, start + flat.numel()))


def _rows(tensor: Any) -> Tensor:
    return tensor.to_local().detach().view(-1)


def blocks(model: nn.Module, called: Iterable[str]) -> list[str]:
    """The outermost members of lists of modules that are called and whose weights nothing else has."""
    paths, found = set(called), list[str]()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def walk(module: nn.Module, before: str) -> None:
        for name, child in module.named_children():
            path = f"{before}{name}"
            own = Counter(id(p) for _, p in child.named_parameters(remove_duplicate=False))
            alone = all(uses[key] == count for key, count in own.items())
            if isinstance(module, nn.ModuleList) and path in paths and own and alone:
                found.append(path)
            else:
                walk(child, f"{path}.")

    walk(model, "")
    return found
