"""transformers' ``TrainerCallback`` objects, called by our loop as transformers' own Trainer would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
from transformers.trainer_utils import IntervalStrategy

from merak_like.trainer.settings import Settings
from merak_like.trainer.state import Control, State


class _OwnFlow(DefaultFlowCallback):
    """What is due is decided by our loop; the handler asks for a callback of this type."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...


class Callbacks:
    """Tells callbacks what happens and brings back what they ask for."""

    def __init__(
        self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], settings: Settings, model: Any, *,
        optimizer: Any, rates: Any, tokenizer: Any, lead: bool, samples: int,
    ) -> None:  # fmt: skip
        for one in callbacks:
            if not issubclass(one if isinstance(one, type) else type(one), TrainerCallback):
                raise ValueError(f"callbacks= takes TrainerCallback objects of transformers, found {one!r}")
        self._args: Any = arguments(settings)
        self._batch, self._samples, self._folder = settings.training.batch, samples, settings.folder
        self._control = TrainerControl()
        self._state = TrainerState(is_world_process_zero=lead, is_local_process_zero=lead)
        self._handler = CallbackHandler([_OwnFlow(), *callbacks], model, tokenizer, optimizer, rates)

    def fire(self, event: str, state: State, control: Control, **more: Any) -> None:
        """Call ``on_<event>`` of every callback; what they ask for ends up in ``control``."""
        self._show(state)
        theirs = self._control
        theirs.should_log, theirs.should_evaluate = control.log, control.evaluate
        theirs.should_save, theirs.should_training_stop = control.save, control.stop
        # Not the handler's own on_*: these also set flags, which are ours to set.
        theirs = self._control = self._handler.call_event(f"on_{event}", self._args, self._state, theirs, **more)
        if theirs.should_epoch_stop:
            raise ValueError(
                "a callback asked to stop the epoch (should_epoch_stop), but batches here run from one epoch into the "
                "next: ask to stop the training (should_training_stop), or use HFTrainer"
            )
        control.log, control.evaluate = theirs.should_log, theirs.should_evaluate
        control.save, control.stop = theirs.should_save, theirs.should_training_stop

    def state_dict(self) -> dict[str, Any]:
        """What callbacks that know how to be exported remember, by class, in order."""
        found: dict[str, Any] = {}
        for one in self._stateful():
            found.setdefault(type(one).__name__, []).append(dict(one.state()["attributes"]))
        return found

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Let each remember what one of its class did; one that is new begins anew."""
        left = {name: list(states) for name, states in saved.items()}
        for one in self._stateful():
            if left.get(type(one).__name__):
                vars(one).update(left[type(one).__name__].pop(0))

    def _stateful(self) -> list[Any]:
        return [one for one in self._handler.callbacks if isinstance(one, ExportableState)]

    def _show(self, state: State) -> None:
        theirs = self._state
        theirs.global_step, theirs.max_steps = state.step, state.steps
        theirs.epoch = state.step * self._batch / self._samples
        theirs.num_train_epochs = -(-state.steps * self._batch // self._samples)
        theirs.train_batch_size, theirs.num_input_tokens_seen = self._batch, state.items
        theirs.log_history = state.history
        theirs.best_metric, theirs.best_global_step = state.best, state.best_step
        best = None if state.best_step is None else self._folder / "checkpoints" / f"step-{state.best_step:08d}"
        theirs.best_model_checkpoint = None if best is None else str(best)


def arguments(settings: Settings) -> SimpleNamespace:
    """The settings under the names that callbacks know from ``TrainingArguments``."""
    often = IntervalStrategy.STEPS
    no = IntervalStrategy.NO
    evaluation, checkpoints, training = settings.evaluation, settings.checkpoints, settings.training
    return SimpleNamespace(
        output_dir=str(Path(settings.folder)),
        run_name=settings.folder.name,
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 0,
        per_device_train_batch_size=training.batch,
        train_batch_size=training.batch,
        per_device_eval_batch_size=evaluation.batch or training.batch,
        eval_batch_size=evaluation.batch or training.batch,
        gradient_accumulation_steps=1,
        learning_rate=settings.optimizer.lr,
        weight_decay=settings.optimizer.weight_decay,
        max_grad_norm=settings.optimizer.max_grad_norm,
        seed=training.seed,
        logging_strategy=often,
        logging_steps=settings.logging.every,
        logging_first_step=False,
        eval_strategy=often if evaluation.every else no,
        eval_steps=evaluation.every,
        eval_delay=0,
        save_strategy=often if checkpoints.every or checkpoints.best else no,
        save_steps=checkpoints.every or evaluation.every or 0,
        save_total_limit=checkpoints.keep,
        load_best_model_at_end=checkpoints.best,
        metric_for_best_model=evaluation.metric,
        greater_is_better=evaluation.greater_is_better,
        bf16=settings.precision in ("bf16", "autocast"),
        fp16=settings.precision == "fp16",
        disable_tqdm=not settings.logging.console,
    )
