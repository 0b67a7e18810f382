"""Whose samples the rows of a step are, for codecs that remember what a sample's last visit gave.

    samples   7 4 9 4 1 0   a number for each row of the batch, the same at each of a sample's visits
    parts     7 4|9 4|1 0   those of a replica's micro-batches
    names     7 4|9 4'1 0   the second row of a sample in a step is another sample, with a memory of its own

All ranks are told the same, so both ends of a link name a transfer's rows alike without sending a name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from merak_like.runtime.batches import filled, rows
from merak_like.runtime.codecs import codec

Numbers = Sequence[int] | Tensor | None
"""Of the samples of a batch, row by row."""
MOST = 2**48
"""Samples that can be told apart; what is above it in an id of 63 bits counts a sample's rows in one step."""


class Names:
    """Of the training step under way, the samples of each micro-batch that this replica runs."""

    def __init__(self, text: str | None = None) -> None:
        """``text`` is what the links' codec is made of; None: there is none."""
        self.text, self.needed = text, text is not None and codec(text).remembers
        """And whether it remembers samples, so that each step must be told them."""
        self.each: Sequence[tuple[int, ...]] = ()

    def tell(self, samples: Numbers, parts: Sequence[Any], weights: Sequence[int], own: Sequence[int]) -> None:
        """A step begins with these micro-batches, of which this replica runs ``own``.

        Raises ValueError where a codec needs names and there are none, and for names that are not one a row.
        """
        self.each = ()
        if samples is None:
            if self.needed:
                raise ValueError(
                    f"codec={self.text!r} remembers every sample, and nobody says whose rows these are: call "
                    "engine.step(batch, samples=[...]) with a number for each row of the batch, the same at each of a "
                    "sample's visits, such as its position in the data"
                )
            return
        ids = [int(one) for one in (samples.tolist() if isinstance(samples, Tensor) else samples)]
        stops = [0, *accumulate(map(rows, parts))]
        if len(ids) != stops[-1]:
            raise ValueError(
                f"samples has {len(ids)} numbers for a batch of {stops[-1]} rows: give one for each row (a collate "
                "function that joins samples in rows leaves none that could be remembered: use a codec without memory)"
            )
        if odd := next((one for one in ids if not 0 <= one < MOST), None):
            raise ValueError(f"samples are numbers from 0 to 2**48 - 1, found {odd}: use positions in the data")
        told = filled([ids[start:stop] for start, stop in pairwise(stops)], weights)
        seen = Counter[int]()
        self.each = [tuple(_again(one, seen) for one in told[index]) for index in own]


def _again(sample: int, seen: Counter[int]) -> int:
    """An id for a sample's next row in a step."""
    seen[sample] += 1
    return sample + MOST * (seen[sample] - 1)
