"""Who is told what happens in a run, and may change what is due: transformers' callbacks, behind their door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from merak_like.runtime.engine import Engine
from merak_like.trainer.settings import Settings
from merak_like.trainer.state import Control, State


class Events(Protocol):
    """Somebody who is told what happens, and may change what is due."""

    def fire(self, event: str, state: State, control: Control, **more: Any) -> None:
        """``event`` is a name of transformers' callbacks without its ``on_``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What they must remember to go on, as plain data."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Remember it."""
        ...


class Nobody:
    """Without callbacks there is nobody to tell, and nothing to remember."""

    def fire(self, event: str, state: State, control: Control, **more: Any) -> None:
        """Nothing happens."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """What callbacks of an earlier life remembered is of no use."""


class Rates:
    """The learning rate that was set last, under the name that callbacks know from torch's schedulers."""

    def __init__(self) -> None:
        self.last = 0.0

    def get_last_lr(self) -> list[float]:
        """The rate."""
        return [self.last]


def listeners(
    callbacks: Sequence[Any], args: Settings, model: nn.Module, engine: Engine, rates: Rates, tokenizer: Any,
    samples: int,
) -> Events:  # fmt: skip
    """Those who listen to a run."""
    if not callbacks:
        return Nobody()
    from merak_like.hf.callbacks import Callbacks

    return Callbacks(
        callbacks, args, model, optimizer=engine.optimizer, rates=rates, tokenizer=tokenizer,
        lead=engine.world.rank == 0, samples=samples,
    )  # fmt: skip
