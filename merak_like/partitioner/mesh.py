"""The device mesh as arithmetic: which rank stands at which (dp, pp, tp) coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Coord(NamedTuple):
    """A rank's place in the mesh: data-parallel replica, pipeline rank, tensor-parallel shard."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """Three degrees of parallelism; ``dp * pp * tp`` ranks.

    tp is innermost: its ranks talk most, so they sit on the same node (Narayanan et al. 2021, sec. 3.2).
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, degree in (("dp", self.dp), ("pp", self.pp), ("tp", self.tp)):
            if type(degree) is not int or degree < 1:  # a bool is no degree
                raise ValueError(f"{axis}={degree!r} is not a degree of parallelism: give a whole number of at least 1")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.pp * self.tp

    def coord(self, rank: int) -> Coord:
        """The coordinate of a global rank."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside {self}: ranks go from 0 to {self.size - 1}")
        rest, tp = divmod(rank, self.tp)
        dp, pp = divmod(rest, self.pp)
        return Coord(dp, pp, tp)

    def rank(self, coord: Coord) -> int:
        """The global rank that stands at a coordinate."""
        return (coord.dp * self.pp + coord.pp) * self.tp + coord.tp

    def __str__(self) -> str:
        return f"dp={self.dp} x pp={self.pp} x tp={self.tp}"
