"""A session: one client's half of a model on the host, through lost connections, restarts and moves.

edge at n,  host at n       go on
edge at n,  host at n + 1   the step is done, its answer was lost: the host says everything again, and does nothing
else                        both go back to the newest step that both have a checkpoint of
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from merak_like.runtime.batches import rows
from merak_like.runtime.links import Spec
from merak_like.runtime.optimizer import StepResult
from merak_like.split import checkpoint
from merak_like.split.abreast import order
from merak_like.split.checkpoint import State
from merak_like.split.connection import Connection
from merak_like.split.crew import Crew
from merak_like.split.exchange import Link, Way
from merak_like.split.heard import Hearing
from merak_like.split.layers import layers_of
from merak_like.split.messages import Begin, Done, Hello, parse
from merak_like.split.metrics import Metrics
from merak_like.split.outline import batch_of, blank, parts_of, samples_of
from merak_like.split.programs import Half
from merak_like.split.rounds import Busy
from merak_like.split.training import Training
from merak_like.split.turn import Turn
from merak_like.split.wire import Key, Kind, WireError

if TYPE_CHECKING:
    from merak_like.split.group import After, Group


class Refused(ValueError):
    """A session that this client may not have, or that cannot go on; the message is for the client."""


class Session:
    """One client's half. A step is done by one connection at a time."""

    def __init__(
        self, id_: str, owner: str, hello: Hello, training: Training, turn: Turn, crew: Crew,
        group: Group | None = None,
    ) -> None:  # fmt: skip
        self.id, self.owner, self.task, self.example = id_, owner, hello.task, hello.example
        self.training, self.turn, self.crew, self.group = training, turn, crew, group
        self.training.exchange.keep_log = True
        self.begins = 0 if self.task.local is None else self.task.local.alone
        """The first step that there is on this side."""
        self.training.engine.steps = self.begins
        self.hearing = Hearing(group.rounds, owner, self.begins) if group and self.task.local else None
        self.used = time.monotonic()
        half = training.made.programs.at(parts_of(blank(hello.example), hello.task.micro_batches)[0])
        self.layers = layers_of(half.halves) if hello.task.average_edges else None
        """The edge's own, where they are averaged."""
        self.largest = self._largest(half)
        self.last: tuple[int, list[tuple[Key, bytes]], Done] | None = None
        """The last step, what was said in it, and its end."""
        self.owes = 0
        """In a group: the round for whose mean the edge's own layers are due, or have been since the last step."""
        self.items = 0
        """That its edge has trained on since the mean before."""
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def facts(self) -> Mapping[str, Any]:
        """What a checkpoint says besides the state: whose it is, and what was agreed."""
        return {"session": self.id, "owner": self.owner, "task": self.task.model_dump(), "example": self.example}

    @contextmanager
    def taken_over(self, connection: Connection) -> Iterator[None]:
        """By this connection; the one before is ended, for a client that comes back has lost it."""
        before, self._connection = self._connection, connection
        if before is not None:
            before.close()
        if not self._lock.acquire(timeout=30):
            raise Busy("the session is still at work for a connection before: try again")
        # Before the edge hears that it is welcome: its first micro-batch may come at once.
        connection.micro_batches = self.task.micro_batches
        connection.assembler.largest = self.largest
        connection.room = 2 * self.task.micro_batches * self.largest
        if self.layers is not None:
            connection.pieces = len(self.layers.pieces)
            connection.room = max(connection.room, connection.pieces * self.largest)
        try:
            yield
        finally:
            self.used = time.monotonic()
            self._lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Without a connection: the one it has is ended, and none can take its place. Raises Busy."""
        if self._connection is not None:
            self._connection.close()
        if not self._lock.acquire(timeout=30):
            raise Busy("another session of the group is still at work: try again")
        try:
            yield
        finally:
            self._lock.release()

    def agree(self, at: int, saved: tuple[int, ...]) -> int:
        """Find the step to go on with, for an edge at step ``at`` with these checkpoints. Raises Refused."""
        if self.hearing is not None:
            found = self.hearing.agree(at, saved, self.begins - 1 if self.last is None else self.last[0])
            if found is not None:
                self.training.engine.steps = found
                return found
        step = self.training.step
        if at == step or (at + 1 == step and self.last is not None and self.last[0] == at):
            return step
        if self.group is not None:
            if step not in saved:  # else the edge goes back by itself
                self.group.go_back(self, at, saved)
            return self.training.step
        common = self.training.saved() & {at, *saved}
        if not common:
            raise Refused(
                f"the host is at step {step} and has checkpoints of {sorted(self.training.saved())}, the edge is at "
                f"{at} and has {sorted(saved)}: there is no step to go on with; begin a new session"
            )
        self.last = None
        with self.turn.held():
            self.training.go_to(max(common))
        return self.training.step

    def state(self) -> State:
        """What a group's checkpoint keeps of this session: its step, its codecs, what it said last."""
        last = self.last and {
            "step": self.last[0], "keys": [list(key) for key, _ in self.last[1]], "done": self.last[2].model_dump(),
        }  # fmt: skip
        said = {
            f"said/{i}": torch.frombuffer(bytearray(body), dtype=torch.uint8)
            for i, (_, body) in enumerate(self.last[1] if self.last else ())
        }
        codecs = {name: t.clone() for name, t in self.training.settled().items()}
        facts = {"step": self.training.step, "last": last, "owes": self.owes, "items": self.items}
        return State({**said, **checkpoint.under("codec/", codecs)}, {**self.facts(), **facts})

    def resume(self, state: State | None) -> None:
        """Be where a group's checkpoint knows this session; None: it had not begun."""
        self.last, self.training.engine.steps, self.owes, self.items = None, self.begins, 0, 0
        self.training.exchange.load_state_dict({} if state is None else checkpoint.of("codec/", state.tensors))
        if state is None:
            return
        self.training.engine.steps = int(state.facts["step"])
        self.owes, self.items = int(state.facts.get("owes", 0)), int(state.facts.get("items", 0))
        if (last := state.facts["last"]) is not None:
            bodies = [state.tensors[f"said/{i}"].numpy().tobytes() for i in range(len(last["keys"]))]
            keys = [Key(Kind(kind), step, micro_batch) for kind, step, micro_batch in last["keys"]]
            self.last = (last["step"], list(zip(keys, bodies, strict=True)), Done.model_validate(last["done"]))

    @property
    def busy(self) -> bool:
        """Whether a connection is at work on it."""
        return self._lock.locked()

    def serve(self, connection: Connection, stop: Callable[[], bool], metrics: Metrics) -> None:
        """Do what the edge asks, until the connection ends or ``stop`` says so between two steps."""
        while not stop():
            if (found := connection.begun()) is None:
                continue
            key, body = found
            self.used = time.monotonic()
            done = (
                self._average(key, connection)
                if key.kind is Kind.GATHER
                else self._begun(key, body, connection, metrics)
            )
            connection.ended()
            connection.send(Key(Kind.DONE, key.step), done.body())

    def _begun(self, key: Key, body: bytes, connection: Connection, metrics: Metrics) -> Done:
        begin = parse(Begin, body)
        if not begin.training or begin.silent:
            return self._look(key, begin, connection) if not begin.training else self._silent(key, connection)
        again = key.step == self.training.step - 1
        done = self._step(key.step, begin, connection)
        metrics.add("merak_replays_total" if again else "merak_steps_total")
        return done

    def _average(self, key: Key, connection: Connection) -> Done:
        """Take the edge's own layers and give it the mean instead; the session is at the same step before and after."""
        if self.group is None or self.layers is None or not self.owes or key.step != self.training.step:
            raise WireError(f"{key}: no layers of this edge are due")
        exchange, pieces = self.training.exchange, self.layers.pieces
        exchange.keep_log = False
        exchange.begin(connection, key.step, [])
        try:
            with self.turn.held():
                brought = {p.name: exchange.take("own", "forward", i, [p])[p.name] for i, p in enumerate(pieces)}
                mean = self.group.average(self, brought, lambda: not connection.closed)
                for i, piece in enumerate(pieces):
                    exchange.put("own", "backward", i, mean, [piece])
        finally:
            exchange.keep_log = True
        return Done()

    def _step(self, step: int, begin: Begin, connection: Connection) -> Done:
        if self.last is not None and self.last[0] == step and self.training.step == step + 1:
            for key, body in self.last[1]:
                connection.send(key, body)
            return self._told(step, self.last[2], connection)
        if step != self.training.step:
            raise WireError(f"step {step} begins, but this session is at step {self.training.step}")
        if self.group is None:
            done = self._do(step, begin, connection, None)
            self.training.save_if_due(self.facts())
            return done
        if self.hearing is not None and not self.hearing.hears(step):
            raise WireError(f"step {step} of this edge is not heard: it is done at home, and nothing of it is sent")
        with self.group.step(self, lambda: not connection.closed) as after:
            done = self._do(step, begin, connection, after)
        return self._told(step, done, connection)

    def _told(self, step: int, done: Done, connection: Connection) -> Done:
        if self.hearing is None:
            return done
        return done.model_copy(update=self.hearing.over(step, lambda: not connection.closed))

    def _silent(self, key: Key, connection: Connection) -> Done:
        """A step that nobody listens to: it is over when its round is."""
        if self.hearing is None or self.hearing.hears(key.step) or key.step != self.training.step:
            raise WireError(f"{key}: a silent step, but this session is at step {self.training.step} or heard")
        done = self._told(key.step, Done(), connection)
        self.training.engine.steps = key.step + 1
        return done

    def _do(self, step: int, begin: Begin, connection: Connection, after: After | None) -> Done:
        then = None if self.group is None else partial(self.group.give, self)
        result, queued = self._run(begin, connection, partial(self.training.run, then=then))
        loss = result.loss if self.training.made.programs.cut.back is None else None
        done = Done(loss=loss, queued=queued)
        if after is not None:
            self.items = result.tokens + (0 if self.owes else self.items)
            self.owes = after.average
            done = Done(loss=loss, queued=queued, save=after.save, owes=bool(after.average))
        self.last = (step, self.training.exchange.log, done)
        return done

    def _look(self, key: Key, begin: Begin, connection: Connection) -> Done:
        if key.step != self.training.step:
            raise WireError(f"an evaluation at step {key.step}, but this session is at step {self.training.step}")
        log, self.training.exchange.keep_log = self.last, False
        try:
            with self.group.look(self) if self.group is not None else nullcontext():
                result, queued = self._run(begin, connection, self.training.evaluate)
        finally:
            self.last, self.training.exchange.keep_log = log, True
        return Done(loss=result.loss if self.training.made.programs.cut.back is None else None, queued=queued)

    def _run(self, begin: Begin, connection: Connection, do: Callable[..., StepResult]) -> tuple[StepResult, float]:
        if self.training.made.programs.cut.back is not None and begin.labels is not None:
            raise WireError("labels came for a cut with a tail on the edge: they have no place here")
        batch = batch_of(begin)
        parts = parts_of(batch, self.task.micro_batches)
        mode, before = self.training.made.model.training, self.turn.queued
        with self.turn.held():
            self.training.made.model.train(begin.training)
            try:
                half = self.training.made.programs.at(parts[0])
            finally:
                self.training.made.model.train(mode)
            if half.halves.digest != begin.digest:
                raise WireError(
                    "the model takes another way on this batch here than on the edge: both ends need the same model, "
                    "the same releases of torch and transformers, and a batch whose content does not decide the way"
                )
            if self._largest(half) > self.largest:
                raise WireError(
                    "the batch is larger than the one the session was opened with: open it with the largest"
                )
            self.training.require_items(parts, training=begin.training)
            samples = samples_of(begin.samples, [rows(part) for part in parts])
            self.training.exchange.begin(connection, self.training.step, samples, training=begin.training)
            told = {"session": self.id, "begin": begin.model_dump(mode="json"), "at": self.training.step}
            result = do(batch, order=order(self, told, parts, lambda: not connection.closed))
        return result, self.turn.queued - before

    def _largest(self, half: Half) -> int:
        halves, exchange = half.halves, self.training.exchange
        links: dict[Link, Sequence[Spec]] = {"up": halves.sent, "down": halves.returned if halves.tailed else ()}
        ways: tuple[Way, Way] = ("forward", "backward")
        own = 0 if self.layers is None else exchange.bytes_of("own", "forward", self.layers.pieces[:1])
        return max(own, *(exchange.bytes_of(link, way, specs) for link, specs in links.items() for way in ways))

    def close(self) -> None:
        """Let go of the half."""
        self.training.close()
