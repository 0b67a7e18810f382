"""What training keeps for each parameter, by optimizer and precision, and what replicas share of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What training keeps for each trainable parameter, in multiples of the parameter's own bytes."""

    name: str
    gradients: float
    optimizer: float
    weights: float = 1.0
    """Less than 1 where replicas share them (ZeRO-3)."""

    def sharded(self, zero: int, dp: int) -> StateBytes:
        """The same where ``dp`` replicas share it: the optimizer's state from ZeRO level 1, gradients 2, weights 3.

        Rajbhandari et al. 2020, sec. 5.
        """
        parts = [1.0, self.gradients, self.optimizer]
        for level, place in ((1, 2), (2, 1), (3, 0)):
            parts[place] /= dp if zero >= level else 1
        return replace(self, weights=parts[0], gradients=parts[1], optimizer=parts[2])


STATES: Mapping[str, StateBytes] = {
    s.name: s
    for s in (
        StateBytes("adamw", 1, 2),  # fp32: weights 4 + gradients 4 + two moments 8 bytes per element
        StateBytes("adamw-mixed", 1, 6),  # bf16: weights 2 + gradients 2 + fp32 master and moments 12 bytes per element
        StateBytes("adamw-megatron", 2, 6),  # the same with fp32 gradients, 18 bytes (Narayanan et al. 2021)
        StateBytes("momentum", 1, 1),
        StateBytes("sgd", 1, 0),
    )
}
"""By optimizer."""
ADAMW = STATES["adamw"]
