"""Which clients a server hears next: those it does worst on, and those it has not heard for long.

AdaSplit (Chopra et al. 2021, arXiv 2112.01637) asks a bandit. For each client there are discounted sums of its losses
``l`` and of its visits ``s``, and those with the largest upper bounds ``l / s + sqrt(2 ln T / s)`` are heard, T the
discounted number of all rounds: the bound of UCB-CS (Cho et al. 2020, arXiv 2012.08009) without its two factors, a
client's share of the data and the largest deviation of a loss. A client that was not heard counts with the mean of its
last two losses. The paper's own text was not at hand: this was held against public code of the method, which keeps the
same sums and has the same two rules for clients that were not heard, lately or ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Chooser:
    """The discounted upper bounds of some clients."""

    def __init__(self, clients: int, decay: float = 0.87) -> None:
        """Raises ValueError for no clients, and for a decay that does not forget or forgets all."""
        if clients < 1 or not 0 < decay < 1:
            raise ValueError(
                f"{clients} clients and a decay of {decay}: give at least one, and a number between 0 and 1"
            )
        self.decay = decay
        self.visits = [0] * clients
        """How often each was heard."""
        self._losses, self._weights = [0.0] * clients, [0.0] * clients
        self._last = [(0.0, 0.0)] * clients
        self._rounds = 0.0

    def state(self) -> dict[str, Any]:
        """All that it knows, as JSON has it."""
        return {
            "visits": list(self.visits), "losses": list(self._losses), "weights": list(self._weights),
            "last": [list(pair) for pair in self._last], "rounds": self._rounds,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was asked for. Raises ValueError where that was of others."""
        if len(state["visits"]) != len(self.visits):
            raise ValueError(f"there were {len(state['visits'])} clients to choose from, now {len(self.visits)}")
        self.visits, self._losses, self._weights = (list(state[key]) for key in ("visits", "losses", "weights"))
        self._last = [(float(before), float(last)) for before, last in state["last"]]
        self._rounds = float(state["rounds"])

    def bounds(self) -> list[float]:
        """Of each client; one that was never heard comes before all others."""
        more = 2 * math.log(max(self._rounds, 1.0))
        return [
            math.inf if not visits else loss / weight + math.sqrt(more / weight)
            for loss, weight, visits in zip(self._losses, self._weights, self.visits, strict=True)
        ]

    def choose(self, count: int) -> list[int]:
        """So many clients, the largest bound first; of equal ones the first."""
        bounds = self.bounds()
        return sorted(range(len(bounds)), key=lambda client: -bounds[client])[:count]

    def heard(self, losses: Mapping[int, float]) -> None:
        """One round is over: the losses of the clients that were heard."""
        self._rounds = self.decay * self._rounds + 1
        for client, (before, last) in enumerate(self._last):
            was = client in losses
            loss = losses[client] if was else (before + last) / 2
            self.visits[client] += was
            self._weights[client] = self.decay * self._weights[client] + was
            self._losses[client] = self.decay * self._losses[client] + loss
            self._last[client] = (loss, loss) if self.visits[client] == 1 and was else (last, loss)
