"""A session: one client's half of a model on the host, through lost connections, restarts and moves.

edge at n,  host at n       go on
edge at n,  host at n + 1   the step is done, its answer was lost: the host says everything again, and does nothing
else                        both go back to the newest step that both have a checkpoint of
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from merak_like.runtime.batches import rows, split
from merak_like.runtime.links import Spec
from merak_like.runtime.optimizer import StepResult
from merak_like.split.connection import Connection
from merak_like.split.crew import Crew
from merak_like.split.exchange import Link, Way
from merak_like.split.halves import LABELS
from merak_like.split.messages import Begin, Done, Hello, parse
from merak_like.split.metrics import Metrics
from merak_like.split.outline import blank, mask_of, width_of
from merak_like.split.programs import Half
from merak_like.split.training import Training
from merak_like.split.turn import Turn
from merak_like.split.wire import Key, Kind, WireError


class Refused(ValueError):
    """A session that this client may not have, or that cannot go on; the message is for the client."""


class Session:
    """One client's half. A step is done by one connection at a time."""

    def __init__(self, id_: str, owner: str, hello: Hello, training: Training, turn: Turn, crew: Crew) -> None:
        self.id, self.owner, self.task, self.example = id_, owner, hello.task, hello.example
        self.training, self.turn, self.crew = training, turn, crew
        self.training.exchange.keep_log = True
        self.used = time.monotonic()
        self.largest = self._largest(self.program(blank(hello.example)))
        self._log: tuple[int, list[tuple[Key, bytes]], Done] | None = None
        """The last step, what was said in it, and its end."""
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
            raise Refused("the session is still at work for a connection before: try again")
        # Before the welcome, which the first tensors may follow at once.
        connection.micro_batches = self.task.micro_batches
        connection.assembler.largest = self.largest
        connection.room = 2 * self.task.micro_batches * self.largest
        try:
            yield
        finally:
            self.used = time.monotonic()
            self._lock.release()

    def agree(self, at: int, saved: tuple[int, ...]) -> int:
        """Find the step to go on with, for an edge at step ``at`` with these checkpoints. Raises Refused."""
        step = self.training.step
        if at == step or (at + 1 == step and self._log is not None and self._log[0] == at):
            return step
        common = self.training.saved() & {at, *saved}
        if not common:
            raise Refused(
                f"the host is at step {step} and has checkpoints of {sorted(self.training.saved())}, the edge is at "
                f"{at} and has {sorted(saved)}: there is no step to go on with; begin a new session"
            )
        self._log = None
        with self.turn.held():
            self.training.go_to(max(common))
        return self.training.step

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
            begin = parse(Begin, body)
            again = key.step == self.training.step - 1
            done = self._step(key.step, begin, connection) if begin.training else self._look(key, begin, connection)
            if begin.training:
                metrics.add("merak_replays_total" if again else "merak_steps_total")
            connection.ended()
            connection.send(Key(Kind.DONE, key.step), done.body())

    def _step(self, step: int, begin: Begin, connection: Connection) -> Done:
        if self._log is not None and self._log[0] == step and self.training.step == step + 1:
            for key, body in self._log[1]:
                connection.send(key, body)
            return self._log[2]
        if step != self.training.step:
            raise WireError(f"step {step} begins, but this session is at step {self.training.step}")
        result, queued = self._run(begin, connection, self.training.run)
        done = Done(loss=result.loss if self.training.made.programs.cut.back is None else None, queued=queued)
        self._log = (step, self.training.exchange.log, done)
        self.training.save_if_due(self.facts())
        return done

    def _look(self, key: Key, begin: Begin, connection: Connection) -> Done:
        if key.step != self.training.step:
            raise WireError(f"an evaluation at step {key.step}, but this session is at step {self.training.step}")
        log, self.training.exchange.keep_log = self._log, False
        try:
            result, queued = self._run(begin, connection, self.training.evaluate)
        finally:
            self._log, self.training.exchange.keep_log = log, True
        return Done(loss=result.loss if self.training.made.programs.cut.back is None else None, queued=queued)

    def _run(self, begin: Begin, connection: Connection, do: Callable[[Any], StepResult]) -> tuple[StepResult, float]:
        if self.training.made.programs.cut.back is not None and begin.labels is not None:
            raise WireError("labels came for a cut with a tail on the edge: they have no place here")
        batch = batch_of(begin)
        parts = _parts(batch, self.task.micro_batches)
        mode = self.training.made.model.training
        with self.turn.held():
            self.training.made.model.train(begin.training)
            try:
                half = self.program(batch)
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
            self._try(batch, training=begin.training)
            samples = _samples(begin.samples, parts)
            self.training.exchange.begin(connection, self.training.step, samples, training=begin.training)
            before = len(self.turn.waited)
            with self.crew.together("step", session=self.id, begin=begin.model_dump(mode="json")):
                result = do(batch)
        return result, sum(list(self.turn.waited)[before:])

    def _try(self, batch: Any, *, training: bool) -> None:
        """Raises ValueError for a batch that an engine would refuse, before any rank has begun."""
        model, made = self.training.made.model, self.training.made
        mode = model.training
        model.train(training)
        try:
            for part in split(batch, self.task.micro_batches):
                made.programs.at(part)
                if not made.weigh(part):
                    raise WireError("a micro-batch has no item to learn from: every label is ignored")
        finally:
            model.train(mode)

    def program(self, batch: Any) -> Half:
        """The program of the batch's first micro-batch."""
        return self.training.made.programs.at(split(batch, self.task.micro_batches)[0])

    def _largest(self, half: Half) -> int:
        halves, exchange = half.halves, self.training.exchange
        links: dict[Link, Sequence[Spec]] = {"up": halves.sent, "down": halves.returned if halves.tailed else ()}
        ways: tuple[Way, Way] = ("forward", "backward")
        return max(exchange.bytes_of(link, way, specs) for link, specs in links.items() for way in ways)

    def close(self) -> None:
        """Let go of the half."""
        self.training.close()


def batch_of(begin: Begin) -> Any:
    """The batch of a step as far as the host may know it. Raises WireError for what is none."""
    mask = None if begin.lengths is None else mask_of(begin.lengths, width_of(begin.outline))
    return blank(begin.outline, mask, None if begin.labels is None else _labels(begin.labels))


def _parts(batch: Any, count: int) -> list[int]:
    try:
        return [rows(part) for part in split(batch, count)]
    except ValueError as error:
        raise WireError(str(error)) from None


def _samples(ids: tuple[int, ...], parts: list[int]) -> list[tuple[int, ...]]:
    if not ids:
        return [()] * len(parts)
    if len(ids) != sum(parts):
        raise WireError(f"{len(ids)} sample ids came for {sum(parts)} samples")
    found, at = [], 0
    for count in parts:
        found.append(tuple(ids[at : at + count]))
        at += count
    return found


def _labels(said: Any) -> torch.Tensor:
    try:
        return torch.tensor(said)
    except (ValueError, TypeError, RuntimeError) as error:
        raise WireError(f"{LABELS} are no tensor: {str(error)[:100]}") from None
