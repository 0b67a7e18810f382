"""Which token follows: the likeliest, or one that is drawn as transformers draws it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sampling:
    """Chooses tokens; with one seed the same ones, and those of ``generate`` in transformers after ``manual_seed``."""

    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None
    """Only the likeliest tokens that have this probability together; at least one."""
    seed: int = 0
    _drawn: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for what is no choice."""
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(f"temperature {self.temperature} and top_k {self.top_k}: give 0 or more, and 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability above 0, found {self.top_p}")
        self._drawn = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor) -> list[int]:
        """A token for each row of (rows, words)."""
        logits = logits.float().cpu()
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        scaled = logits / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scaled.sort(descending=False)
            unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            unlikely[:, -1] = False
            scaled = scaled.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
        return torch.multinomial(scaled.softmax(-1), 1, generator=self._drawn)[:, 0].tolist()
