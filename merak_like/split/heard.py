"""A member's place in a chosen group: whether its step is heard, and when its round is over.

step of the edge    0 .. alone-1      alone + round             nothing is sent in the first ones
heard               its turn, then the rest of the round
not heard           at home; it waits here until the round is over, and may lag behind while nobody listens to it
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from merak_like.split.groups import kept, listened
from merak_like.split.rounds import Rounds


class Hearing:
    """Of one session."""

    def __init__(self, rounds: Rounds, member: str, alone: int) -> None:
        self._rounds, self._member, self._alone = rounds, member, alone

    def hears(self, step: int) -> bool:
        """Whether this step of the member is heard; one whose round is over was not."""
        at = self._rounds.at
        return at.round == step - self._alone and self._member in listened(self._rounds.text, at)

    def over(self, step: int, there: Callable[[], bool]) -> dict[str, Any]:
        """Wait for the end of this step's round; what its edge is then told. Raises Busy."""
        rounds, round_ = self._rounds, step - self._alone
        with rounds.change:
            rounds.wait(lambda: rounds.at.round > round_, self._member, there=there)
            return {"save": kept(rounds.text, round_ + 1), "heard": self.hears(step + 1)}

    def agree(self, at: int, saved: Collection[int], last: int) -> int | None:
        """The step to go on with, for an edge at a step after the ``last`` that was heard; None: go by that.

        What was not heard has changed nothing here, so the edge's word counts, but for what the group has lost.
        """
        target = min(at, self._alone + self._rounds.at.round)
        return target if target > last and (target == at or target in saved) else None
