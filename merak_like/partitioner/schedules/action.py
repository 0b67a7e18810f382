"""The vocabulary of a pipeline schedule: actions, one rank's order of them, all ranks' orders.

A schedule is plain data, so it can be printed, compared, timed and checked before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import NamedTuple

#: (source stage, target stage) of every value that crosses stages; the gradient comes back along the same edge.
Edges = frozenset[tuple[int, int]]


def chain(stages: int) -> Edges:
    """Return the edges of a plain pipeline: 0 -> 1 -> .. -> stages - 1."""
    return frozenset((stage, stage + 1) for stage in range(stages - 1))


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name nobody knows, with the nearest name that is known."""
    names = [str(each) for each in known]
    nearest = get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(f"unknown {what} {name!r}: {hint}known are {', '.join(names)}")


def known(name: str, what: str, names: Collection[str]) -> str:
    """Return the name if it is one of these; raise the error of ``unknown`` if it is not."""
    if name not in names:
        raise unknown(what, name, names)
    return name


class Kind(StrEnum):
    """What an action does."""

    F = "F"  # forward
    R = "R"  # recompute: the forward again, just before its backward
    B = "B"  # backward for the inputs, and for the weights too unless a W follows
    W = "W"  # backward for the weights, put off
    SEND_F = "SEND_F"  # start sending a forward value to a later stage
    RECV_F = "RECV_F"  # post the receive of a forward value; the F that uses it waits for it
    SEND_B = "SEND_B"  # start sending a gradient back to an earlier stage
    RECV_B = "RECV_B"  # post the receive of a gradient; the B that uses it waits for it

    # Enum hashes by name in Python code; schedules are looked up by the hundred thousand, so hash as the string it is.
    __hash__ = str.__hash__

    @classmethod
    def _missing_(cls, value: object) -> Kind:
        raise unknown("action kind", str(value), cls)


COMPUTE = (Kind.F, Kind.R, Kind.B, Kind.W)
#: The receive that matches each send.
RECEIVE_OF = {Kind.SEND_F: Kind.RECV_F, Kind.SEND_B: Kind.RECV_B}
#: The computation that uses what was received.
USER_OF = {Kind.RECV_F: Kind.F, Kind.RECV_B: Kind.B}

_ACTION = re.compile(r"([A-Z_]+)(\d+)\.(\d+)(?:([<>])(\d+))?")


class Action(NamedTuple):
    """One step of one rank, e.g. F2.0 is the forward of micro-batch 2 on stage 0.

    A transfer also names its peer, the stage at the other end; the arrow points the way the data goes:
    SEND_F2.0>1 on the rank of stage 0, RECV_F2.1<0 on the rank of stage 1.
    """

    kind: Kind
    micro_batch: int
    stage: int
    peer: int = -1

    def __str__(self) -> str:
        arrow = f"{'>' if self.kind in RECEIVE_OF else '<'}{self.peer}" if self.peer >= 0 else ""
        return f"{self.kind.value}{self.micro_batch}.{self.stage}{arrow}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action that prints as text."""
        match = _ACTION.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no action: write KIND, micro-batch, '.', stage, as in F2.0 or SEND_F2.0>1")
        kind, micro_batch, stage, _, peer = match.groups()
        action = cls(Kind(kind), int(micro_batch), int(stage), -1 if peer is None else int(peer))
        if (action.kind in COMPUTE) != (peer is None) or str(action) != text.strip():
            raise ValueError(f"{text!r} is no action: transfers, and only they, name a peer: SEND_F2.0>1, RECV_F2.1<0")
        return action

    @property
    def match(self) -> Action:
        """The other end of this transfer: SEND_F2.0>1 matches RECV_F2.1<0."""
        kinds = RECEIVE_OF | {receive: send for send, receive in RECEIVE_OF.items()}
        return Action(kinds[self.kind], self.micro_batch, self.peer, self.stage)


Order = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """All ranks' orders: orders[r] is what pipeline rank r does, stage_rank[s] is the rank that runs stage s.

    A B does all the backward that has no action of its own: the weight gradients where no W follows, and, on the stages
    in `recomputes`, the forward again where no R came before. Such a recompute waits for the gradient, an R does not.
    """

    stages: int
    micro_batches: int
    orders: tuple[Order, ...]
    stage_rank: tuple[int, ...]
    recomputes: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.stages < 1 or self.micro_batches < 1:
            raise ValueError(
                f"a schedule needs at least one stage and one micro-batch: "
                f"got {self.stages} stages and {self.micro_batches} micro-batches"
            )
        ranks = len(self.orders)
        if len(self.stage_rank) != self.stages or not all(0 <= rank < ranks for rank in self.stage_rank):
            raise ValueError(
                f"stage_rank {self.stage_rank} must give each of {self.stages} stages one of the ranks 0 to {ranks - 1}"
            )
        absent = sorted(self.recomputes - set(range(self.stages)))
        if absent:
            raise ValueError(f"stage {absent[0]} cannot recompute: there are stages 0 to {self.stages - 1}")

    def __str__(self) -> str:
        """One line per rank, in program order; grid.picture shows the same over time."""
        lines = (" ".join(map(str, order)) for order in self.orders)
        return "\n".join(f"rank {rank}  {line}".rstrip() for rank, line in enumerate(lines))

    @property
    def ranks(self) -> int:
        return len(self.orders)

    def apart(self, kind: Kind) -> set[tuple[int, int]]:
        """Return the (micro-batch, stage) pairs whose `kind` (R or W) is an action of its own."""
        return {(action.micro_batch, action.stage) for order in self.orders for action in order if action.kind is kind}

    @property
    def has_transfers(self) -> bool:
        return any(action.peer >= 0 for order in self.orders for action in order)

    def peak_live(self) -> tuple[int, ...]:
        """Return, per stage, the most micro-batches whose activations are alive at once."""
        live, peak = [0] * self.stages, [0] * self.stages
        for order in self.orders:
            for stage, change in live_changes(order):
                live[stage] += change
                peak[stage] = max(peak[stage], live[stage])
        return tuple(peak)


def live_changes(order: Order) -> Iterator[tuple[int, int]]:
    """Yield (stage, +1) when a forward makes a micro-batch alive, (stage, -1) after its B, or its W if there is one."""
    forward, backward, weight = Kind.F, Kind.B, Kind.W  # a member lookup per action would cost more than the rest
    put_off = {(action.micro_batch, action.stage) for action in order if action.kind is weight}
    for kind, micro_batch, stage, _ in order:
        if kind is forward:
            yield stage, 1
        elif kind is weight or (kind is backward and (micro_batch, stage) not in put_off):
            yield stage, -1


def check_edges(edges: Edges, stages: int) -> None:
    """Refuse an edge that does not lead from a stage to a later one."""
    for source, target in sorted(edges):
        if not 0 <= source < target < stages:
            raise ValueError(f"edge {source} -> {target} must lead from a stage to a later one of 0 to {stages - 1}")
