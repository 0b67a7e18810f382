"""What a model does in its own way: begin, count its loss, be saved. Models of Hugging Face have such ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from merak_like.runtime.batches import LossWeight
from merak_like.runtime.initialising import Initialiser

Save = Callable[[nn.Module, Path, Mapping[str, Tensor]], None]


def habits(model: nn.Module) -> tuple[Initialiser | None, LossWeight | None, Save]:
    """How this model initialises a module, counts its loss (None: not its own way) and is saved."""
    if not hasattr(model, "config") or not hasattr(model, "_init_weights"):
        return None, None, save_safetensors
    from merak_like import hf

    return hf.initialiser(model), hf.loss_weight(model), hf.save_pretrained


def save_safetensors(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors``; a tensor known by several names is written once, under the first."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    first = {id(tensor): name for name, tensor in reversed(list(state.items()))}
    save_file({name: t.contiguous() for name, t in state.items() if first[id(t)] == name}, path / "model.safetensors")
