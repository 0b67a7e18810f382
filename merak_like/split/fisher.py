"""Which numbers of the changed layer matter: its Fisher information, measured once, for both sides to factor by.

    whole model + some batches ──► mean squared gradients of the layer's first matrices ──► a file that both sides have

It takes all weights and the data in one place, for a few passes; then edge and host each factor the same checkpoint by
the same file (``sft``), and compare. The file tells of the data what mean squares of gradients tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merak_like.habits import habits
from merak_like.partitioner.tracer import trace
from merak_like.partitioner.tracer.example import arguments, find_loss
from merak_like.runtime.materialize import fill
from merak_like.split.cut import Cut
from merak_like.split.feed_forward import find_feed_forward
from merak_like.split.low_rank import fisher_information

if TYPE_CHECKING:
    from merak_like.split.half import Source


def fisher_of(source: Source, cut: Cut, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The information of the first matrices of the cut's layer, by parameter name, in evaluation mode.

    Raises ValueError for a cut that changes no layer.
    """
    if cut.rank is None:
        raise ValueError(f"the cut {cut} changes no layer, so there is nothing to factor: FRONT@RANK does")
    model = source.build().train()
    graph = trace(model, batches[0], source.loss_fn).graph
    names = [f"{path}.weight" for path in find_feed_forward(graph, model, cut.front).first]
    first = [p.name for p in graph.parameters]
    device, initialise = torch.device("cpu"), habits(model)[0]
    fill(model, first, graph.ties, device, seed=0, initialise=initialise, weights=source.weights)
    return fisher_information(model.eval(), names, batches, lambda some, batch: _loss(some, batch, source))


def _loss(model: nn.Module, batch: Any, source: Source) -> Tensor:
    given = arguments(model, batch, source.loss_fn is not None)
    out = model(*given.args, **given.kwargs)
    return find_loss(out, model) if source.loss_fn is None else source.loss_fn(out, batch)


def read_fisher(path: str | Path) -> dict[str, Tensor]:
    """Read a file of ``merak edge fisher``. Raises ValueError for none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of `merak edge fisher`: {error}") from None
