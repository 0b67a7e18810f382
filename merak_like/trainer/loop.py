"""``Trainer``: the loop. For each step a batch, a learning rate, ``engine.step``; now and then a look and a save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merak_like.ds_config.rates import Rate
from merak_like.runtime.optimizer import StepResult
from merak_like.runtime.signals import polite
from merak_like.trainer.assembly import around, assembled, check, restore_options, share, steps_of
from merak_like.trainer.checkpoints import LOOP, Checkpointer, Resume, set_aside
from merak_like.trainer.data.collate import Collate, stack
from merak_like.trainer.data.loader import Loader, Samples
from merak_like.trainer.data.order import Order
from merak_like.trainer.deepspeed import engine_arguments
from merak_like.trainer.evaluation import Metrics, evaluated
from merak_like.trainer.forecast import AT, compared
from merak_like.trainer.journal import METRICS, Journal
from merak_like.trainer.listeners import Rates, listeners
from merak_like.trainer.lookout import Lookout
from merak_like.trainer.rates import warmup_steps
from merak_like.trainer.reading import alike, reading
from merak_like.trainer.settings import COMPUTED_IN, Settings
from merak_like.trainer.speed import meter, most_memory
from merak_like.trainer.state import Control, State, due
from merak_like.trainer.weights import save_weights


class Trainer:
    """Trains a model over ``dp x pp x tp`` ranks with the numbers of one process. Every rank makes the same calls.

        trainer = Trainer(model, Settings(training=Training(steps=1000, batch=64)), train_dataset, eval_dataset)
        trainer.train()
        trainer.save("trained")

    ``train_dataset`` has a length and samples by number. ``collate`` makes a batch of some samples: by default the
    data's own ``collate``, else they are stacked. ``loss_fn``, ``loss_weight`` and ``weights`` are those of
    ``auto_parallel``; ``optimizer`` replaces the one of the settings and is called with this rank's parameters.
    ``callbacks`` are ``TrainerCallback`` objects of transformers. ``compute_metrics`` adds numbers to an evaluation: it
    gets an object with ``predictions`` and ``label_ids``, arrays that are whole on every rank, as from transformers'
    Trainer. Raises ValueError for settings that contradict each other.

    From here to the end of ``train`` SIGTERM and SIGUSR1 do not end the process (in the main thread): when a rank is
    sent one, all save after the same step, and ``train`` returns with ``interrupted``.
    """

    def __init__(
        self, model: nn.Module, args: Settings, train_dataset: Samples, eval_dataset: Samples | None = None, *,
        collate: Collate | None = None, loss_fn: Callable[[Any, Any], Any] | None = None,
        loss_weight: Callable[[Any], int] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        weights: str | Path | None = None, tokenizer: Any = None, callbacks: Sequence[Any] = (),
        compute_metrics: Metrics | None = None,
    ) -> None:  # fmt: skip
        self.args, self.model = args, model
        self.eval_dataset, self._compute_metrics = eval_dataset, compute_metrics
        self._collate = collate or getattr(train_dataset, "collate", stack)
        self._extras = [] if tokenizer is None else [tokenizer]
        self.interrupted = False
        """Whether training ended early because a signal asked for it."""
        training = args.training
        order = Order(len(train_dataset), training.seed, training.shuffle)
        steps = steps_of(training, len(train_dataset))
        warmup_steps(args.schedule, steps)
        check(args, eval_dataset)
        self.state, self.control, self._rates = State(steps), Control(), Rates()
        loader = Loader(train_dataset, self._collate, order, training.batch)
        learns = engine_arguments(args, steps, optimizer)
        self._rate: Rate = learns["rate"]
        self._signals = polite()
        with ExitStack() as undone:  # who gets no trainer cannot close it
            undone.callback(self._signals.close)
            with around(args):
                example = loader.at(0)
                self.engine = assembled(model, args, example, loss_fn, loss_weight, learns, weights)
                self._reading = reading(self.engine, example, self._collate)
            for part in (self.engine.groups, self.engine._reducer, self.engine._watch):
                undone.callback(part.close)
            self.engine.heed(self._signals)
            self._about(callbacks, train_dataset, order, tokenizer, optimizer is None)
            undone.pop_all()

    def _about(self, callbacks: Sequence[Any], samples: Samples, order: Order, tokenizer: Any, made_here: bool) -> None:
        """All that stands around the engine."""
        args = self.args
        groups = self.engine.optimizer.param_groups if self.engine.optimizer else []
        self.base_rates = [group["lr"] for group in groups]
        self._options = [{k: v for k, v in g.items() if k != "params"} for g in groups] if made_here else []
        self._share = share(self.engine, samples, args.training.batch, self._reading)
        self.loader = Loader(samples, self._collate, order, args.training.batch, self._share)
        self.checkpointer = Checkpointer(self.engine, args.folder, args.checkpoints)
        heard = listeners(callbacks, args, self.model, self.engine, self._rates, tokenizer, len(samples))
        self._events = Lookout(heard, args, self.engine)
        told, lead = args.model_dump(mode="json"), self.engine.world.rank == 0
        self.journal = Journal(args.folder, args.logging, told, self.state.steps, lead=lead)
        self._tell("init_end")

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, *, resume: Resume | None = None) -> dict[str, Any]:
        """Train to the end; a summary. Raises FloatingPointError, naming the samples, where a step is not finite.

        ``resume`` is ``checkpoints.resume`` of the settings: True to go on from this run's newest whole checkpoint,
        "auto" to do so where there is one, or the folder of a checkpoint or of another run. Weights, optimizer, random
        numbers, the place in the data, the log and what callbacks remember are then as if nothing had been.
        """
        polite(self._signals)
        try:
            return self._train(resume)
        finally:
            self._signals.close()

    def _train(self, resume: Resume | None) -> dict[str, Any]:
        args, state = self.args, self.state
        if state.step == 0:
            self._begin(args.checkpoints.resume if resume is None else resume)
            state = self.state
        self.meter = meter(self.engine.plan, COMPUTED_IN[args.precision])
        began, first = time.perf_counter(), state.step
        self._tell("train_begin")
        self._tell("epoch_begin")
        if state.owed:
            self.control.evaluate, self.control.save = True, due(args.checkpoints.every, state)
            self._look_and_save()
        stop = state.position + (state.steps - state.step) * args.training.batch
        with closing(self.loader.ahead(state.position, stop)) as batches:  # type: ignore[type-var]
            while state.step < state.steps and not self.control.stop and not self.interrupted:
                asked = time.perf_counter()
                item = next(batches)
                third = state.step - first == AT - 1
                with compared(self.engine, self.journal, state.step + 1) if third else nullcontext():
                    self._step(item, time.perf_counter() - asked)
        best = state.best_step if args.checkpoints.best and not self.interrupted else None
        if best is not None and not self.checkpointer.load(best, state.best_in):
            self.journal.say(f"the best checkpoint, of step {best}, is gone: these are the last weights")
        self.engine.saved()
        self._tell("epoch_end")
        self._tell("train_end")
        self.journal.stop()
        seconds = time.perf_counter() - began
        summary = {"train_steps": state.step - first, "train_seconds": seconds, **most_memory(self.engine)}
        self.journal.write(state.step, summary)
        return summary

    def _begin(self, resume: Resume) -> None:
        """Take up a checkpoint, or begin anew; the journal then goes on behind its step."""
        lead, folder = self.engine.world.rank == 0, self.args.folder
        found = self.checkpointer.resume(resume)
        own = self.checkpointer.own(found)
        if found is not None:
            loop = found.state[LOOP]
            if loop["samples"] != len(self.loader.samples):
                raise ValueError(
                    f"{found.path} was trained on {loop['samples']} samples, now there are {len(self.loader.samples)}: "
                    "with other data its place in the data means nothing; start from its weights instead (model.path)"
                )
            self.state = state = replace(State.from_json(loop["state"]), steps=self.state.steps)
            state.best_in = state.best_in if own else state.best_in or str(found.path.parent.resolve())
            restore_options(self.engine, self._options, ("betas", "momentum", "eps", "weight_decay"))
            self._events.load_state_dict(loop["callbacks"])
            aside = self.checkpointer.go_back(found.step) if own and lead else None
        if not own and lead:
            set_aside(folder, (METRICS, "checkpoints"))
        self.journal.start(self.state.step)
        if found is not None:
            self.journal.say(f"going on from {found.path}" + (f"; what is newer is in {aside}" if aside else ""))
            for wrong in found.damaged:
                self.journal.say(f"not used: {wrong}")
        self.engine.barrier()
        self.checkpointer.begin()

    def _step(self, batch: Any, waited: float) -> None:
        args, state, control = self.args, self.state, self.control
        control.log = control.evaluate = control.save = False
        self._tell("step_begin")
        learning_rate = self._set_rate()
        try:
            with around(args):
                batch, _ = self._reading.complete(self.engine, batch, batch_is_global=self._share.whole)
                result = self.engine.step(batch, **self.loader.about(state.position))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; the batch is {self.loader.told(self.state.position)}") from None
        self._tell("optimizer_step")
        self._count(result, waited)
        control.log = due(args.logging.every, state)
        control.evaluate = self.eval_dataset is not None and due(args.evaluation.every, state)
        control.save = due(args.checkpoints.every, state)
        control.stop = control.stop or state.step == state.steps
        self._tell("step_end")
        self.journal.tick(state.step)
        if control.log and state.losses:
            line = {"loss": state.mean_loss(), **self.meter.read(args.training.batch), "grad_norm": result.grad_norm}
            self.log({**line, "learning_rate": learning_rate})
        self._look_and_save()
        samples = len(self.loader.samples)
        if state.position // samples > (state.position - args.training.batch) // samples and not control.stop:
            self._tell("epoch_end")
            self._tell("epoch_begin")

    def _count(self, result: StepResult, waited: float) -> None:
        state = self.state
        if result.skipped:
            state.skipped += 1
            self.journal.write(state.step + 1, {"skipped": state.skipped})
            self.journal.say(f"step {state.step + 1} left out: loss {result.loss}, gradient norm {result.grad_norm}; "
                             f"the batch is {self.loader.told(self.state.position)}")  # fmt: skip
        else:
            state.items += result.tokens
            state.loss, state.losses = state.loss + result.loss, state.losses + 1
            self.meter.add(result.tokens, waited)
        state.step, state.position = state.step + 1, state.position + self.args.training.batch

    def _set_rate(self) -> float:
        step = self.state.step
        if self.engine.optimizer is not None:
            for group, base in zip(self.engine.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = self._rate(step, base)
        self._rates.last = self._rate(step, self.base_rates[0] if self.base_rates else self.args.optimizer.lr)
        return self._rates.last

    # --- looking and saving --------------------------------------------------------------------------------------

    def evaluate(
        self, dataset: Samples | None = None, *, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:  # fmt: skip
        """The loss on a dataset (by default the one given), per item, and what ``compute_metrics`` adds.

        ``stop`` is asked between batches; where it says so on every rank, nothing is found.
        """
        data = self.eval_dataset if dataset is None else dataset
        if data is None:
            raise ValueError("there is nothing to evaluate on: give Trainer an eval_dataset, or evaluate(dataset)")
        asked = self.args.evaluation
        collate = getattr(data, "collate", self._collate)
        with around(self.args):
            return evaluated(
                self.engine, data, collate, asked.batch or self.args.training.batch, asked.batches,
                self._compute_metrics, stop=stop, reading=alike(self._reading, collate, self._collate),
            )  # fmt: skip

    def _look_and_save(self) -> None:
        """What is due after a step. A run that is told to end saves first of all, and owes its evaluation."""
        state, control, engine = self.state, self.control, self.engine
        with self.meter.paused():
            if control.evaluate:
                state.owed = True
                numbers = {} if engine.stopping else self.evaluate(stop=lambda: engine.stopping)
                state.owed = not numbers
                if numbers:
                    self._judge(numbers)
            self.interrupted = engine.stopping and (state.owed or state.step < state.steps)
            if control.save or self.interrupted:
                self._save_checkpoint()

    def _judge(self, numbers: Mapping[str, float]) -> None:
        asked, state = self.args.evaluation, self.state
        self.log(numbers)
        self._tell("evaluate", metrics=numbers)
        if asked.metric not in numbers:
            raise ValueError(f"evaluation.metric = {asked.metric!r} is none of {sorted(numbers)}")
        value = numbers[asked.metric]
        better = state.best is None or (value > state.best if asked.greater_is_better else value < state.best)
        if better:
            state.best, state.best_step, state.best_in = value, state.step, None
            self.control.save |= self.args.checkpoints.best

    def log(self, numbers: Mapping[str, float]) -> None:
        """Write a line of numbers, and tell the callbacks."""
        line = {"step": self.state.step, "epoch": self.state.position / len(self.loader.samples), **numbers}
        self.state.history.append(line)
        self.journal.write(self.state.step, {k: v for k, v in line.items() if k != "step"})
        self._tell("log", logs=dict(numbers))

    def _save_checkpoint(self) -> None:
        state, checkpoints = self.state, self.args.checkpoints
        self.checkpointer.save(
            {"state": state.to_json(), "samples": len(self.loader.samples), "callbacks": self._events.state_dict()},
            state.best_step if checkpoints.best else None, background=checkpoints.background and not self.interrupted,
        )  # fmt: skip
        self._tell("save")

    def save(self, folder: str | Path) -> None:
        """Write the model as ``from_pretrained`` loads it, and the tokenizer. Every rank calls."""
        save_weights(self.engine, Path(folder), self._extras)

    def close(self) -> None:
        """End the journal, and give back the engine's process groups."""
        self.journal.close()
        self.engine.close()

    def _tell(self, event: str, **more: Any) -> None:
        self._events.fire(event, self.state, self.control, **more)
