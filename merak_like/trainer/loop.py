"""``Trainer``: the loop. For each step a batch, a learning rate, ``engine.step``; now and then a look and a save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from merak_like.api import auto_parallel
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.text import parse_bytes
from merak_like.runtime.engine import Engine
from merak_like.trainer.checkpoints import Checkpointer, Weights, forget, set_aside
from merak_like.trainer.data.collate import Collate, stack
from merak_like.trainer.data.loader import Loader, Samples, Share
from merak_like.trainer.data.order import Order
from merak_like.trainer.evaluation import Metrics, evaluated
from merak_like.trainer.groups import optimizer_factory
from merak_like.trainer.journal import METRICS, Journal
from merak_like.trainer.methods import methods_of
from merak_like.trainer.rates import rate, warmup_steps
from merak_like.trainer.settings import Settings
from merak_like.trainer.speed import meter, peak_bytes
from merak_like.trainer.state import Control, State, due


class Events(Protocol):
    """Somebody who is told what happens, and may change what is due."""

    def fire(self, event: str, state: State, control: Control, **more: Any) -> None:
        """``event`` is a name of transformers' callbacks without its ``on_``."""
        ...


class Rates:
    """The learning rate that was set last, under the name that callbacks know from torch's schedulers."""

    def __init__(self) -> None:
        self.last = 0.0

    def get_last_lr(self) -> list[float]:
        """The rate."""
        return [self.last]


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
    """

    def __init__(
        self, model: nn.Module, args: Settings, train_dataset: Samples, eval_dataset: Samples | None = None, *,
        collate: Collate | None = None, loss_fn: Callable[[Any, Any], Any] | None = None,
        loss_weight: Callable[[Any], int] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        weights: str | Path | None = None, tokenizer: Any = None, callbacks: Sequence[Any] = (),
        compute_metrics: Metrics | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> None:  # fmt: skip
        self.args, self.model = args, model
        self.eval_dataset, self._compute_metrics = eval_dataset, compute_metrics
        self._collate = collate or getattr(train_dataset, "collate", stack)
        self.checkpointer = checkpointer or Weights([] if tokenizer is None else [tokenizer])
        training = args.training
        order = Order(len(train_dataset), training.seed, training.shuffle)
        steps = training.steps or math.ceil((training.epochs or 0) * len(train_dataset) / training.batch)
        warmup_steps(args.schedule, steps)
        _check(args, eval_dataset)
        self.state, self.control, self._rates = State(steps), Control(), Rates()
        loader = Loader(train_dataset, self._collate, order, training.batch)
        with self._precision():
            self.engine = _engine(model, args, loader.at(0), loss_fn, loss_weight, optimizer, weights)
        self._own_optimizer = optimizer is not None
        self.base_rates = [group["lr"] for group in self.engine.optimizer.param_groups] if self.engine.optimizer else []
        self._share = _share(self.engine, train_dataset, training.batch)
        self.loader = Loader(train_dataset, self._collate, order, training.batch, self._share)
        lead = self.engine.world.rank == 0
        if lead:
            set_aside(args.folder, (METRICS, "checkpoints"))
        self.journal = Journal(args.folder, args.logging, args.model_dump(mode="json"), steps, lead=lead)
        self._events = self._listeners(callbacks, tokenizer, len(train_dataset))
        self._tell("init_end")

    # --- training ------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Train to the end; a summary. Raises FloatingPointError, naming the samples, where a step is not finite."""
        args, state, batch = self.args, self.state, self.args.training.batch
        self.meter = meter(self.engine.plan, "bfloat16" if args.precision == "bf16" else "float32")
        began, first = time.perf_counter(), state.step
        self._tell("train_begin")
        self._tell("epoch_begin")
        self.journal.start(state.step)
        stop = state.position + (state.steps - state.step) * batch
        with closing(self.loader.ahead(state.position, stop)) as batches:  # type: ignore[type-var]
            while state.step < state.steps and not self.control.stop:
                asked = time.perf_counter()
                item = next(batches)
                self._step(item, time.perf_counter() - asked)
        if args.checkpoints.best and state.best_step is not None:
            self.checkpointer.load(self.checkpoint(state.best_step), self.engine)
        self._tell("epoch_end")
        self._tell("train_end")
        self.journal.stop()
        seconds = time.perf_counter() - began
        summary = {"train_steps": state.step - first, "train_seconds": seconds, **self._most_memory()}
        self.journal.write(state.step, summary)
        return summary

    def _step(self, batch: Any, waited: float) -> None:
        args, state, control = self.args, self.state, self.control
        control.log = control.evaluate = control.save = False
        self._tell("step_begin")
        learning_rate = self._set_rate()
        try:
            with self._precision():
                result = self.engine.step(batch, batch_is_global=self._share.of == 1)
        except FloatingPointError as error:
            self._skip(error)
            result = None
        self._tell("optimizer_step")
        state.step, state.position = state.step + 1, state.position + args.training.batch
        if result is not None:
            state.items += result.tokens
            self.meter.add(result.loss, result.tokens, waited)
        control.log = due(args.logging.every, state)
        control.evaluate = self.eval_dataset is not None and due(args.evaluation.every, state)
        control.save = due(args.checkpoints.every, state)
        control.stop = control.stop or state.step == state.steps
        self._tell("step_end")
        self.journal.tick(state.step)
        if control.log and self.meter.steps:
            line = self.meter.read(args.training.batch)
            norm = {} if result is None else {"grad_norm": result.grad_norm}
            self.log({**line, **norm, "learning_rate": learning_rate})
        if control.evaluate:
            self._look()
        if control.save:
            self._save_checkpoint()
        samples = len(self.loader.samples)
        if state.position // samples > (state.position - args.training.batch) // samples and not control.stop:
            self._tell("epoch_end")
            self._tell("epoch_begin")

    def _set_rate(self) -> float:
        factor = rate(self.args.schedule, self.state.step, self.state.steps)
        if self.engine.optimizer is not None:
            for group, base in zip(self.engine.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = base * factor
        self._rates.last = (self.base_rates[0] if self.base_rates else self.args.optimizer.lr) * factor
        return self._rates.last

    def _skip(self, error: FloatingPointError) -> None:
        """Go on, if so many may be left out; else the error again, with the samples it comes from."""
        samples = self.loader.indices(self.state.position)
        self.state.skipped += 1
        told = f"{error}; the batch is samples {samples[:16]}{' ...' if len(samples) > 16 else ''}"
        self.journal.write(self.state.step, {"skipped": self.state.skipped})
        if self.state.skipped > self.args.training.skip_bad_steps:
            raise FloatingPointError(f"{told}; training.skip_bad_steps = {self.args.training.skip_bad_steps}")
        self.journal.say(f"left out: {told}")

    # --- looking and saving --------------------------------------------------------------------------------------

    def evaluate(self, dataset: Samples | None = None) -> dict[str, float]:
        """The loss on a dataset (by default the one given), per item, and what ``compute_metrics`` adds."""
        data = self.eval_dataset if dataset is None else dataset
        if data is None:
            raise ValueError("there is nothing to evaluate on: give Trainer an eval_dataset, or evaluate(dataset)")
        asked = self.args.evaluation
        collate = getattr(data, "collate", self._collate)
        with self._precision():
            return evaluated(
                self.engine, data, collate, asked.batch or self.args.training.batch, asked.batches,
                self._compute_metrics,
            )  # fmt: skip

    def _look(self) -> None:
        numbers, asked, state = self.evaluate(), self.args.evaluation, self.state
        self.log(numbers)
        self._tell("evaluate", metrics=numbers)
        if asked.metric not in numbers:
            raise ValueError(f"evaluation.metric = {asked.metric!r} is none of {sorted(numbers)}")
        value = numbers[asked.metric]
        better = state.best is None or (value > state.best if asked.greater_is_better else value < state.best)
        if better:
            state.best, state.best_step = value, state.step
            self.control.save |= self.args.checkpoints.best
        self.meter.restart()

    def log(self, numbers: Mapping[str, float]) -> None:
        """Write a line of numbers, and tell the callbacks."""
        line = {"step": self.state.step, "epoch": self.state.position / len(self.loader.samples), **numbers}
        self.state.history.append(line)
        self.journal.write(self.state.step, {k: v for k, v in line.items() if k != "step"})
        self._tell("log", logs=dict(numbers))

    def _save_checkpoint(self) -> None:
        state, folder = self.state, self.args.folder / "checkpoints"
        self.checkpointer.save(self.checkpoint(state.step), self.engine, state.to_json())
        if self.engine.world.rank == 0:
            forget(folder, self.args.checkpoints.keep, state.best_step if self.args.checkpoints.best else None)
        self._tell("save")
        self.meter.restart()

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.args.folder / "checkpoints" / f"step-{step}"

    def save(self, folder: str | Path) -> None:
        """Write the model as ``from_pretrained`` loads it. Every rank calls."""
        self.engine.save_pretrained(folder)

    def close(self) -> None:
        """End the journal, and give back the engine's process groups."""
        self.journal.close()
        self.engine.close()

    # --- helpers -------------------------------------------------------------------------------------------------

    def _precision(self) -> AbstractContextManager[Any]:
        if self.args.precision == "fp32":
            return nullcontext()
        kind = torch.device(self.args.parallelism.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
        return torch.autocast(kind, torch.bfloat16)

    def _listeners(self, callbacks: Sequence[Any], tokenizer: Any, samples: int) -> Events | None:
        if not callbacks:
            return None
        from merak_like.hf.callbacks import Callbacks

        return Callbacks(
            callbacks, self.args, self.model, optimizer=self.engine.optimizer, rates=self._rates, tokenizer=tokenizer,
            lead=self.engine.world.rank == 0, samples=samples,
        )  # fmt: skip

    def _tell(self, event: str, **more: Any) -> None:
        if self._events is not None:
            self._events.fire(event, self.state, self.control, **more)

    def _most_memory(self) -> dict[str, float]:
        """The peak memory of the fullest rank, and which it is."""
        mine = peak_bytes(self.engine.world.device)
        everyone: list[Any] = [mine]
        if not self.engine.world.alone:
            everyone = [None] * self.engine.world.size
            self.engine.barrier()
            dist.all_gather_object(everyone, mine)
        return {"peak_memory_bytes": max(everyone), "fullest_rank": everyone.index(max(everyone))}


def _check(args: Settings, eval_dataset: Samples | None) -> None:
    if eval_dataset is None and (args.evaluation.every or args.checkpoints.best):
        asked = "evaluation.every" if args.evaluation.every else "checkpoints.best"
        raise ValueError(f"{asked} is set, but there is no eval_dataset to look at")


def _engine(
    model: nn.Module, args: Settings, example: Any, loss_fn: Any, loss_weight: Any, optimizer: Any, weights: Any
) -> Engine:
    asked = args.parallelism
    limit = parse_bytes(asked.memory_limit) if isinstance(asked.memory_limit, str) else asked.memory_limit
    return auto_parallel(
        model, asked.dp, asked.pp, asked.tp, example=example, loss_fn=loss_fn, loss_weight=loss_weight,
        optimizer=optimizer or optimizer_factory(model, args.optimizer), schedule=asked.schedule, chunks=asked.chunks,
        recompute=asked.recompute, micro_batches=asked.micro_batches, max_grad_norm=args.optimizer.max_grad_norm,
        weights=weights, plan=Plan.load(asked.plan) if asked.plan else None, hardware=asked.hardware,
        memory_limit=limit, device=asked.device, timeout=asked.timeout, seed=args.training.seed,
        methods=methods_of(args.methods),
    )  # fmt: skip


def _share(engine: Engine, samples: Samples, batch: int) -> Share:
    """A replica reads only its own samples where that cannot change a shape, and so a number."""
    mesh = engine.plan.mesh
    own = mesh.dp > 1 and getattr(samples, "uniform", False) and batch % (mesh.dp * engine.plan.micro_batches) == 0
    return Share(engine.groups.coord.dp, mesh.dp) if own else Share()
