"""Groups of clients that train one cloud half: what an operator may say of one, and how its turn goes on. Pure data.

sequential   ann ann bob bob ann ann ...    the members in the order they are written, ``turn`` steps each
parallel     ann+bob+eve  ann+bob+eve  ...   a round is one update of the shared weights, from a step of every member
chosen       eve ann  bob eve  ...           a round is a step of every member; some are heard, by losses (masked.py)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from merak_like.split.messages import Count, Message, OptimizerText, Word

Positive = Annotated[int, Field(ge=1, le=2**31)]


class GroupText(Message):
    """A group in groups.yaml."""

    mode: Literal["sequential", "parallel", "chosen"]
    members: Annotated[tuple[Word, ...], Field(min_length=1, max_length=1024, strict=False)]
    """Names in the clients' certificates; in turns, in this order."""
    optimizer: OptimizerText = OptimizerText()
    """Of the shared weights; a client's own optimizer is for what the edge has."""
    turn: Positive = 1
    """Steps that a member of a sequential group does in a row."""
    alpha: Annotated[float, Field(ge=0, le=2)] = 0.0
    """The shared weights learn at the optimizer's rate times clients^alpha."""
    phi: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The part of the clients that get the mean of their gradients at the cut instead of their own."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Limits each client's gradient of the shared weights, before they are put together."""
    most_norm: Annotated[float, Field(gt=0)] = 1e6
    """A client's gradient beyond this norm is refused, and nothing is changed."""
    heard: Annotated[float, Field(gt=0, le=1)] = 0.6
    """In a chosen group, the share of its members that is heard in a round."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.87
    """There, of what is remembered of a member's losses from one round to the next."""
    mask: Annotated[float, Field(ge=0)] = 1e-4
    """There, the weight of the masks' L1 term."""
    mask_rate: Annotated[float, Field(gt=0)] = 0.05
    average: Count = 0
    """Rounds after which the edges' own layers are averaged, weighted by the items each was trained on; 0: never."""
    wait: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that those who are there wait for the others."""
    lost: Literal["wait", "skip"] = "wait"
    """What then: they are told who is missing and try again, or they go on without, until the missing come back."""
    checkpoint_every: Positive = 50
    """Rounds between checkpoints; in a sequential group a round is a turn of every member."""
    seed: Count = 0
    """Of the shared weights where they are initialised, and of who is chosen for ``phi``."""

    @model_validator(mode="after")
    def _agrees(self) -> GroupText:
        if len(set(self.members)) != len(self.members):
            raise ValueError("a member is named twice")
        own = {"turn": "sequential", "alpha": "parallel", "phi": "parallel"} | dict.fromkeys(CHOSEN, "chosen")
        idle = [k for k in sorted(self.model_fields_set & set(own)) if own[k] != self.mode and self._says(k)]
        idle += ["average"] if self.mode == "chosen" and self.average else []
        if idle:
            raise ValueError(f"{', '.join(idle)} means nothing in a {self.mode} group: leave it away")
        if self.mode == "chosen" and self.lost == "skip":
            raise ValueError("a chosen group waits for those that are heard: leave lost: skip away")
        if self.average and self.mode == "sequential" and self.lost == "skip":
            raise ValueError("average in turns waits for every member: say lost: wait, or mode: parallel")
        return self

    def _says(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default


CHOSEN = ("heard", "decay", "mask", "mask_rate")
"""What only a chosen group has."""


def heard_of(text: GroupText) -> int:
    """How many members of a chosen group are heard in a round."""
    return max(1, round(text.heard * len(text.members)))


def read_groups(path: Path) -> dict[str, GroupText]:
    """Read groups.yaml: groups by name. Raises ValueError naming the file and the field that is wrong."""
    import yaml

    try:
        found = yaml.safe_load(path.expanduser().read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must have groups by name, found a {type(found).__name__}")
    return {str(name): group_of(entry, f"{path}: {name}") for name, entry in found.items()}


def group_of(entry: Any, where: str) -> GroupText:
    """Read one group. Raises ValueError that says where."""
    try:
        return GroupText.model_validate(entry, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join((where, *map(str, first['loc'])))}: {first['msg']}") from None


@dataclass(frozen=True)
class Place:
    """Where a group is."""

    updates: int = 0
    """Times the shared weights were changed."""
    round: int = 0
    member: int = 0
    """Whose turn it is in a sequential group."""
    done: int = 0
    """Steps of that turn that are done."""
    heard: tuple[str, ...] = ()
    """Who is heard in this round of a chosen group, in this order; empty: the first of the members."""
    pending: bool = False
    """Whether the edges' own layers are to be averaged before the next update."""


def expected(text: GroupText, at: Place, away: Collection[str] = ()) -> tuple[str, ...]:
    """Who makes the next update, in the order in which their gradients are added; all where all are away."""
    here = [name for name in text.members if name not in away] or list(text.members)
    if text.mode == "parallel":
        return tuple(here)
    if text.mode == "chosen":
        return (listened(text, at)[at.done],)
    count = len(text.members)
    return (next(n for n in (text.members[(at.member + i) % count] for i in range(count)) if n in here),)


def listened(text: GroupText, at: Place) -> tuple[str, ...]:
    """Who is heard in a round of a chosen group."""
    return at.heard or text.members[: heard_of(text)]


def after(text: GroupText, at: Place, who: tuple[str, ...]) -> Place:
    """Where the group is when these have made an update."""
    now = _after(text, at, who)
    return replace(now, pending=now.round > at.round and _every(text.average, now.round))


def _after(text: GroupText, at: Place, who: tuple[str, ...]) -> Place:
    if text.mode == "parallel":
        return replace(at, updates=at.updates + 1, round=at.round + 1)
    if text.mode == "chosen":
        last = at.done + 1 == len(listened(text, at))
        now = replace(at, updates=at.updates + 1, done=0 if last else at.done + 1)
        return replace(now, round=at.round + 1, heard=()) if last else now
    index = text.members.index(who[0])
    wrapped = index < at.member  # others were passed over
    done = (at.done if index == at.member else 0) + 1
    now = Place(at.updates + 1, at.round + wrapped, index, done)
    if done < text.turn:
        return now
    following = (index + 1) % len(text.members)
    return replace(now, round=now.round + (following == 0), member=following, done=0)


def ending(text: GroupText, at: Place, who: tuple[str, ...]) -> int:
    """The round that ends with the update that these now make, as far as they are concerned; 0: none does.

    In turns that is so after the last step of each member's turn.
    """
    if text.mode == "chosen":
        return at.round + 1
    now = after(text, at, who)
    return (now.round if now.round > at.round else at.round + 1) if now.done == 0 else 0


def averages(text: GroupText, at: Place, who: tuple[str, ...]) -> int:
    """The round at whose end the layers of those who now make an update are averaged; 0: not after this one."""
    last = ending(text, at, who)
    return last if _every(text.average, last) else 0


def saves(text: GroupText, at: Place, who: tuple[str, ...]) -> bool:
    """Whether those who now make an update must keep what they have after it: the group will, when the round ends."""
    return kept(text, ending(text, at, who))


def due(text: GroupText, before: Place, now: Place) -> bool:
    """Whether the group writes a checkpoint: at the end of a round that is kept, its average included."""
    ended = now.round > before.round or before.pending
    return ended and not now.pending and kept(text, now.round)


def kept(text: GroupText, round_: int) -> bool:
    """Whether a checkpoint is written at the end of a round."""
    return _every(text.checkpoint_every, round_) or _every(text.average, round_)


def _every(count: int, round_: int) -> bool:
    return bool(count and round_) and round_ % count == 0


def chosen(text: GroupText, at: Place, who: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a round that get the mean of their gradients at the cut: ``phi`` of them, drawn anew each round."""
    import random

    count = round(text.phi * len(who))
    drawn = random.Random(f"{text.seed}/{at.updates}").sample(sorted(who), count) if count > 1 else []
    return tuple(name for name in who if name in drawn)
