"""Low-rank adapters (LoRA, Hu et al. 2021, section 4.1) on a cloud half whose own weights are frozen.

    y = W x + b + (alpha / rank) B A x        A: rank x in, small numbers; B: out x rank, zeros

A layer keeps its name and its tensors theirs, and a trace sees one call of a module as before: the edge's trace is the
same whether the host adapts or not. Only layers that the half calls are adapted; one whose matrix is read by another
function, as attention of torch does, is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from merak_like.split.halves import Halves
from merak_like.split.messages import LoraText

A, B = "lora_a", "lora_b"


class Adapted(nn.Module):
    """Made the class of a layer, in front of its own: adds the product of two narrow matrices."""

    scale: float
    together: Sequence[tuple[int, Adapted]] = ()
    """In a pass for several sessions: how many rows come for which session's layer, in this order."""

    def forward(self, x: Tensor) -> Tensor:
        """Through the frozen matrix at once, through adapters each session's rows."""
        frozen: Tensor = super().forward(x)  # pyright: ignore[reportAttributeAccessIssue] - of the layer's own class
        if not self.together:
            return frozen + self.more(x)
        parts = x.split([rows for rows, _ in self.together])
        return frozen + torch.cat([one.more(part) for part, (_, one) in zip(parts, self.together, strict=True)])

    def more(self, x: Tensor) -> Tensor:
        """What the adapters add."""
        narrow = nn.functional.linear(x, self.get_parameter(A))
        return nn.functional.linear(narrow, self.get_parameter(B)) * self.scale


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that can be adapted; None for any other."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight, nn.Parameter):  # of GPT-2: its matrix lies on its side
        return weight.shape[0], weight.shape[1]
    return None


def places(halves: Halves, model: nn.Module, text: LoraText) -> dict[str, tuple[int, int]]:
    """The layers of the cloud's half that these adapters are for, with their sizes.

    Raises ValueError for a target that is none of them, naming those there are.
    """
    ops = halves.trace.graph.ops[halves.starts[1] : halves.starts[2]]
    called = {op.target: model.get_submodule(op.target) for op in ops if op.kind == "module"}
    found = {path: size for path, module in called.items() if (size := sizes(module)) is not None}
    kept = {p: s for p, s in found.items() if not text.targets or any(_ends(p, end) for end in text.targets)}
    idle = [end for end in text.targets if not any(_ends(path, end) for path in found)]
    if idle or not kept:
        raise ValueError(
            f"no layer of the cloud's half that can be adapted is called {', '.join(idle) or 'anything'}: there are "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in found})) or 'none'}"
        )
    return kept


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")


def bytes_of(halves: Halves, model: nn.Module, text: LoraText) -> int:
    """Bytes of the adapters' numbers."""
    found = places(halves, model, text)
    weights = {path: halves.trace.graph.parameter(halves.trace.graph.canonical[f"{path}.weight"]) for path in found}
    return sum(
        text.rank * sum(size) * (weights[path].nbytes // max(1, weights[path].numel)) for path, size in found.items()
    )


def adapt(model: nn.Module, halves: Halves, text: LoraText, *, seed: int, device: torch.device) -> None:
    """Freeze the cloud's half and put adapters on its layers; their first numbers depend on ``seed`` and the layer."""
    named = dict(model.named_parameters())
    for name in halves.params(1):
        if name in named:
            named[name].requires_grad_(False)
    for number, (path, (ins, outs)) in enumerate(sorted(places(halves, model, text).items())):
        layer = model.get_submodule(path)
        dtype = layer.get_parameter("weight").dtype
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        bound = math.sqrt(3.0 / ins)  # as a linear layer of torch draws
        a = (torch.rand(text.rank, ins, generator=draw) * 2 - 1) * bound
        layer.__class__ = type(f"Adapted{type(layer).__name__}", (Adapted, type(layer)), {})
        layer.register_parameter(A, nn.Parameter(a.to(device, dtype)))
        layer.register_parameter(B, nn.Parameter(torch.zeros(outs, text.rank, dtype=dtype, device=device)))
        layer.__dict__["scale"] = (2.0 * text.rank if text.alpha is None else text.alpha) / text.rank


def adapted(model: nn.Module) -> Mapping[str, Adapted]:
    """The adapted layers of a model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


@contextmanager
def pass_of(layers: Mapping[str, Adapted], each: Sequence[tuple[int, Mapping[str, Adapted]]]) -> Iterator[None]:
    """Inside, a model's adapted layers take rows for those of other models, in this order."""
    for path, layer in layers.items():
        layer.together = [(rows, found[path]) for rows, found in each]
    try:
        yield
    finally:
        for layer in layers.values():
            layer.together = ()
