"""``HFTrainer``: transformers' own Trainer, its loop, arguments and callbacks, with the engine doing the step.

    trainer = HFTrainer(model, args, train_dataset=..., eval_dataset=..., dp=2, pp=2)

transformers' loop believes to be one process with one large batch: ``per_device_train_batch_size *
gradient_accumulation_steps * dp`` samples, the same on every rank. The engine cuts it into micro-batches. So
``trainer.args`` is a copy that says this: accumulation 1, and the batch sizes of the whole job.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from merak_like.api import auto_parallel
from merak_like.hf.ds_config import Asked
from merak_like.hf.numbered import NUMBERS, numbered
from merak_like.hf.refused import refused
from merak_like.hf.resuming import ENGINE, View, newest, take_up
from merak_like.runtime.batches import enough
from merak_like.runtime.engine import Engine
from merak_like.runtime.names import Names
from merak_like.runtime.predict import predict
from merak_like.runtime.signals import polite
from merak_like.trainer.weights import load_weights

try:
    from accelerate.data_loader import prepare_data_loader
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"transformers' Trainer needs accelerate, but {error}: pip install 'merak-like[hf]'", name=error.name
    ) from None

logger = transformers.utils.logging.get_logger(__name__)


class HFTrainer(transformers.Trainer):
    """A ``transformers.Trainer`` over ``dp x pp x tp`` ranks started by torchrun.

    ``engine`` are further arguments of ``auto_parallel``: ``schedule``, ``micro_batches`` (of a replica in a step;
    default: ``gradient_accumulation_steps``), ``recompute``, ``plan``, ``hardware``, ``loss_fn`` and so on. Raises
    ValueError for arguments of transformers that the engine cannot honour.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *arguments: Any, dp: int = 1, pp: int = 1, tp: int = 1,
        engine: Mapping[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        given = args if args is not None else transformers.TrainingArguments(output_dir="tmp_trainer")
        self._options: dict[str, Any] = {"micro_batches": given.gradient_accumulation_steps, **(engine or {})}
        self._degrees, self._asked = {"dp": dp, "pp": pp, "tp": tp}, Asked(given, self._options)
        self.engine: Engine | None = None
        self._norm = 0.0
        as_one = copy.copy(given)
        as_one.per_device_train_batch_size *= given.gradient_accumulation_steps * dp
        as_one.per_device_eval_batch_size *= dp
        as_one.gradient_accumulation_steps = 1
        for name in ("deepspeed", "deepspeed_plugin", "hf_deepspeed_config"):  # the engine does what they say
            setattr(as_one, name, None)
        wrong = [f"{name}={value!r} ({why})" for name, value, why in refused(given, more, type(self))]
        if wrong:
            raise ValueError(f"HFTrainer cannot honour {'; '.join(wrong)}")
        super().__init__(model, as_one, *arguments, **more)
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                "optimizers=: they would hold the whole model's parameters, and a rank has its stage only; use "
                "optimizer_cls_and_kwargs=, or override create_optimizer and create_scheduler"
            )

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **more: Any) -> Any:
        """As transformers does it. ``resume_from_checkpoint=True`` goes on from the newest checkpoint that is whole.

        When a rank is sent SIGTERM or SIGUSR1, all save after the same step, and training ends.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest(Path(str(self.args.output_dir))))
        self._signals = polite()
        try:
            return super().train(resume_from_checkpoint, *arguments, **more)
        finally:
            self._signals.close()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.engine is None:
            self.engine = self._build(steps=max_steps)
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        self.optimizer = View(self.engine.optimizer, self.args.learning_rate)
        self.create_scheduler(num_training_steps=max_steps)
        self.lr_scheduler = self._asked.scheduler(self.optimizer, self.lr_scheduler)
        self.engine.heed(self._signals)
        if resume_from_checkpoint is not None:
            take_up(self.engine, self.lr_scheduler, Path(resume_from_checkpoint))
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def _build(self, example: Any = None, steps: int = -1) -> Engine:
        model: Any = self.model

        def factory(parameters: Any) -> torch.optim.Optimizer:
            own = {id(p) for p in parameters}
            for parameter in model.parameters():  # what other ranks hold is not ours to optimise
                if id(parameter) not in own:
                    elsewhere.append((parameter, parameter.requires_grad))
                    parameter.requires_grad_(False)
            try:
                self.optimizer = None
                return self.create_optimizer()
            finally:
                for parameter, trained in elsewhere:
                    parameter.requires_grad_(trained)

        elsewhere: list[tuple[nn.Parameter, bool]] = []
        limit = self.args.max_grad_norm
        told: dict[str, Any] = {"max_grad_norm": limit if limit and limit > 0 else None}
        told |= self._asked.settle(self._degrees["dp"], self._degrees["tp"], steps)
        with self._precision():
            return auto_parallel(
                model, **self._degrees, example=self._first() if example is None else example,
                optimizer=self._asked.optimizer(factory), seed=self.args.seed,
                device=self.args.device if self.args.device.type == "cpu" else None, **(self._options | told),
            )  # fmt: skip

    def _first(self) -> Any:
        """A batch of the first samples, without a random number drawn."""
        data: Any = self.train_dataset
        size = self.args.per_device_train_batch_size
        with torch.random.fork_rng():
            items = iter(data) if isinstance(data, IterableDataset) else (data[i] for i in range(len(data)))
            collate = self._get_collator_with_removed_columns(self.data_collator)
            return _plain(collate([item for item, _ in zip(items, range(size), strict=False)]))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One step of the engine: every micro-batch forward and backward, clipped, and the weights updated."""
        assert self.engine is not None
        batch, _ = enough(_plain(inputs), self._parts)
        samples = batch.pop(NUMBERS, None)
        with self._precision():
            result = self.engine.step(batch, samples=samples)
        self._norm = result.grad_norm
        if result.skipped and self.args.should_log:  # transformers leaves what is nan out of its mean without a word
            logger.warning(
                f"step {self.state.global_step + 1} left out: loss {result.loss}, gradient norm {result.grad_norm}"
            )
        if self.engine.stopping:
            self.control.should_save = self.control.should_training_stop = True
        return torch.tensor(result.loss, device=self.args.device)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self._norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self._norm

    def _precision(self) -> AbstractContextManager[Any]:
        """transformers leaves autocast to accelerate, which would wrap the model's forward."""
        asked = self.args.bf16 and not self._asked.config
        return torch.autocast(self.args.device.type, torch.bfloat16) if asked else nullcontext()

    @property
    def _parts(self) -> int:
        """Micro-batches of a step over all replicas."""
        assert self.engine is not None
        return self.engine.plan.mesh.dp * self.engine.plan.micro_batches

    # --- as one process ------------------------------------------------------------------------------------------

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of a step over all replicas."""
        return self._train_batch_size

    def _get_dataloader(self, *arguments: Any, **more: Any) -> Any:
        remembers = Names(self._options.get("codec")).needed
        with self._as_one_process(), numbered(self, more, remembers) as asked:
            return super()._get_dataloader(*arguments, **asked)

    @contextmanager
    def _as_one_process(self) -> Iterator[None]:
        """accelerate prepares data for one process, the same batch on every rank, and leaves the model alone."""
        accelerator: Any = self.accelerator
        config = accelerator.dataloader_config

        def prepare(loader: Any) -> Any:
            return prepare_data_loader(
                loader, num_processes=1, process_index=0, even_batches=False, put_on_device=False,
                use_seedable_sampler=config.use_seedable_sampler, data_seed=config.data_seed,
            )  # fmt: skip

        accelerator.prepare, accelerator.prepare_model = prepare, lambda model, **_: model
        try:
            yield
        finally:
            del accelerator.prepare, accelerator.prepare_model

    @property
    def gather_function(self) -> Any:
        """What brings together an evaluation's tensors, which are whole on every rank already."""

        def gather(tensors: Any) -> Any:
            state = self.accelerator.gradient_state
            last = state.remainder if state.end_of_dataloader else 0
            return _first_rows(tensors, last) if last > 0 else tensors

        return gather

    @gather_function.setter
    def gather_function(self, function: Any) -> None: ...

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None: ...

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *arguments: Any, **more: Any) -> Any:
        """As transformers does it, with the engine's forward."""
        if self.engine is None:  # evaluate() before train()
            self.engine = self._build(_plain(next(iter(dataloader))))
        modes = {module: module.training for module in self.engine.model.modules()}
        try:
            with self._as_one_process():
                return super().evaluation_loop(dataloader, *arguments, **more)
        finally:
            for module, training in modes.items():
                module.training = training

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss, logits and labels of a batch, on every rank."""
        assert self.engine is not None
        batch = _plain(inputs)
        if not self.label_names or any(batch.get(name) is None for name in self.label_names):
            raise ValueError(f"HFTrainer evaluates on samples with labels, but these have only {sorted(batch)}")
        full, times = enough(batch, self._parts)
        with self._precision():
            if prediction_loss_only:
                return torch.tensor(self.engine.evaluate(full).loss), None, None
            result, outputs = predict(self.engine, full)
        config = getattr(self.model, "config", None)
        ignored = ignore_keys or getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        rows = len(next(iter(outputs.values()))) // times if outputs else 0
        kept = tuple(t[:rows] for name, t in outputs.items() if name.partition(".")[0] not in ignored)
        labels = tuple(batch[name] for name in self.label_names)
        return torch.tensor(result.loss), _alone(kept), _alone(labels)

    # --- saving --------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model as ``from_pretrained`` loads it. Every rank calls; rank 0 writes."""
        if self.engine is None:
            return super().save_model(output_dir, _internal_call)
        state = self.engine.full_state_dict()
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)
        self.engine.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """All that the engine needs to go on exactly, in any layout."""
        assert self.engine is not None
        self.engine.save(Path(output_dir) / ENGINE, state={"schedule": self.lr_scheduler})

    def _save_scaler(self, output_dir: str) -> None: ...

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Not yet: there may be no engine. ``take_up`` comes when there is one."""

    def _load_best_model(self) -> None:
        assert self.engine is not None
        load_weights(self.engine, Path(str(self.state.best_model_checkpoint)))


def _plain(inputs: Any) -> dict[str, Any]:
    """A batch as a dict, without what is None: what the model is called with."""
    return {name: value for name, value in dict(inputs).items() if value is not None}


def _first_rows(item: Any, count: int) -> Any:
    if isinstance(item, Tensor):
        return item[:count]
    return type(item)(_first_rows(one, count) for one in item) if isinstance(item, (tuple, list)) else item


def _alone(items: tuple[Any, ...]) -> Any:
    return items[0] if len(items) == 1 else items or None
