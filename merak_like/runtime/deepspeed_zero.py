"""DeepSpeed's ZeRO-1 optimizer on the replicas of each stage and shard, with its state on the device or on the CPU.

    backward      ours: gradients stay whole on every rank
    end of step   weights on several stages are summed by us; then DeepSpeed sums over the replicas and cuts
    update        the norm and clipping are ours; DeepSpeed lets the optimizer update each rank's run and gathers

DeepSpeed's own engine would count a tied weight twice in the norm and give weights without a gradient a zero one, so it
is not used. What is used are the names of ``DeepSpeedZeroOptimizer`` in 0.19, which are not promised to stay: each
layout that is offered has a test against one process (tests/test_deepspeed.py). Without deepspeed nothing here works.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like.runtime.flat import Dtypes
from merak_like.runtime.groups import Group
from merak_like.runtime.optimizer import Slot
from merak_like.runtime.tensor_parallel.copies import Copies
from merak_like.runtime.watch import Watch

VERSION = "0.19."
BUCKET = 5 * 10**7
"""Numbers in a bucket of DeepSpeed's: it makes a buffer of that size, its own default would be 2 GB."""


def load(device: torch.device) -> Any:
    """The deepspeed package, ready to talk over torch's process groups. Raises where it is missing or another one."""
    try:
        import deepspeed  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"zero_backend='deepspeed' needs deepspeed, but {error}: pip install 'merak-like[deepspeed]', or leave "
            "zero_backend out for our own zero=1",
            name=error.name,
        ) from None
    if not deepspeed.__version__.startswith(VERSION):
        raise ValueError(
            f"zero_backend='deepspeed' is tested with deepspeed {VERSION}x, but this is {deepspeed.__version__}: "
            "install that, or leave zero_backend out for our own zero=1"
        )
    from deepspeed.accelerator import get_accelerator  # pyright: ignore[reportMissingImports]

    found = get_accelerator().device_name()  # pyright: ignore[reportOptionalMemberAccess]
    if found != device.type:
        raise ValueError(
            f"deepspeed would run on {found}, the model is on {device.type}: set DS_ACCELERATOR={device.type}"
        )
    if device.type == "cpu":  # or its start would compile an op that copies through shared memory
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def cpu_adam(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """DeepSpeedCPUAdam, for ``auto_parallel(optimizer=...)``. Compiles its op at first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # pyright: ignore[reportMissingImports]

    return DeepSpeedCPUAdam(parameters, **options)


class DeepSpeedReducer:
    """Both the sums of gradients and the store of what the optimizer updates, on DeepSpeed's flat partitions."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Group], watch: Watch,
        optimizer: torch.optim.Optimizer, *, replicas: Group, dp: Group, dtypes: Dtypes, counted: Set[str],
        offload: bool, device: torch.device,
    ) -> None:  # fmt: skip
        """``replicas`` has this rank even where it is alone in it; ``dp`` is the same, or None then.

        ``counted`` are those of which this stage, and not another, answers in the norm and in checkpoints. Takes over
        the optimizer: it then updates ``slots``.
        """
        deepspeed = load(device)
        refuse(parameters, optimizer, dtypes)
        self.copies: Copies | None = None
        self._parameters, self._watch, self._replicas = parameters, watch, replicas
        self._names = {id(p): name for name, p in parameters.items()}
        self._lowered = [p for p in parameters.values() if dtypes(p)[0] != dtypes(p)[1]]
        whole = {name: p.data for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtypes(parameter)[0])
        self._shared: dict[int, tuple[Group, list[nn.Parameter]]] = {}
        for name, parameter in sorted(parameters.items()):
            if groups[name] is not None and groups[name] is not dp:
                self._shared.setdefault(id(groups[name]), (groups[name], []))[1].append(parameter)
        self._optimizer = optimizer
        self._members = [list(group["params"]) for group in optimizer.param_groups if group["params"]]
        self._all = list(optimizer.param_groups)
        self._offload, self._device = offload, device
        optimizer.param_groups[:] = [group for group in self._all if group["params"]]
        self._zero: Any = self._make(deepspeed, next(iter(parameters.values())))
        assert self._zero.optimizer is optimizer, "DeepSpeed made an optimizer of its own"
        self._zero._hp_optimizer_states_linked = True  # that is for DeepSpeed's own checkpoints
        for hook in self._zero._grad_acc_hooks:  # they count backwards, which are the engine's here
            hook.remove()
        self._hooks = [p.register_post_accumulate_grad_hook(_widen) for p in self._lowered]
        self.slots, self._sums = list[Slot](), list[Tensor]()
        self._places: list[list[tuple[Slot, int]]] = []
        for number, group in enumerate(optimizer.param_groups):
            cut = list(self._cut(number, counted))
            self._places.append(cut)
            self.slots += [slot for slot, _ in cut]
            group["params"] = [slot.target for slot, _ in cut]
            for slot, _ in cut:  # DeepSpeed has made them from weights that are rounded already
                slot.target.data.copy_(whole[slot.name].flatten()[slice(*slot.run or ())])
        optimizer.param_groups[:] = self._all

    def _make(self, deepspeed: Any, first: nn.Parameter) -> Any:
        from deepspeed.runtime.zero.offload_config import (  # pyright: ignore[reportMissingImports]
            DeepSpeedZeroOffloadOptimizerConfig,
        )
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # pyright: ignore[reportMissingImports]
        from deepspeed.utils.timer import NoopTimer  # pyright: ignore[reportMissingImports]

        pinned = first.device.type == "cuda"
        offload: Any = DeepSpeedZeroOffloadOptimizerConfig
        where = offload(device="cpu", pin_memory=pinned) if self._offload else None
        names = {p: name for name, p in self._parameters.items()}
        most = max(sum(p.numel() for p in members) for members in self._members)
        return DeepSpeedZeroOptimizer(
            self._optimizer, names, NoopTimer(), {}, verbose=False, contiguous_gradients=self._offload,
            reduce_bucket_size=min(BUCKET, most), allgather_bucket_size=2 * BUCKET, dp_process_group=self._replicas,
            reduce_scatter=True, overlap_comm=False, offload_optimizer_config=where, clip_grad=0.0,
            gradient_accumulation_dtype=torch.float32, communication_data_type=torch.float32, gradient_average=False,
            partition_grads=False, check_grad_overflow=False, compute_grad_norm=self._offload,
        )  # fmt: skip

    def _cut(self, number: int, counted: Set[str]) -> Iterator[tuple[Slot, int]]:
        """This rank's part of each weight of a group, and where it is in the rank's partition."""
        partition = self._zero.single_partition_of_fp32_groups[number].detach()
        size, members = partition.numel(), self._members[number]
        first = size * dist.get_rank(self._replicas)
        for start, p in zip(accumulate((p.numel() for p in members), initial=0), members, strict=False):
            a, b = max(start, first), min(start + p.numel(), first + size)
            if a < b:
                name = self._names[id(p)]
                target = nn.Parameter(partition.narrow(0, a - first, b - a))
                yield Slot(name, target, tuple(p.shape), (a - start, b - start), name in counted), a - first

    # --- gradients -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget the last step's gradients, also those of a step that failed."""
        self._sums.clear()
        for slot in self.slots:
            slot.target.grad = None
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        for number in list(zero.averaged_gradients):
            zero.averaged_gradients[number] = zero.all_grad_tensors[number] = None
        if self._offload:
            zero.reset_cpu_buffers()
            for partition in zero.single_partition_of_fp32_groups:
                partition.grad.zero_()

    def enter(self, stage: int, *, last: bool, whole: bool) -> None:
        """Nothing is summed before the end: DeepSpeed's sums behind the backward count backwards by themselves."""

    @torch.no_grad()
    def finish(self) -> None:
        """Sum over stages, then let DeepSpeed sum over replicas and cut; every slot gets its gradient.

        Raises ValueError for a weight that no replica has a gradient for.
        """
        self._fill()
        for group, parameters in self._shared.values():
            flat = torch.cat([_gradient_of(p).flatten() for p in parameters])
            work = dist.all_reduce(flat, group=group, async_op=True)
            self._watch.wait(work, "the sum of gradients of weights on several stages", "with the ranks that hold them")
            flat /= dist.get_world_size(self._replicas)  # which DeepSpeed is about to sum over
            for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                _gradient_of(p).copy_(total.view_as(p))
        with self._watch.waiting("DeepSpeed's sum of gradients over the replicas"):
            self._zero.reduce_gradients(pipeline_parallel=True)
        self._sums = [self._own(number) for number in range(len(self._places))]
        for flat, places in zip(self._sums, self._places, strict=True):
            for slot, at in places:
                slot.target.grad = flat.narrow(0, at, slot.target.numel())
        if self.copies is not None:
            self.copies.add_up()

    def _own(self, number: int) -> Tensor:
        """The summed gradients of this rank's partition, as the memory that DeepSpeed hands to the optimizer."""
        if self._offload:
            return self._zero.single_partition_of_fp32_groups[number].grad
        found = self._zero.averaged_gradients[number]
        flat = getattr(found, "flat_partition", None)
        return torch.cat([piece.flatten() for piece in found]) if flat is None else flat

    def _fill(self) -> None:
        """DeepSpeed wants gradients of the same weights on all replicas: zeros where only another has one."""
        counts = {id(p): float(_gradient_of(p) is not None) for p in self._parameters.values()}
        shared = {id(p) for _, parameters in self._shared.values() for p in parameters}
        alone = [p for p in self._parameters.values() if id(p) not in shared]
        for group, parameters in ((self._replicas, alone), *self._shared.values()):
            told = torch.tensor([counts[id(p)] for p in parameters], device=self._device)
            work = dist.all_reduce(told, group=group, async_op=True)
            self._watch.wait(work, "who has which gradient", "with the ranks that hold the same parameters")
            counts.update(zip(map(id, parameters), told.tolist(), strict=True))
        missing = [name for name, p in self._parameters.items() if not counts[id(p)]]
        if missing:
            raise ValueError(
                f"{missing[:3]} ({len(missing)} weights) have no gradient, and DeepSpeed would let them decay with a "
                "zero one: freeze them (requires_grad_(False)), or leave zero_backend out for our own zero=1"
            )
        for p in self._parameters.values():
            if _gradient_of(p) is None:
                empty = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
                if p.dtype == torch.float32:
                    p.grad = empty
                else:
                    p.grad_accum = empty  # type: ignore[attr-defined]

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor | None]:
        """The last step's gradients by name, whole; every rank asks."""
        found: dict[str, Tensor | None] = {}
        for flat, members in zip(self._sums, self._members, strict=True):
            whole = flat.new_empty(flat.numel() * dist.get_world_size(self._replicas))
            parts = list(whole.chunk(dist.get_world_size(self._replicas)))
            work = dist.all_gather(parts, flat, group=self._replicas, async_op=True)
            self._watch.wait(work, "the gradients of a group", "from the replicas")
            starts = accumulate((p.numel() for p in members), initial=0)
            for start, p in zip(starts, members, strict=False):
                found[self._names[id(p)]] = whole.narrow(0, start, p.numel()).view(p.shape)
        return found

    def close(self) -> None:
        """Leave the parameters alone, and let go of the groups."""
        for hook in self._hooks:
            hook.remove()
        self._shared.clear()
        self._zero = None

    # --- weights -------------------------------------------------------------------------------------------------

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's step on the slots and bring the new weights to all replicas."""
        if not self._offload:
            self._zero.averaged_gradients.update((i, _Flat(flat)) for i, flat in enumerate(self._sums))
        with self._groups(), self._watch.waiting("DeepSpeed's step, which gathers new weights"):
            self._zero.step()

    def publish(self) -> None:
        """Bring what the targets have into the parameters of all replicas."""
        with self._groups(), self._watch.waiting("DeepSpeed's gathering of weights"):
            self._zero.update_lp_params()

    @contextmanager
    def _groups(self) -> Iterator[None]:
        """DeepSpeed knows only the groups of the optimizer that have weights on this rank."""
        groups = self._optimizer.param_groups
        groups[:] = [group for group in self._all if group["params"]]
        try:
            yield
        finally:
            groups[:] = self._all


class _Flat(NamedTuple):
    """Gradients that are one flat partition already, as DeepSpeed asks for them."""

    flat_partition: Tensor


def refuse(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, dtypes: Dtypes) -> None:
    """Raise ValueError for what DeepSpeed would not compute as one process does."""
    kinds = {dtypes(p) for p in parameters.values()}
    if len(kinds) > 1 or any(full != torch.float32 for _, full in kinds):
        told = sorted(f"{compute} updated in {full}" for compute, full in kinds)
        raise ValueError(
            f"zero_backend='deepspeed' keeps weights in float32, but they are {', '.join(told)}: use a model in "
            "float32, with precision= if it shall compute in less, or leave zero_backend out for our own zero=1"
        )
    if type(optimizer).__name__ == "Adagrad":
        raise ValueError(
            "zero_backend='deepspeed' would make a new Adagrad without its groups: use another optimizer, or leave "
            "zero_backend out for our own zero=1"
        )


def _gradient_of(parameter: nn.Parameter) -> Any:
    """What has been summed so far, in float32; None if nothing."""
    return parameter.grad if parameter.dtype == torch.float32 else getattr(parameter, "grad_accum", None)


def _widen(parameter: Any) -> None:
    """After each backward: add what the computation's precision gave to the sum in float32."""
    gradient = parameter.grad.float()
    parameter.grad_accum = gradient if parameter.grad_accum is None else parameter.grad_accum.add_(gradient)
    parameter.grad = None
