"""What a step of a task will take: bytes exactly, seconds and memory by the model of costs and the walk of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from merak_like.partitioner.cost import op_costs
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.partitioner.tracer import Trace, trace
from merak_like.runtime.batches import rows, signature, split, to_device
from merak_like.runtime.codecs import Context, codec
from merak_like.runtime.codecs.wire import number
from merak_like.runtime.links import Spec
from merak_like.split.binarised import binarise
from merak_like.split.coding import Measure, timed
from merak_like.split.cut import Cut
from merak_like.split.exchange import KINDS, Link, Way, coded
from merak_like.split.half import Source, freeze_head, head_of
from merak_like.split.halves import Halves, halve
from merak_like.split.limits import memory_of, weights_of
from merak_like.split.means import Means
from merak_like.split.messages import Done, Task
from merak_like.split.order import Side, orders
from merak_like.split.outline import LEAST_ID, beginning
from merak_like.split.sft import sft
from merak_like.split.timeline import RESOURCES, Around, Walked, Work, walk
from merak_like.split.wire import CHUNK, FROM_EDGE, wire_bytes
from merak_like.split.wire import Kind as Says

SENT_BEGIN, RECEIVED_DONE = "sent BEGIN", "received DONE"
STATES = {"adamw": 2, "adam": 2, "sgd": 1}
"""Numbers that an optimizer keeps beside each weight, at most."""


@dataclass(frozen=True)
class Forecast:
    """One way to run a step, and what it takes."""

    cut: str
    codec: str
    micro_batches: int
    by_kind: Mapping[str, int]
    """Bytes of a step on the socket, headers included, as ``Edge.bytes`` counts them; later visits of samples."""
    edge_bytes: int
    """Memory of the edge: weights, gradients, optimizer, activations and what waits to be sent."""
    host_bytes: int
    walked: Walked | None
    """Seconds; None where the machines are not known."""
    binds: str = ""
    """Which of ``RESOURCES`` would shorten the step most if it were twice as fast; or ``latency``."""
    saves: float = 0.0
    """Seconds of a step that this would save."""

    @property
    def sent(self) -> int:
        """Bytes from the edge."""
        return sum(count for kind, count in self.by_kind.items() if kind.startswith("sent"))

    @property
    def received(self) -> int:
        """Bytes to the edge."""
        return sum(count for kind, count in self.by_kind.items() if kind.startswith("received"))

    @property
    def seconds(self) -> float:
        """Of a step; 0 where the machines are not known."""
        return self.walked.seconds if self.walked else 0.0

    @property
    def why(self) -> str:
        """What binds, in words."""
        if self.walked is None:
            return ""
        if self.binds == "latency":
            return "nothing is busy for long: the messages' way there and back"
        share = self.walked.busy[self.binds] / self.seconds
        return f"{self.binds}, busy {share:.0%}; twice as fast saves {self.saves / self.seconds:.0%}"


def forecast(
    source: Source, task: Task, batch: Any, means: Means | None = None, *, samples: bool = False,
    measure: Measure = timed,
) -> Forecast:  # fmt: skip
    """Of a task as ``Edge`` would run it on this batch, ``samples`` with ids. Without ``means`` only bytes are told.

    Raises ValueError for what ``Edge`` would refuse.
    """
    return price(halved(source, task, batch), task, batch, means, samples=samples, measure=measure)


def halved(source: Source, task: Task, batch: Any) -> tuple[Halves, ...]:
    """The cut trace of each micro-batch, without a weight in memory; those alike are one."""
    cut, found = Cut.parse(task.cut), dict[Any, Halves]()
    parts = [to_device(part, torch.device("cpu")) for part in split(batch, task.micro_batches)]
    model = changed(source, task, cut, parts[0])
    for part in parts:
        if (key := signature(part)) not in found:
            found[key] = halve(traced(model, part, source), cut)
    return tuple(found[signature(part)] for part in parts)


def changed(source: Source, task: Task, cut: Cut, part: Any) -> nn.Module:
    """The model on the meta device, as the task changes it."""
    model = source.build().to("meta")
    model.train()
    if cut.rank is not None:
        sft(model, part, cut.front, cut.rank, skip=task.skip, loss_fn=source.loss_fn)
    if task.frozen_edge:
        freeze_head(model, part, cut, source)
    if task.binary_edge:
        binarise(model, head_of(model, part, cut, source))
    return model


def traced(model: nn.Module, part: Any, source: Source) -> Trace:
    """The trace that a cut is made in."""
    return trace(model, part, source.loss_fn)


def price(
    halves: Sequence[Halves], task: Task, batch: Any, means: Means | None = None, *, samples: bool = False,
    measure: Measure = timed,
) -> Forecast:  # fmt: skip
    """What the task takes, cut so; ``halves`` are those of its micro-batches."""
    found = counted(halves, task, batch, samples=samples)
    return found.told if means is None else found.walked(means, measure)


@dataclass(frozen=True)
class Counted:
    """A way to run a step of which bytes are known, and seconds are not yet."""

    told: Forecast
    halves: Sequence[Halves]
    task: Task
    messages: Mapping[int, Mapping[Says, Said]]
    """By the ``id`` of the halves of a micro-batch; those alike are one."""
    sizes: Mapping[int, Mapping[Says, int]]

    def walked(self, means: Means, measure: Measure) -> Forecast:
        """The same with its step walked on these machines and this line."""
        task, halves = self.task, self.halves
        worked = {
            key: _work(one, task, means, self.messages[key], self.sizes[key], measure)
            for key, one in {id(one): one for one in halves}.items()
        }
        works = [worked[id(one)] for one in halves]
        hosts = () if task.lora else (1,)  # adapters are few
        updates = _update(halves[0], (0, 2), task, means.edge), _update(halves[0], hosts, task, means.host)
        around = Around(self.told.by_kind[SENT_BEGIN], self.told.by_kind[RECEIVED_DONE], *updates)
        said: dict[Side, tuple[Action, ...]] = {
            side: tuple(
                map(Action.parse, orders(side, Cut.parse(task.cut), task.micro_batches, task.window)[0].split())
            )
            for side in ("edge", "host")
        }
        walked = walk(said, works, around, means.uplink, means.downlink)
        saved = {
            name: walked.seconds - walk(said, works, around, means.uplink, means.downlink, faster={name: 2.0}).seconds
            for name in RESOURCES
        }
        binds = max(saved, key=lambda name: saved[name])
        if saved[binds] < 0.05 * walked.seconds:
            binds = "latency"
        return replace(self.told, walked=walked, binds=binds, saves=saved.get(binds, 0.0))


def counted(halves: Sequence[Halves], task: Task, batch: Any, *, samples: bool = False) -> Counted:
    """Bytes and memory of the task, cut so."""
    ids = (LEAST_ID,) * (rows(batch) if samples else 0)
    alike = {id(one): one for one in halves}
    messages = {key: _messages(one, task) for key, one in alike.items()}
    sizes = {
        key: {says: _size(specs, text, way, task) for says, (specs, text, way) in one.items()}
        for key, one in messages.items()
    }
    by_kind = {
        SENT_BEGIN: wire_bytes(len(beginning(batch, halves[0], ids).body())), RECEIVED_DONE: wire_bytes(Done.SIZE),
    }  # fmt: skip
    for one in halves:
        for says, count in sizes[id(one)].items():
            name = f"{'sent' if says in FROM_EDGE else 'received'} {says.name}"
            by_kind[name] = by_kind.get(name, 0) + count
    largest = max(halves, key=lambda one: one.sent[0].shape[:1])
    edge = _edge_memory(largest, task, max(sum(one.values()) for one in sizes.values()))
    host = weights_of(largest) + memory_of(largest, task, copies=0) if task.lora else memory_of(largest, task)
    told = Forecast(task.cut, _codec_text(task), task.micro_batches, by_kind, edge, host, walked=None)
    return Counted(told, halves, task, messages, sizes)


Said = tuple[Sequence[Spec], str, Way]
"""The values of a message, their codec, and which way they go."""


def _messages(halves: Halves, task: Task) -> dict[Says, Said]:
    links: dict[Link, tuple[Sequence[Spec], str]] = {"up": (halves.sent, task.codec)}
    if halves.tailed:
        links["down"] = (halves.returned, task.back_codec)
    found: dict[Says, Said] = {}
    for link, (specs, text) in links.items():
        found[KINDS[link, "forward"]] = (specs, text, "forward")
        if back := [spec for spec in specs if spec.requires_grad]:
            found[KINDS[link, "backward"]] = (back, text, "backward")
    return found


def _size(specs: Sequence[Spec], text: str, way: Way, task: Task) -> int:
    """Bytes on the socket of a message."""
    body = 0
    for spec in specs:
        kind = codec(text if coded(spec, frozen=task.frozen_edge) else "identity")
        frame = kind.wire_bytes(spec.shape, spec.dtype, Context(direction=way))
        body += len(number(frame)) + frame
    return wire_bytes(body)


def _work(
    halves: Halves, task: Task, means: Means, messages: Mapping[Says, Said], sizes: Mapping[Says, int], measure: Measure
) -> Work:
    places: dict[int, tuple[Side, int]] = {0: ("edge", 0), 1: ("host", 1), 2: ("edge", 3)}
    seconds: dict[tuple[Side, Kind, int], float] = {}
    all_costs = {side: op_costs(halves.trace.graph, one) for side, one in (("edge", means.edge), ("host", means.host))}
    for part in range(len(halves.starts) - 1):
        side, stage = places[part]
        costs = all_costs[side][halves.starts[part] : halves.starts[part + 1]]
        seconds[side, Kind.F, stage] = sum(cost.forward_seconds for cost in costs)
        seconds[side, Kind.B, stage] = sum(cost.backward_seconds for cost in costs)
    encode, decode = dict[Says, float](), dict[Says, float]()
    for says, (specs, text, way) in messages.items():
        each = [measure(text if coded(spec, frozen=task.frozen_edge) else "identity", spec, way) for spec in specs]
        encode[says], decode[says] = sum(one.encode for one in each), sum(one.decode for one in each)
    return Work(seconds, sizes, encode, decode)


def _weights(halves: Halves, parts: Sequence[int]) -> tuple[int, int]:
    """Bytes of the weights of some parts, and of those among them that are trained."""
    graph = halves.trace.graph
    names = {name for part in parts if part < len(halves.starts) - 1 for name in halves.params(part)}
    read = [graph.parameter(name) for name in names]
    return sum(p.nbytes for p in read), sum(p.nbytes for p in read if p.trainable and not p.buffer)


def _update(halves: Halves, parts: Sequence[int], task: Task, hardware: Hardware) -> float:
    """An optimizer reads weights, gradients and its states, and writes all but the gradients."""
    _, trained = _weights(halves, parts)
    return hardware.streaming_seconds(trained * (3 + 2 * STATES.get(task.optimizer.name, 2)))


def _edge_memory(halves: Halves, task: Task, message: int) -> int:
    """Bytes of tensors on the edge at most, without what codecs remember of samples.

    Activations are those the trace says the backward needs, of the micro-batches under way in the head and of one in
    the tail; and of each of those the messages that wait.
    """
    graph, starts = halves.trace.graph, halves.starts
    weights, trained = _weights(halves, (0, 2))
    head = sum(op.saved_bytes for op in graph.ops[: starts[1]])
    tail = sum(op.saved_bytes for op in graph.ops[starts[2] :]) if halves.tailed else 0
    live = min(task.window + 1, task.micro_batches)
    states = STATES.get(task.optimizer.name, 2)
    return weights + trained * (1 + states) + live * head + tail + min(live * message, 8 * CHUNK + message)


def _codec_text(task: Task) -> str:
    return task.codec if task.back_codec == task.codec else f"{task.codec} (back_codec {task.back_codec})"
