"""A step of split fine-tuning before it is run: both sides' orders walked over two links.

edge     F0 F1 F2 F3 ......  tail 0  tail 1 ...        one thread computes and decodes
coding      c0 c1 c2 c3                                another encodes behind it
uplink         u0───u1───u2───u3───                    one message after the other
host              F0 ─ F1 ─ F2 ...                     computes, encodes and decodes in turn
downlink            d0  d1  d2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merak_like.partitioner.hardware import Link
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.split.order import Side
from merak_like.split.wire import Kind as Says

RESOURCES = ("edge", "coding", "uplink", "host", "downlink")
SENDS: Mapping[tuple[Side, Kind, int], Says] = {
    ("edge", Kind.F, 1): Says.UP_FORWARD, ("edge", Kind.B, 2): Says.DOWN_BACKWARD,
    ("host", Kind.F, 2): Says.DOWN_FORWARD, ("host", Kind.B, 0): Says.UP_BACKWARD,
}  # fmt: skip
"""What the stages of ``elsewhere`` send, for a host on one rank."""
WAITS: Mapping[tuple[Side, Kind, int], Says] = {
    ("edge", Kind.F, 2): Says.DOWN_FORWARD, ("edge", Kind.B, 1): Says.UP_BACKWARD,
    ("host", Kind.F, 0): Says.UP_FORWARD, ("host", Kind.B, 2): Says.DOWN_BACKWARD,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one micro-batch takes."""

    seconds: Mapping[tuple[Side, Kind, int], float]
    """Of the stages that compute, by side, forward or backward, and stage."""
    nbytes: Mapping[Says, int]
    """On the socket, headers included; a message that is not sent is not here."""
    encode: Mapping[Says, float]
    decode: Mapping[Says, float]


@dataclass(frozen=True)
class Around:
    """What a step takes besides its micro-batches."""

    begin: int
    """Bytes of BEGIN."""
    done: int
    edge_update: float = 0.0
    host_update: float = 0.0


@dataclass(frozen=True)
class Walked:
    """A step, walked."""

    seconds: float
    busy: Mapping[str, float]
    """Seconds that each of ``RESOURCES`` is at work."""


@dataclass
class _Line:
    link: Link
    free: float = 0.0
    busy: float = 0.0

    def carry(self, at: float, nbytes: int) -> float:
        """When the last byte has arrived."""
        took = nbytes / self.link.bandwidth
        self.free = max(self.free, at) + took
        self.busy += took
        return self.free + self.link.latency


@dataclass
class _Party:
    side: Side
    order: Sequence[Action]
    line: _Line
    at: int = 0
    clock: float = 0.0
    busy: float = 0.0
    coder: float | None = None
    """When a thread of its own is through with encoding; None: it encodes itself."""
    coding: float = 0.0
    heard: dict[tuple[Says, int], float] = field(default_factory=dict[tuple[Says, int], float])

    def work(self, seconds: float) -> None:
        self.clock += seconds
        self.busy += seconds


def walk(
    orders: Mapping[Side, Sequence[Action]], works: Sequence[Work], around: Around, up: Link, down: Link,
    *, ahead: bool = True, faster: Mapping[str, float] | None = None,
) -> Walked:  # fmt: skip
    """The seconds of a step. ``ahead``: the edge encodes in a thread of its own. ``faster`` speeds resources up."""
    speed = dict.fromkeys(RESOURCES, 1.0) | dict(faster or {})
    lines: dict[Side, _Line] = {
        "edge": _Line(Link(up.bandwidth * speed["uplink"], up.latency)),
        "host": _Line(Link(down.bandwidth * speed["downlink"], down.latency)),
    }
    edge = _Party("edge", orders["edge"], lines["edge"], coder=0.0 if ahead else None)
    host = _Party("host", orders["host"], lines["host"], clock=lines["edge"].carry(0.0, around.begin))
    while edge.at < len(edge.order) or host.at < len(host.order):
        went = [_go_on(edge, host, works, speed), _go_on(host, edge, works, speed)]
        assert any(went), "the two orders wait for each other"
    host.work(around.host_update / speed["host"])
    edge.clock = max(edge.clock, host.line.carry(host.clock, around.done))
    edge.work(around.edge_update / speed["edge"])
    busy = (edge.busy, edge.coding, edge.line.busy, host.busy, host.line.busy)
    return Walked(edge.clock, dict(zip(RESOURCES, busy, strict=True)))


def _go_on(me: _Party, other: _Party, works: Sequence[Work], speed: Mapping[str, float]) -> bool:
    """Walk as far as messages have come; whether that was any way at all."""
    began = me.at
    while me.at < len(me.order):
        kind, i, stage = me.order[me.at][:3]
        place: tuple[Side, Kind, int] = (me.side, kind, stage)
        work = works[i]
        heard, sent = WAITS.get(place), SENDS.get(place)
        if heard is not None and heard in work.nbytes:
            if (heard, i) not in me.heard:
                break
            me.clock = max(me.clock, me.heard[heard, i])
            me.work(work.decode[heard] / speed[me.side])
        elif sent is not None and sent in work.nbytes:
            _send(me, other, sent, i, work, speed)
        me.work(work.seconds.get(place, 0.0) / speed[me.side])
        me.at += 1
    return me.at > began


def _send(me: _Party, other: _Party, says: Says, i: int, work: Work, speed: Mapping[str, float]) -> None:
    if me.coder is None:
        me.work(work.encode[says] / speed[me.side])
        ready = me.clock
    else:
        took = work.encode[says] / speed["coding"]
        me.coding += took
        ready = me.coder = max(me.coder, me.clock) + took
    other.heard[says, i] = me.line.carry(ready, work.nbytes[says])
