"""How transformers' loop goes on: its checkpoints have the engine's in them, its optimizer is a view of it.

output_dir/checkpoint-40/   model.safetensors, config.json, trainer_state.json, ...    transformers' own
                            engine/step-00000040                                       what the engine needs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from merak_like.runtime.checkpoint.folder import candidates, complete
from merak_like.runtime.engine import Engine

ENGINE = "engine"
"""The folder in a checkpoint of transformers that has what the engine needs."""


def take_up(engine: Engine, scheduler: Any, checkpoint: Path) -> None:
    """Bring the engine and the schedule to a checkpoint. Raises ValueError for one that HFTrainer did not write."""
    if not (checkpoint / ENGINE).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} has no {ENGINE}/: it was not written by HFTrainer, or with "
            "save_only_model; to start from its weights, build the model from it"
        )
    saved = engine.load(checkpoint / ENGINE).state["schedule"]
    own: Any = scheduler.state_dict()
    fits = lambda k: not isinstance(own.get(k), list) or len(saved[k]) == len(own[k])  # noqa: E731  # see View
    scheduler.load_state_dict({k: v if fits(k) else own[k] for k, v in saved.items()})


def newest(folder: Path) -> Path:
    """The newest checkpoint in an output folder that was written to its end. Raises ValueError if there is none."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if (path / TRAINER_STATE_NAME).is_file() and any(map(complete, candidates(path / ENGINE))):
            return path
    raise ValueError(f"resume_from_checkpoint=True: there is no whole checkpoint of HFTrainer in {folder}")


class View(torch.optim.Optimizer):
    """The engine's optimizer for transformers' loop to look at: its groups and rates, but no step of its own."""

    def __init__(self, inner: torch.optim.Optimizer | None, lr: float) -> None:
        alone = [{"params": [nn.Parameter(torch.zeros(()))], "lr": lr}]  # of a rank that trains nothing
        super().__init__(inner.param_groups if inner else alone, {"lr": lr})
        if inner is not None:
            self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The engine has already done it."""
