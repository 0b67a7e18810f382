"""What a rank learns with: its gradients' sums, what the optimizer updates, and where that lies, by who spreads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merak_like.runtime.data_parallel import Gradients, Reducer
from merak_like.runtime.deepspeed_zero import DeepSpeedReducer
from merak_like.runtime.fully_sharded import FullySharded, Whole
from merak_like.runtime.groups import Group, Groups
from merak_like.runtime.optimizer import OptimizerFactory, Slot, Store, as_it_is
from merak_like.runtime.precision import Precision
from merak_like.runtime.spreading import Spreading
from merak_like.runtime.tensor_parallel.sharding import Sharding
from merak_like.runtime.watch import Watch
from merak_like.runtime.zero import FlatReducer, refuse_unsuited, retarget


@dataclass(frozen=True)
class Learning:
    """One rank's."""

    parameters: Mapping[str, nn.Parameter]
    """Those that are trained."""
    reducer: Gradients
    slots: list[Slot]
    optimizer: torch.optim.Optimizer | None
    store: Store | None = None
    whole: Callable[[str, Tensor], Tensor] = as_it_is
    """A named tensor of the model, whole on the first replica; every replica asks."""


@dataclass(frozen=True)
class Held:
    """The parameters of a rank that are trained, and who else has them."""

    parameters: Mapping[str, nn.Parameter]
    groups: Mapping[str, Group]
    """The ranks that hold the same, by name; None for this rank alone."""
    readers: Mapping[str, Set[int]]
    """The stages of this rank that read them."""
    answered: Set[str]
    """Those for which this stage, and no other, answers."""
    pending: Counter[int]


def learning(
    model: nn.Module, held: Held, factory: OptimizerFactory | None, spread: Spreading, precise: Precision,
    parts: Sharding, groups: Groups, watch: Watch, device: torch.device, called: Set[str],
) -> Learning:  # fmt: skip
    """Make it. ``called`` are the modules that the model's forward calls.

    Raises ValueError for an optimizer or weights that do not go with how they are to be spread.
    """
    trained, dp = held.parameters, groups.sums.get(((), ()))
    optimizer = factory(trained.values()) if factory and trained else None
    if optimizer is not None and spread.zero:
        refuse_unsuited(optimizer, spread.zero)
    if optimizer is not None and spread.deepspeed:
        by_deepspeed = DeepSpeedReducer(
            trained, held.groups, watch, optimizer, replicas=groups.replicas, dp=dp, dtypes=precise.dtypes,
            counted=held.answered, offload=spread.offload, device=device,
        )  # fmt: skip
        by_deepspeed.copies = parts.copies(by_deepspeed.slots, groups, watch)
        return Learning(trained, by_deepspeed, by_deepspeed.slots, optimizer, by_deepspeed)
    in_norm = held.answered if groups.coord.dp == 0 else frozenset[str]()
    if isinstance(parts, Whole):
        rows = FullySharded(model, trained, watch, dp, device, precise.compute, called)
        if optimizer is not None:
            retarget(optimizer, trained, rows.slots)
        return Learning(rows.parameters, rows, rows.slots, optimizer, rows, rows.whole)
    if spread.zero or precise.compute is not None:
        flat = FlatReducer(
            trained, held.groups, watch, held.readers, held.pending, zero=spread.zero, dtypes=precise.dtypes,
            counted=in_norm, dp=dp, whole={name for name in trained if parts.partial(name)},
        )  # fmt: skip
        flat.copies = parts.copies(flat.slots, groups, watch)
        if optimizer is not None:
            retarget(optimizer, trained, flat.slots)
        return Learning(trained, flat, flat.slots, optimizer, flat)
    slots = [Slot(name, p, tuple(p.shape), counted=name in in_norm) for name, p in trained.items()]
    copies = parts.copies(slots, groups, watch)
    return Learning(trained, Reducer(trained, held.groups, watch, held.readers, held.pending, copies), slots, optimizer)
