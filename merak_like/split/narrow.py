"""A changed layer (SFT) on both sides of a cut from one unchanged checkpoint, each side with its own factors alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from merak_like.partitioner.tracer import trace
from merak_like.runtime.materialize import read
from merak_like.split.cut import Cut
from merak_like.split.feed_forward import find_feed_forward
from merak_like.split.fisher import read_fisher
from merak_like.split.sft import PLAIN, sft

if TYPE_CHECKING:
    from merak_like.split.half import Source
    from merak_like.split.messages import Task


def narrow(
    model: nn.Module, micro: Any, cut: Cut, source: Source, task: Task, side: Literal["edge", "host"]
) -> tuple[float, ...]:
    """Change the layer of the cut, if it has a rank; what its narrow place makes of a fixed vector.

    Both sides factor the same matrix; that they found the same factors the vector shows, since a decomposition is only
    unique up to signs and may differ between machines. The layer's first matrices are read for that even where the rest
    of the model is on the meta device. The task says how the source's Fisher information weighs the factors.
    """
    if cut.rank is None:
        if task.weigh != PLAIN:
            raise ValueError(f"weigh {task.weigh!r} is how a changed layer is factored, and the cut {cut} changes none")
        return ()
    if task.weigh != PLAIN and source.fisher is None:
        raise ValueError(
            f"weigh {task.weigh!r} needs the layer's Fisher information on both sides: the file of `merak edge "
            "fisher`, as fisher: in edge.yaml and as --fisher of `merak serve`"
        )
    if source.weights is not None:
        found = find_feed_forward(trace(model, micro, source.loss_fn).graph, model, cut.front)
        for path in found.first:
            module = model.get_submodule(path)
            for key, parameter in list(module.named_parameters(recurse=False)):
                real = torch.empty_like(parameter, device="cpu")
                module.register_parameter(key, nn.Parameter(real, parameter.requires_grad))
        names = {f"{path}.{key}" for path in found.first for key, _ in model.get_submodule(path).named_parameters()}
        read(model, {n: p for n, p in model.named_parameters() if n in names}, source.weights)
    if any(p.is_meta for p in model.get_submodule(cut.front).parameters()) and source.weights is None:
        raise ValueError(f"the cut {cut} factors a matrix of {cut.front}: give the folder of its weights")
    given: dict[str, Any] = {}
    if task.weigh != PLAIN and source.fisher is not None:
        given = {"weigh": task.weigh, "fisher": read_fisher(source.fisher)}
    sft(model, micro, cut.front, cut.rank, skip=task.skip, loss_fn=source.loss_fn, **given)
    wire = model.get_submodule(f"{cut.front}.wire")
    weight = wire.get_parameter("v.weight")
    fixed = torch.linspace(-1.0, 1.0, weight.shape[1], dtype=torch.float64)
    with torch.no_grad():
        probe = wire.get_parameter("s.weight").double() @ (weight.double() @ fixed)
    return tuple(float(x) for x in probe)


def same(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """Whether two sides found the same factors, up to rounding."""
    if len(mine) != len(theirs):
        return False
    a, b = torch.tensor(mine, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max() if len(mine) else 0.0)))
