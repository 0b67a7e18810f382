"""The edge: it has the data, the labels, the first layers and the loss, and dials a host for all between.

A step is one exchange with the host. Whatever breaks it, it is done again from its beginning, here and there, until
both have it once; only when a side had to be restarted from its checkpoint does training go back to that step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from merak_like.runtime.batches import rows, split
from merak_like.runtime.methods.method import Method
from merak_like.runtime.optimizer import StepResult
from merak_like.split import checkpoint
from merak_like.split.ahead import Ahead
from merak_like.split.connection import Connection, Lost, Told, Waits
from merak_like.split.contrasted import loss_at_home
from merak_like.split.dialler import Dialler
from merak_like.split.half import Source, build_half
from merak_like.split.layers import layers_of, trade
from merak_like.split.messages import Done, Hello, Task, Welcome, parse
from merak_like.split.outline import beginning, outline
from merak_like.split.programs import Half
from merak_like.split.remembered import Remembered
from merak_like.split.screen import Screen
from merak_like.split.tls import Keys
from merak_like.split.training import Training, Word, optimizer_of
from merak_like.split.wire import CHUNK, Key, Kind

T = TypeVar("T")


class WentBack(RuntimeError):
    """A side was restarted, and both are at an earlier step now: feed the batches from ``step`` on again."""

    def __init__(self, step: int) -> None:
        super().__init__(f"edge and host have gone back to step {step}: feed the batches from there on again")
        self.step = step


class Edge:
    """Trains the edge's half of a model together with a host."""

    def __init__(
        self, source: Source, task: Task, example: Any, *, connect: str | Sequence[str], folder: str | Path,
        keys: Keys | None = None, insecure: bool = False, waits: Waits | None = None, patience: float = 300.0,
        window: int = 8 * CHUNK, device: torch.device | str = "cpu", screen: Screen | None = None,
        methods: Sequence[Method] = (),
    ) -> None:  # fmt: skip
        """``example`` is the largest batch there will be; ``folder`` keeps checkpoints and the session's name.

        ``connect`` is HOST:PORT, or several of them to be tried in turn. ``patience`` is how many seconds a step may go
        without a host. ``screen`` is what is done to what is sent; losses are told without its own. ``methods``
        follow the edge's own gradients, as ``LowRank`` does. Raises ValueError for what cannot be built so; the host is
        dialled at the first step.
        """
        self.task, self.example, self.folder, self.patience = task, example, Path(folder), patience
        self.device = torch.device(device)
        self._word = Word()
        self.exchange = Ahead(
            {"up": task.codec, "down": task.back_codec}, task.seed, self.device, frozen=task.frozen_edge
        )
        made = build_half(
            "edge", source, task, example, self.exchange, links=self._word, optimizer=optimizer_of(task.optimizer),
            device=self.device, screen=screen, methods=methods,
        )  # fmt: skip
        self.training = Training(made, self.exchange, task.optimizer, self.folder, task.checkpoint_every)
        addresses = [connect] if isinstance(connect, str) else list(connect)
        self._dialler = Dialler(addresses, keys, insecure, waits or Waits(), window)
        self._connection: Connection | None = None
        self._host_step, self._done = 0, Done()
        self._known = Remembered(self.folder, task)
        self._owes = False  # our own layers, to be averaged
        self.queued = 0.0
        """Seconds that the host's computations waited for their turn."""
        self.bytes: Counter[str] = Counter()
        """Bytes on the socket, headers included: "sent" and "received", and the same by kind of message."""
        known, steps = self._known.session is not None, checkpoint.whole(self.folder)
        if known and not steps:
            raise ValueError(f"{self.folder} names a session and has no whole checkpoint to go on with")
        if known or (steps and task.local is not None):  # there are steps that no host knows of
            self.training.go_to(steps[-1])

    # --- what people call -------------------------------------------------------------------------------------------

    @property
    def step_number(self) -> int:
        """Steps done."""
        return self.training.step

    @property
    def session(self) -> str | None:
        """The session's name on the host."""
        return self._known.session

    @session.setter
    def session(self, name: str | None) -> None:
        self._known.session = name

    def step(self, batch: Any, *, samples: Sequence[int] | None = None) -> StepResult:
        """Train on one batch. ``samples`` are ids of its samples, for codecs with memory; they travel disguised.

        Raises WentBack where a side had to go back to a checkpoint, FloatingPointError for numbers that are not finite
        (nothing is changed), Lost when no host answers for long, ValueError for what the host refuses.
        In a group that averages the edges' own layers, the last step of a round waits for the others.
        """
        if self.task.local is not None and self.training.step < self.task.local.alone:
            return self._at_home(batch)
        result = self._through(lambda: self._attempt(batch, samples, self.training.run))
        self._host_step, self.exchange.heard, told = self.training.step, self._done.heard, self._done
        if told.owes:
            self._through(self._average)
        elif self.training.due if told.save is None else told.save:
            self.save()
        return result

    def _at_home(self, batch: Any) -> StepResult:
        self.exchange.heard, self._word.wait = False, lambda: None
        result = self.training.run(batch)
        if self.training.due:
            self.save()
        loss = loss_at_home(self.training.made.programs, split(batch, self.task.micro_batches))
        return StepResult(loss, result.grad_norm, result.tokens)

    def train(
        self, batches: Callable[[int], Any], steps: int, *,
        samples: Callable[[int], Sequence[int] | None] | None = None,
        on_step: Callable[[int, StepResult], None] = lambda step, result: None,
    ) -> None:  # fmt: skip
        """Train until ``steps`` are done; ``batches(step)`` must give the same batch whenever it is asked."""
        while (at := self.training.step) < steps or self._owes:
            try:
                if at < steps:
                    on_step(at, self.step(batches(at), samples=samples(at) if samples is not None else None))
                else:
                    self._through(self._average)  # of a last step whose mean did not come in time
            except WentBack:
                continue

    def evaluate(self, batch: Any) -> StepResult:
        """The loss on a batch in evaluation mode."""
        return self._through(lambda: self._attempt(batch, None, self.training.evaluate, training=False))

    def predict(self, batch: Any) -> dict[str, Tensor]:
        """The model's outputs for a batch in evaluation mode, by name. Raises ValueError where the host has them."""
        self.evaluate(batch)
        return self.training.shown(split(batch, self.task.micro_batches))

    def state_dict(self) -> dict[str, Tensor]:
        """The edge's own weights and buffers, by their names in the model."""
        own = set(self.training.made.own)
        state = self.training.made.model.state_dict(keep_vars=True)
        return {name: t.detach() for name, t in state.items() if name in own}

    def save(self) -> None:
        """Write a checkpoint now, besides those that are due."""
        self.training.save({"session": self.session})

    def close(self) -> None:
        """Say goodbye and let go; the session stays on the host."""
        if self._connection is not None and not self._connection.closed:
            self._leave(say=True)
        self._dialler.close()
        self.training.close()
        self.exchange.close()

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- a step, until it is through --------------------------------------------------------------------------------

    def _through(self, attempt: Callable[[], T]) -> T:
        end = time.monotonic() + self.patience
        pause = 0.05
        while True:
            try:
                self._connect()
                return attempt()
            except Lost as error:
                self._leave()
                self._dialler.next()
                if time.monotonic() > end:
                    raise Lost(f"no host for {self.patience:.0f} s at step {self.training.step}: {error}") from error
            except Told as error:
                self._leave()
                if error.failed.code == "not-finite":
                    raise FloatingPointError(f"step {self.training.step}: the host says: {error}") from None
                if error.failed.code not in ("busy", "internal") or time.monotonic() > end:
                    kind = PermissionError if "Authentication" in str(error) else ValueError
                    raise kind(f"the host refuses: {error}") from None
                pause = max(pause, min(error.failed.after, end - time.monotonic()))
            except BaseException:
                self._leave()
                raise
            time.sleep(max(0.0, pause))
            pause = min(5.0, 2 * pause)

    def _attempt(
        self, batch: Any, samples: Sequence[int] | None, do: Callable[[Any], StepResult], *, training: bool = True
    ) -> StepResult:
        self._average()
        connection, step = self._connection, self.training.step
        assert connection is not None
        parts = split(batch, self.task.micro_batches)
        ids = [] if samples is None else [self._known.disguised(sample) for sample in samples]
        if ids and len(ids) != rows(batch):
            raise ValueError(f"{len(ids)} sample ids for a batch of {rows(batch)} samples: give one for each")
        mode = self.training.made.model.training
        self.training.made.model.train(training)
        half = self.training.made.programs.at(parts[0])
        self.training.made.model.train(mode)
        begin = beginning(batch, half.halves, ids, training=training)
        if training and not self.exchange.heard:
            begin = begin.model_copy(update={"silent": True, "labels": None, "lengths": None, "samples": ()})
        counts = [rows(part) for part in parts]
        per_part = [tuple(ids[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(parts))]
        connection.expect(Key(Kind.BEGIN, step))
        connection.send(Key(Kind.BEGIN, step), begin.body())
        self.exchange.begin(connection, step, per_part, training=training)
        self.exchange.mute = training and self._host_step == step + 1

        def wait() -> None:
            self._done = parse(Done, connection.receive(Key(Kind.DONE, step)))
            self.exchange.settle()

        self._word.wait = wait
        result = do(batch)
        self._owes = self._done.owes
        self.queued += self._done.queued
        self._count(connection)
        loss = result.loss if half.halves.tailed else self._done.loss
        if training and self.task.local is not None:
            loss = loss_at_home(self.training.made.programs, parts)
        return StepResult(loss if loss is not None else float("nan"), result.grad_norm, result.tokens)

    def _average(self) -> None:
        """Let the host average this edge's own layers with the others', if it is time. A checkpoint is written."""
        if not self._owes:
            return
        if not self.task.average_edges:
            raise ValueError("the host asks for this edge's own layers: its task does not say average_edges")
        assert self._connection is not None
        layers = layers_of(self._example_half().halves)
        trade(layers, self.training.made.model, self.exchange, self._connection, self.training.step)
        self._owes = False
        self._count(self._connection)
        self.save()

    def _example_half(self) -> Half:
        return self.training.made.programs.at(split(self.example, self.task.micro_batches)[0])

    def _connect(self) -> None:
        """Have a connection with an open session, at a step both sides agree on. Raises WentBack."""
        if self._connection is not None and not self._connection.closed:
            return
        self._leave()
        half = self._example_half()
        hello = Hello(
            task=self.task, example=outline(self.example), digest=half.halves.digest, session=self.session,
            step=self.training.step, saved=tuple(sorted(self.training.saved())), probe=self.training.made.probe,
        )  # fmt: skip
        connection = self._connection = self._dialler.dial()
        connection.send(Key(Kind.HELLO), hello.body())
        welcome = parse(Welcome, connection.receive(Key(Kind.WELCOME)))
        connection.assembler.largest = welcome.largest
        connection.room = 2 * self.task.micro_batches * max(welcome.largest, 1)
        connection.micro_batches = self.task.micro_batches
        self._owes, self.exchange.heard = welcome.owes, welcome.heard
        if self._known.session is None:
            self._known.session = welcome.session
            self.save()
            self._known.keep()
        self._host_step, at = welcome.step, self.training.step
        if welcome.step not in (at, at + 1):
            self.training.go_to(welcome.step)
            raise WentBack(welcome.step)

    def _leave(self, *, say: bool = False) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if say:
                connection.send(Key(Kind.BYE), b"")
                connection.flush(5.0)
            self._count(connection)
            connection.close()

    def _count(self, connection: Connection) -> None:
        for counted in (connection.bytes, connection.by_kind):
            self.bytes.update(counted)
            counted.clear()
