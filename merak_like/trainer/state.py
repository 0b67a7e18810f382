"""Where a run stands, and what it has been asked to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class State:
    """All that the loop itself must remember to go on; small enough for JSON."""

    steps: int
    """Of the whole run."""
    step: int = 0
    """Steps done."""
    position: int = 0
    """Samples trained: the place in the data."""
    items: int = 0
    """Tokens (or samples) that losses were the mean of."""
    skipped: int = 0
    """Steps left out because something was not finite."""
    loss: float = 0.0
    """Sum of the losses since the last line of the log."""
    losses: int = 0
    """Of so many steps."""
    owed: bool = False
    """Whether an evaluation of this step was cut short, or not begun, because the run was told to end."""
    best: float | None = None
    best_step: int | None = None
    best_in: str | None = None
    """The folder of its checkpoint where that is another run's, from which this one went on."""
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """Every line that was logged."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        """From ``to_json``."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    def mean_loss(self) -> float:
        """Of the steps since this was last asked."""
        mean, self.loss, self.losses = self.loss / max(self.losses, 1), 0.0, 0
        return mean


@dataclass
class Control:
    """What is due; callbacks may change it."""

    log: bool = False
    evaluate: bool = False
    save: bool = False
    stop: bool = False


def due(every: int | None, state: State, *, at_end: bool = True) -> bool:
    """Whether something that happens every so many steps happens now."""
    last = at_end and state.step == state.steps
    return last or (every is not None and state.step % every == 0)
