"""Models from folders: with the weights that are there, and new ones for what the folder does not have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from merak_like import hf


@dataclass(frozen=True)
class Loaded:
    """A model, and where each rank reads its own part of the weights (None: it has them, or starts anew)."""

    model: nn.Module
    weights: Path | None


def has_weights(folder: Path | None) -> bool:
    """Whether a folder has safetensors."""
    return folder is not None and folder.is_dir() and any(folder.glob("*.safetensors"))


def load(
    folder: Path | None, changes: Mapping[str, Any], *, task: str | None = None, dtype: str | None = None,
    pretrained: bool | None = None, seed: int = 0, whole: bool = False,
) -> Loaded:  # fmt: skip
    """The model of a ``config.json`` with ``changes``.

    With ``pretrained`` (None: if there are weights) it starts from the folder's weights. Where these are all that the
    model has, it stays on the meta device and every rank reads its own part; a model with parts that are not there,
    such as a new classifier, is loaded whole on the CPU, its new parts the same on every rank by ``seed``; so is any
    with ``whole``. Raises ValueError for a folder without weights that shall have some.
    """
    data = {**(hf.read_config(folder) if folder is not None else {}), **changes}
    if "model_type" not in data:
        raise ValueError(
            "model.config has no model_type, such as llama or gpt2: it says which model the fields are for"
        )
    if pretrained and not has_weights(folder):
        raise ValueError(f"model.pretrained, but {folder} has no safetensors files")
    model, _ = hf.from_config(data, batch=1, task=task, dtype=dtype)
    config, chosen = hf.configured(data, task)
    auto, wanted = getattr(transformers, chosen.auto), {} if dtype is None else {"dtype": getattr(torch, dtype)}
    torch.manual_seed(seed)
    if folder is None or not (has_weights(folder) if pretrained is None else pretrained):
        return Loaded(auto.from_config(config, **wanted).train() if whole else model, None)
    if not whole and not _missing(model, folder):
        return Loaded(model, folder)
    return Loaded(auto.from_pretrained(folder, config=config, local_files_only=True, **wanted).train(), None)


def _missing(model: Any, folder: Path) -> set[str]:
    """Names of weights that the folder does not have, under any of the names they may have there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        there = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    else:
        there: set[str] = set()
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                there |= set(file.keys())
    prefix = f"{model.base_model_prefix}."
    own = dict(model.state_dict(keep_vars=True))
    held = {id(t) for name, t in own.items() if {name, name.removeprefix(prefix), prefix + name} & there}
    return {name for name, tensor in own.items() if id(tensor) not in held}
