"""The C3-score (Chopra et al. 2021, arXiv 2112.01637): accuracy, bandwidth and the client's compute in one.

The paper names the three and the budgets; the form here, an exponential of shares of the budgets, is as reported of it,
and its text was not at hand. So a score says with which temperature and budgets it was made.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

TEMPERATURE = 8.0
"""How slowly the score falls with what is spent; ours, stated with every score."""


@dataclass(frozen=True)
class Spent:
    """What a run reached and took, beside the most that it could have taken."""

    accuracy: float
    wire_bytes: float
    client_flops: float
    most_bytes: float
    """Budget: of the dearest run that it is compared with."""
    most_flops: float
    temperature: float = TEMPERATURE

    @property
    def c3_score(self) -> float:
        """accuracy * exp(-(bytes / most bytes + flops / most flops) / temperature).

        Raises ValueError without budgets.
        """
        if min(self.most_bytes, self.most_flops, self.temperature) <= 0:
            raise ValueError(f"budgets and temperature are above 0, found {self}")
        spent = self.wire_bytes / self.most_bytes + self.client_flops / self.most_flops
        return self.accuracy * math.exp(-spent / self.temperature)


def note(folder: Path, step: int, spent: Spent) -> None:
    """A line for ``merak report``: the score, and all that it is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"step": step, **asdict(spent), "c3_score": spent.c3_score})
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
