"""What a host's ranks do together in a step: one session's, or where gradients at the cut are shared all of a round.

    ann   ─┐ brings her step, and waits         ┌─► her place in the row ──► her part, to the group
    bob   ─┤ likewise                           ├─► his ...
    eve   ─┘ the last: one order for all ranks ─┘

A round whose row broke off anywhere is done again by all: what each of them computed has others' gradients in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from merak_like.split.doors import side_by_side
from merak_like.split.groups import chosen
from merak_like.split.rounds import Meeting, Seat
from merak_like.split.row import Row

if TYPE_CHECKING:
    from merak_like.split.group import Group
    from merak_like.split.session import Session


@contextmanager
def order(session: Session, told: Mapping[str, Any], parts: Sequence[Any], there: Callable[[], bool]) -> Iterator[None]:
    """All ranks do a session's step inside, by itself or side by side with others. Only where the turn is held.

    ``there`` says whether its edge still is. Raises Busy where others stay away.
    """
    group, crew = session.group, session.crew
    if group is None or crew.world.alone or not group.text.phi or not told["begin"]["training"]:
        with crew.together("step", **told):
            yield
        return
    training, meeting = session.training, group.at_work[session.owner]
    halves = [training.made.programs.at(part) for part in parts]
    kind = tuple((tuple(sorted(half.forward)), tuple(spec[1:] for spec in half.halves.sent)) for half in halves)
    seat, place = Seat(training.exchange, told, kind), meeting.who.index(session.owner)
    with group.turn.away():
        row = group.rounds.line_up(meeting, session.owner, seat, partial(_row, group), there)
        if place:  # the first one holds the turn for all
            with row.at(place, training.engine):
                yield
            return
    try:
        with crew.together("abreast", steps=[meeting.lined[name].told for name in meeting.who]):
            row.begin()
            try:
                with row.at(place, training.engine):
                    yield
            finally:
                row.over()
    except BaseException as error:
        row.fail(error)  # where it was not begun the others wait for it
        raise


def _row(group: Group, meeting: Meeting) -> Row:
    seats = [meeting.lined[name] for name in meeting.who]
    if len({seat.kind for seat in seats}) > 1:
        shapes = sorted({tuple(spec[0] for spec in sent) for seat in seats for _, sent in seat.kind})
        raise ValueError(
            f"phi takes the mean of gradients of one shape, the clients of this round send {shapes}: give all the "
            "same batch size and length, or use alpha alone"
        )
    sharing = chosen(group.text, group.rounds.at, meeting.who)
    return side_by_side(
        group.commons.crew, [seat.exchange for seat in seats], [meeting.lined[name].exchange for name in sharing]
    )
