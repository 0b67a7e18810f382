"""A group on its host: shared weights, the sessions that train them, and one checkpoint of all of it.

folder/<group>/step-N/     the N-th checkpoint: weights, optimizer, whose turn it is; of each session its step, what its
                           codecs remember and what was said to its edge last; the last mean of the edges' layers

So after a crash an edge that did or did not hear of its last step goes on all the same. An edge that was restarted from
an older checkpoint takes the whole group back with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock

from torch import Tensor

from merak_like.runtime.optimizer import StepResult
from merak_like.split import checkpoint
from merak_like.split.averages import Averages, Brought
from merak_like.split.checkpoint import State
from merak_like.split.common import Common, Part
from merak_like.split.commons import Commons, brought
from merak_like.split.groups import GroupText, Place, averages, chosen, due, saves
from merak_like.split.masked import Masked
from merak_like.split.pooled import Pooled
from merak_like.split.rounds import Busy, Meeting, Rounds
from merak_like.split.session import Refused, Session
from merak_like.split.turn import Turn

KEEP = 6
OWN = ("group", "place", "away", "averaged", "sessions")
"""What a checkpoint says of the group; all else is of its weights."""


@dataclass(frozen=True)
class After:
    """What follows a member's step."""

    save: bool
    """Its edge must keep what it then has."""
    average: int
    """The round that its edge's own layers are averaged for; 0: they are not now."""


class Group:
    """One group of a host."""

    def __init__(
        self, name: str, text: GroupText, folder: Path, turn: Turn, note: Callable[..., None],
        stopping: Callable[[], bool], commons: Commons,
    ) -> None:  # fmt: skip
        self.name, self.text, self.folder, self.turn = name, text, folder, turn
        self.rounds = Rounds(name, text, self._apply, self._end, note, stopping, self._place)
        self.averages = Averages(self.rounds, self._due, note)
        self.commons, self._awake = commons, False
        self.live: dict[str, Session] = {}
        self.resting: dict[str, State] = {}
        """Sessions by id that are not in memory, as a checkpoint knows them."""
        self._note = note
        self.at_work: dict[str, Meeting] = {}
        """By member."""
        self._going_back = Lock()
        self._dirty = False

    # --- sessions -----------------------------------------------------------------------------------------------------

    @property
    def common(self) -> Common | None:
        """The shared weights, once there is a session."""
        return self.commons.known.get(self.name)

    def wake(self) -> None:
        """With its first session a group is where its newest checkpoint is."""
        if not self._awake and (found := checkpoint.whole(self.folder)):
            self._take_up(checkpoint.load(self.folder, found[-1]))
        self._awake = True

    def give(self, session: Session, result: StepResult) -> None:
        """Bring what a session's step has found; returns when the weights are changed. Only where the turn is held.

        Raises FloatingPointError for a gradient that is too large, Busy where somebody is missing.
        """
        if result.grad_norm > self.text.most_norm:
            raise FloatingPointError(
                f"the gradient norm {result.grad_norm:g} is above {self.text.most_norm:g}, the most that group "
                f"{self.name} takes"
            )
        part = brought(session.training, result.tokens, session.id, session.owner, result.loss)
        with self.turn.away():
            self.rounds.give(self.at_work[session.owner], session.owner, part)

    def known(self, session: str) -> State | None:
        """A session that is not in memory, of this group's newest checkpoint."""
        if self.common is None and not self.resting and (found := checkpoint.whole(self.folder)):
            self._rest(checkpoint.load(self.folder, found[-1]))
        return self.resting.get(session)

    def join(self, session: Session) -> None:
        """A session is in memory from now on; a new one is kept at once, for its edge may name it after a crash."""
        with self.rounds.change:
            before = [s for s in self.live.values() if s.owner == session.owner]
            for id_ in [i for i, state in self.resting.items() if state.facts["owner"] == session.owner]:
                state = self.resting.pop(id_)
                if id_ == session.id:
                    session.resume(state)
            for one in before:
                self.live.pop(one.id)
            self.live[session.id] = session
            if session.training.step == session.begins and session.last is None:
                self.rounds.change.wait_for(lambda: not self.rounds.meeting.applied, self.text.wait)
                self.save()

    def rest(self, session: Session) -> None:
        """A session leaves memory; the group knows of it."""
        with self.rounds.change:
            self.resting[session.id] = session.state()
            self.leave(session)

    def leave(self, session: Session) -> None:
        """A session leaves memory, not while a round's end writes down all of them."""
        with self.rounds.change:
            self.live.pop(session.id, None)

    @contextmanager
    def step(self, session: Session, there: Callable[[], bool]) -> Iterator[After]:
        """A step of a session is inside; what follows it."""
        if self.averages.of < session.owes:
            raise Refused(f"the edge's own layers of round {session.owes} are due before its next step")
        with self.rounds.seat(session.owner, there) as meeting:
            self.at_work[session.owner] = meeting
            try:
                self._show(session)
                self._blend(session, meeting)
                at, who = self.rounds.at, meeting.who
                yield After(saves(self.text, at, who), averages(self.text, at, who))
            except BaseException as error:  # of steps that went side by side none stands alone
                if meeting.row is not None and not meeting.applied and meeting is self.rounds.meeting:
                    why = f"the step of {session.owner} came to nothing ({type(error).__name__})"
                    self.rounds.fail(f"group {self.name}: {why}: do this step again")
                raise
            finally:  # a session that is put away gives its memory back
                del self.at_work[session.owner]

    def _show(self, session: Session) -> None:
        assert self.common is not None
        session.training.put_buffers(self.common.buffers)
        self.common.show(session.owner, session.training.made.model)

    def _blend(self, session: Session, meeting: Meeting) -> None:
        """Let a session's gradients at the cut be the mean of those that are chosen in this round."""
        exchange, member = session.training.exchange, session.owner
        if not isinstance(exchange, Pooled):
            return
        who = chosen(self.text, self.rounds.at, meeting.who)

        def blend(micro_batch: int, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            with self.turn.away():
                return self.rounds.pool(meeting, member, who, micro_batch, values)

        exchange.blend = blend if member in who else None

    def average(
        self, session: Session, pieces: Mapping[str, Tensor], there: Callable[[], bool]
    ) -> Mapping[str, Tensor]:
        """Give a session's own layers to the mean that they are due for; the mean. Only where the turn is held."""
        with self.turn.away():
            return self.averages.bring(session.owner, session.owes, Brought(session.items, pieces), there)

    def _due(self, round_: int) -> set[str]:
        """Whose layers are due for the mean of a round."""
        resting = {s.facts["owner"] for s in self.resting.values() if s.facts.get("owes") == round_}
        return resting | {session.owner for session in self.live.values() if session.owes == round_}

    @contextmanager
    def look(self, session: Session) -> Iterator[None]:
        """An evaluation of a session is inside."""
        with self.rounds.look():
            self._show(session)
            yield

    # --- rounds -------------------------------------------------------------------------------------------------------

    def _apply(self, parts: tuple[Part, ...], at: Place) -> None:
        assert self.common is not None
        who = [(part.session, part.items, part.member) for part in parts]
        with self.commons.crew.together("learn", group=self.name, who=who, update=at.updates):
            self.common.learn(parts, at.updates)

    def _place(self, at: Place) -> Place:
        return replace(at, heard=self.common.next()) if isinstance(self.common, Masked) and at.done == 0 else at

    def _end(self, before: Place, now: Place) -> None:
        self._dirty = True
        if due(self.text, before, now):
            self.save(now)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, at: Place | None = None) -> None:
        """Write a checkpoint; between two updates, whatever the sessions are at."""
        assert self.common is not None
        with self.commons.crew.together("keep", group=self.name):
            common = self.common.state()
        sessions = {**self.resting, **{id_: session.state() for id_, session in self.live.items()}}
        tensors = {**common.tensors, **checkpoint.under("mean/", self.averages.mean)}
        for id_, state in sessions.items():
            tensors |= checkpoint.under(f"session/{id_}/", state.tensors)
        facts = {
            **common.facts, "group": self.text.model_dump(mode="json"), "place": asdict(at or self.rounds.at),
            "away": sorted(self.rounds.away), "averaged": self.averages.of,
            "sessions": {id_: dict(state.facts) for id_, state in sessions.items()},
        }  # fmt: skip
        number = (checkpoint.steps(self.folder) or [0])[-1] + 1
        checkpoint.save(self.folder, number, State(tensors, facts), keep=KEEP)
        self._dirty = False

    def close(self) -> None:
        """Keep what was not kept yet."""
        with self.rounds.change:
            if self.common is not None and self._dirty and self.rounds.broken is None:
                self.save()

    def go_back(self, session: Session, at: int, saved: tuple[int, ...]) -> None:
        """Take the group to its newest checkpoint that an edge at step ``at``, with these checkpoints, can go on from.

        Raises Refused where there is none, Busy where others are still at work.
        """
        if not self._going_back.acquire(blocking=False):
            raise Busy(f"group {self.name} is going back for somebody else: try again")
        try:
            for number in reversed(checkpoint.whole(self.folder)):
                state = checkpoint.load(self.folder, number)
                mine = state.facts["sessions"].get(session.id)
                if mine is not None and (mine["step"] in {at, *saved} or (mine["last"] and mine["step"] == at + 1)):
                    break
            else:
                raise Refused(
                    f"the edge is at step {at} and has checkpoints of {sorted(saved)}; group {self.name} has none that "
                    "fits: begin a new session"
                )
            self.rounds.fail(f"group {self.name} goes back to an earlier update")
            with ExitStack() as stack:
                for other in [s for s in self.live.values() if s is not session]:
                    stack.enter_context(other.alone())
                with self.turn.held():
                    self._take_up(state)
            for later in checkpoint.steps(self.folder):
                if later > number:
                    shutil.rmtree(self.folder / f"step-{later}", ignore_errors=True)
            self._note("went back", group=self.name, update=self.rounds.at.updates, member=session.owner)
        finally:
            self._going_back.release()

    def _take_up(self, state: State) -> None:
        assert self.common is not None
        common = {n: t for n, t in state.tensors.items() if not n.startswith(("mean/", "session/"))}
        with self.commons.crew.together("take up", group=self.name):
            self.common.restore(State(common, {k: v for k, v in state.facts.items() if k not in OWN}))
        self.averages.go_to(state.facts.get("averaged", 0), checkpoint.of("mean/", state.tensors))
        self._rest(state)
        for id_, session in self.live.items():
            session.resume(self.resting.pop(id_, None))
        self._dirty = False

    def _rest(self, state: State) -> None:
        """Know a checkpoint's sessions and place."""
        self.resting = {
            id_: State(checkpoint.of(f"session/{id_}/", state.tensors), facts)
            for id_, facts in state.facts["sessions"].items()
        }
        self.rounds.away = set(state.facts["away"]) & set(self.text.members)
        place = Place(**{**state.facts["place"], "heard": tuple(state.facts["place"].get("heard", ()))})
        fits = place.member < len(self.text.members)
        self.rounds.go_to(place if fits else Place(place.updates, place.round))
