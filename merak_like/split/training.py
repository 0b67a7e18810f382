"""One side's training state, and the step as a transaction: it is applied once, or nothing of it is left.

A step changes weights and optimizer at its very end. What changes before that, the codecs' memories and buffers such
as running means, is kept as it was until the step is through, so that a step that failed can be done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.runtime.links import NoLinks
from merak_like.runtime.optimizer import StepResult
from merak_like.split import checkpoint
from merak_like.split.checkpoint import State
from merak_like.split.crew import Crew
from merak_like.split.exchange import Exchange
from merak_like.split.half import Made
from merak_like.split.messages import OptimizerText
from merak_like.split.sharded import fitting, part, whole
from merak_like.split.wire import WireError

OPTIMIZERS: Mapping[str, Callable[[Iterable[nn.Parameter], OptimizerText], torch.optim.Optimizer]] = {
    "adamw": lambda ps, o: torch.optim.AdamW(ps, lr=o.lr, weight_decay=o.weight_decay),
    "adam": lambda ps, o: torch.optim.Adam(ps, lr=o.lr, weight_decay=o.weight_decay),
    "sgd": lambda ps, o: torch.optim.SGD(ps, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum),
}
"""Optimizers by the name both ends know."""


def optimizer_of(text: OptimizerText) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Makes the optimizer of a text. Raises ValueError for a name nobody knows."""
    if text.name not in OPTIMIZERS:
        raise ValueError(f"no optimizer {text.name!r}: there are {', '.join(OPTIMIZERS)}")
    return lambda parameters: OPTIMIZERS[text.name](parameters, text)


def rate(text: OptimizerText, step: int, scale: float = 1.0) -> float:
    """The learning rate of a step: up from 0 over the warm-up, then, if steps are given, down to 0."""
    if step < text.warmup:
        return scale * text.lr * (step + 1) / text.warmup
    if text.steps <= text.warmup:
        return scale * text.lr
    return scale * text.lr * max(0.0, (text.steps - step) / (text.steps - text.warmup))


class Word(NoLinks):
    """The end of a step: the host has said that it is applied. Only then are the edge's own weights changed."""

    wait: Callable[[], None]

    def flush(self) -> None:
        self.wait()


class Training:
    """One side at a step."""

    def __init__(
        self, made: Made, exchange: Exchange, optimizer: OptimizerText, folder: Path, every: int,
        crew: Crew | None = None,
    ) -> None:  # fmt: skip
        """Checkpoints go to ``folder`` whenever the step is a multiple of ``every``. ``crew`` are a host's ranks."""
        self.made, self.exchange, self.text, self.crew = made, exchange, optimizer, crew
        self.folder, self.every = folder, every
        self.scale = 1.0
        """Of the learning rate."""
        self._saved: set[int] | None = None
        self._before: Mapping[str, Tensor] | None = None
        """What the codecs remembered when the step under way began."""

    @property
    def engine(self) -> Any:
        """The engine of this side."""
        return self.made.engine

    @property
    def step(self) -> int:
        """Steps done."""
        return self.engine.steps

    def run(
        self, batch: Any, order: AbstractContextManager[None] | None = None,
        then: Callable[[StepResult], None] | None = None,
    ) -> StepResult:  # fmt: skip
        """One step; on any error everything is as it was before.

        It is done inside ``order``, and is only tried until ``then`` has returned.
        """
        if self.engine.optimizer is not None:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate(self.text, self.step, self.scale)
        with self._all_or_nothing():
            with order or nullcontext():
                done = self.engine.step(batch)
                self._even()
            if then is not None:
                self.engine.steps -= 1  # whoever looks meanwhile finds the step before
                then(done)
                self.engine.steps += 1
            return done

    def evaluate(self, batch: Any, order: AbstractContextManager[None] | None = None) -> StepResult:
        """The loss in evaluation mode; nothing is changed."""
        with self._all_or_nothing(always=True), order or nullcontext():
            return self.engine.evaluate(batch)

    def shown(self, parts: Sequence[Any]) -> dict[str, Tensor]:
        """The outputs of the micro-batches evaluated last, by name. Raises ValueError where the host has them."""
        model, found = self.made.model, list[dict[str, Tensor]]()
        mode = model.training
        model.eval()
        for i, micro in enumerate(parts):
            stage = self.made.programs.at(micro).shown
            if stage is None:
                raise ValueError("the cut has no tail on the edge, so the outputs are the host's: cut FRONT:BACK")
            found.append(stage.shown[i])
        model.train(mode)
        return {
            name: torch.cat([one[name] for one in found])
            for name, first in found[0].items()
            if first.dim() and name != "loss"
        }

    def require_items(self, parts: Sequence[Any], *, training: bool) -> None:
        """Raises ValueError for a batch that an engine would refuse, before any rank has begun."""
        mode = self.made.model.training
        self.made.model.train(training)
        try:
            for micro in parts:
                self.made.programs.at(micro)
                if not self.made.weigh(micro):
                    raise WireError("a micro-batch has no item to learn from: every label is ignored")
        finally:
            self.made.model.train(mode)

    @contextmanager
    def _all_or_nothing(self, *, always: bool = False) -> Iterator[None]:
        codecs = self._before = {name: t.clone() for name, t in self.exchange.state_dict().items()}
        buffers = {name: t.clone() for name, t in self.buffers().items()}
        through = False
        try:
            yield
            through = True
        finally:
            if always or not through:
                self.exchange.load_state_dict(codecs)
                own = self.buffers()
                for name, before in buffers.items():
                    own[name].copy_(before)
            self._before = None

    def _even(self) -> None:
        """Let replicas go on with the mean of their running means, and one's count."""
        if self.crew is None or self.crew.mesh.dp == 1 or not self.made.counting:
            return
        own, replicas = self.buffers(), self.crew.mesh.dp
        for name in self.made.counting:
            if own[name].dtype.is_floating_point:
                self.crew.add_up(own[name], self.engine.groups)
                own[name].div_(replicas)

    def buffers(self) -> dict[str, Tensor]:
        """This half's own buffers."""
        own = set(self.made.own)
        return {name: b for name, b in self.made.model.named_buffers() if name in own and not b.is_meta}

    def put_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take a group's buffers for this half's own."""
        for name, own in self.buffers().items():
            own.copy_(buffers[name])

    def settled(self) -> Mapping[str, Tensor]:
        """What the codecs remember, without what a step under way has changed."""
        return self.exchange.state_dict() if self._before is None else self._before

    def _tensors(self) -> dict[str, Tensor]:
        own = set(self.made.own)
        found = {name: p for name, p in self.made.model.named_parameters() if name in own and p.requires_grad}
        return {**found, **self.buffers()}

    def state(self) -> State:
        """Everything that training changes: weights, buffers, optimizer, codecs, step; on a crew's rank 0 all of it."""
        optimizer = checkpoint.optimizer_state(self.engine.optimizer, self.made.trained)
        tensors = {
            **checkpoint.under("model/", self._tensors()),
            **checkpoint.under("optimizer/", optimizer.tensors),
            **checkpoint.under("codec/", self.exchange.state_dict()),
        }
        mine = State(tensors, {"step": self.step, "optimizer": dict(optimizer.facts)})
        return mine if self.crew is None else self.crew.gather(mine, partial(whole, self.made.shards))

    def restore(self, state: State | None) -> None:
        """Go back, or on, to a state that rank 0 has. Raises ValueError where it is of another model."""
        with self._together("restore"):
            codecs = {} if state is None else checkpoint.of("codec/", state.tensors)  # of who talks to the edge
            if self.crew is not None:
                shared = state and State(
                    {name: t for name, t in state.tensors.items() if not name.startswith("codec/")}, state.facts
                )
                state = self.crew.share(shared)
            assert state is not None
            failed: Exception | None = None
            try:
                self._restore(state, codecs)
            except Exception as error:  # all ranks are told of it, and raise
                failed = error
            if self.crew is not None:
                self.crew.agree(failed)
            elif failed is not None:
                raise failed

    def _restore(self, state: State, codecs: Mapping[str, Tensor]) -> None:
        cut = {name: part(self.made.shards, name, tensor) for name, tensor in state.tensors.items()}
        mine, theirs = self._tensors(), checkpoint.of("model/", cut)
        alone = self.crew is None or self.crew.world.alone
        taken = fitting(mine, theirs, self.made.fixed, alone=alone)
        with torch.no_grad():
            for name in taken:
                mine[name].copy_(theirs[name])
        optimizer = State(checkpoint.of("optimizer/", cut), state.facts["optimizer"])
        if "groups" in optimizer.facts:
            checkpoint.load_optimizer(self.engine.optimizer, self.made.trained, optimizer)
        self.exchange.load_state_dict(codecs)
        self.engine.steps = int(state.facts["step"])

    def save(self, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint of the present step; a crew's rank 0 does, with what the others send."""
        with self._together("save"):
            state = self.state()
        if self.crew is None or self.crew.world.rank == 0:
            checkpoint.save(self.folder, self.step, State(state.tensors, {**state.facts, **facts}))
            self._saved = None

    def save_if_due(self, facts: Mapping[str, Any]) -> None:
        """Write a checkpoint where the step is a multiple of ``every``."""
        if self.due:
            self.save(facts)

    @property
    def due(self) -> bool:
        """Whether this is a step to keep."""
        return self.step % self.every == 0

    def saved(self) -> set[int]:
        """Steps with a whole checkpoint, read once."""
        if self._saved is None:
            self._saved = set(checkpoint.whole(self.folder))
        return self._saved

    def go_to(self, step: int) -> None:
        """Restore the checkpoint of a step. Raises ValueError where there is none."""
        self.restore(checkpoint.load(self.folder, step))

    def close(self) -> None:
        """Let go of the engine."""
        with self._together("close"):
            self.engine.close()

    def _together(self, do: str) -> AbstractContextManager[None]:
        """With the other ranks of a crew, which find this half by the name of its folder."""
        return nullcontext() if self.crew is None else self.crew.together(do, session=self.folder.name)
