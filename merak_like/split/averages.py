"""The mean of the edges' own layers over a group, at the end of a round (SplitFed, Thapa et al. 2020, section 3).

    w = sum_i (n_i / n) w_i        n_i: items that client i has trained on since the mean before

It is on disk before anybody hears it, and stays until the next: who lost the answer asks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from merak_like.split.layers import weighted
from merak_like.split.rounds import Busy, Rounds


@dataclass(frozen=True)
class Brought:
    """One client's layers, in pieces."""

    items: int
    pieces: Mapping[str, Tensor]


class Averages:
    """One group's means, one after the other."""

    def __init__(self, rounds: Rounds, who: Callable[[int], Collection[str]], note: Callable[..., None]) -> None:
        """``who`` gives the members whose layers are due for the mean of a round."""
        self.rounds = rounds
        self.of = 0
        """The round that the mean is of."""
        self.mean: Mapping[str, Tensor] = {}
        self._brought: dict[str, Brought] = {}
        self._who, self._note = who, note
        self._since = 0.0
        """When somebody began to wait for layers alone."""

    def bring(self, member: str, of: int, part: Brought, there: Callable[[], bool]) -> Mapping[str, Tensor]:
        """Give a part to the mean of a round; returns the mean. Raises Busy naming who is missing.

        Where that mean is known already, it is the answer, whatever the part.
        """
        with self.rounds.change:
            if self.of < of:
                self._brought[member] = part
                self.rounds.change.notify_all()
                try:
                    self._wait(of, there)
                finally:
                    self._brought.pop(member, None)
            return self.mean

    def _wait(self, of: int, there: Callable[[], bool]) -> None:
        rounds, text = self.rounds, self.rounds.text
        end = time.monotonic() + text.wait
        while self.of < of:
            rounds.hold(rounds.meeting)
            late = self._late()
            if rounds.at.pending and not late:
                self._put_together()
                return
            if not there():
                raise Busy(f"its edge is gone before the mean of round {of}")
            now = time.monotonic()
            self._since = self._since or now if rounds.at.pending else 0.0
            if rounds.at.pending and text.lost == "skip" and now - self._since > text.wait:
                rounds.away |= set(late)
                self._note("skipped", group=rounds.name, members=late, average=of)
                continue
            if now > end and text.lost == "wait":
                raise Busy(
                    f"group {rounds.name} waits for {', '.join(late)} before it averages the edges' layers of round "
                    f"{of} (after {text.wait:.0f} s)"
                )
            rounds.change.wait(min(0.5, text.wait))

    def _late(self) -> list[str]:
        """Who keeps the mean waiting: by its layers, or by a step of the round before them."""
        rounds = self.rounds
        if not rounds.at.pending:
            return [name for name in rounds.meeting.who if name not in rounds.meeting.left]
        due = self._who(rounds.at.round)
        return [n for n in rounds.text.members if n in due and n not in rounds.away and n not in self._brought]

    def _put_together(self) -> None:
        parts = [self._brought[name] for name in self.rounds.text.members if name in self._brought]
        items = sum(part.items for part in parts)
        shares = [part.items / items for part in parts]
        self.mean = {name: weighted(shares, [p.pieces[name] for p in parts]) for name in parts[0].pieces}
        self._brought, self._since, self.of = {}, 0.0, self.rounds.at.round
        self.rounds.move(replace(self.rounds.at, pending=False))
        self._note("averaged", group=self.rounds.name, round=self.of, members=len(parts), items=items)

    def go_to(self, of: int, mean: Mapping[str, Tensor]) -> None:
        """Be where a checkpoint is."""
        self.of, self.mean, self._brought, self._since = of, mean, {}, 0.0
