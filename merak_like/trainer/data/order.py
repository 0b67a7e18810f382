"""Which samples a step trains on: a pure function of (seed, position).

    position   0 1 2 3 4 | 5 6 7 8 9 | 10 ...      samples trained before, over all replicas and steps
    epoch          0     |     1     |  2
    sample     3 0 4 1 2 | 1 4 0 3 2 |  ...        a permutation of its own for each epoch

A batch is a run of positions and may reach into the next epoch, so batches are whole and every sample comes once an
epoch. One integer is all there is to resume, whatever the numbers of replicas and micro-batches were or will be.

The permutation is computed where it is asked for, not stored: a Feistel network over the next power of four, walked
until it lands on a sample (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
Indices = NDArray[np.uint64]


@dataclass(frozen=True)
class Order:
    """The order of so many samples."""

    samples: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("the data has no samples: is the file empty, or everything filtered out?")

    def at(self, first: int, count: int) -> list[int]:
        """The samples at the positions ``first`` up to ``first + count``."""
        found: list[int] = []
        while len(found) < count:
            epoch, start = divmod(first + len(found), self.samples)
            stop = min(self.samples, start + count - len(found))
            inside = np.arange(start, stop, dtype=np.uint64)
            found += (self._shuffled(inside, epoch) if self.shuffle else inside).tolist()
        return found

    def _shuffled(self, positions: Indices, epoch: int) -> Indices:
        half = max(1, (max(self.samples - 1, 1).bit_length() + 1) // 2)
        mixed = _feistel(positions, half, self.seed, epoch)
        while (outside := mixed >= self.samples).any():  # a permutation of more than the samples: walk on, to the next
            mixed[outside] = _feistel(mixed[outside], half, self.seed, epoch)
        return mixed


def _feistel(values: Indices, half: int, seed: int, epoch: int) -> Indices:
    """A permutation of the numbers of ``2 * half`` bits."""
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    left, right = values >> shift, values & mask
    digest = hashlib.sha512(f"{seed}/{epoch}".encode()).digest()
    for number in range(ROUNDS):
        key = np.uint64(int.from_bytes(digest[8 * number : 8 * number + 8], "big"))
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << shift | right


def _mixed(x: Indices) -> Indices:
    """Scatter the bits: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
