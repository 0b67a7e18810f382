"""From a run's file to a trained model in its folder."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like import __version__
from merak_like.habits import habits
from merak_like.partitioner.plan import Plan
from merak_like.runtime.batches import rows
from merak_like.runtime.batches import split as cut
from merak_like.runtime.checkpoint.alone import weights_alone
from merak_like.runtime.initialize import rank
from merak_like.runtime.precision import precision_of
from merak_like.trainer.assembly import planned as of_settings
from merak_like.trainer.assembly import steps_of
from merak_like.trainer.config import Run, load, to_yaml
from merak_like.trainer.data.build import Datasets, datasets, rows_of, split
from merak_like.trainer.data.collate import Collate, stack
from merak_like.trainer.evaluation import accuracy
from merak_like.trainer.loop import Trainer
from merak_like.trainer.report import REPORT, page

SYNTHETIC = 1024
"""Samples of ``data.train: synthetic``."""
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "accelerate", "peft", "datasets", "deepspeed", "pydantic",
            "torchao", "bitsandbytes", "liger-kernel")  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A run's model and data, before any rank talks to another."""

    model: nn.Module
    data: Datasets
    weights: Path | None = None
    loss_fn: Callable[[Any, Any], Any] | None = None
    tokenizer: Any = None

    @property
    def collate(self) -> Collate:
        """How samples become a batch."""
        return self.data.collate or getattr(self.data.train, "collate", stack)

    def example(self, batch: int) -> Any:
        """A batch of the first samples."""
        train = self.data.train
        return self.collate([train[i % len(train)] for i in range(batch)])


def prepare(run: Run) -> Prepared:
    """Build the model and read the data. Raises ValueError for what is not there or does not fit together."""
    texts: list[Any] = []

    def tokenizer() -> Any:
        if not texts:
            from merak_like.hf import text

            folder = run.data.tokenizer or run.model.path
            if folder is None:
                raise ValueError("texts need a tokenizer: say data.tokenizer, a folder, or model.path with one in it")
            texts.append(text.tokenizer(folder))
        return texts[0]

    data = _data(run, tokenizer)
    if run.model.function:
        from merak_like.cli.models import source

        made = source(run.model.function, seq=None, task=None, dtype=None).load(run.training.batch)
        prepared = Prepared(made.model, data or Datasets(_samples(made.example)), loss_fn=made.loss_fn)
    else:
        prepared = _hugging_face(run, data, tokenizer)
    if run.lora is not None:
        from merak_like.hf import lora

        prepared = replace(prepared, model=lora.wrap(prepared.model, run.lora, seed=run.training.seed), weights=None)
    return replace(prepared, tokenizer=texts[0] if texts else None)


def _data(run: Run, tokenizer: Callable[[], Any]) -> Datasets | None:
    asked, seed = run.data, run.training.seed
    if asked.function:
        made = _called(asked.function)
        sides = made if isinstance(made, tuple) else (made,)
        if len(sides) == 1 and asked.eval_share:
            sides = split(sides[0], asked.eval_share, seed)
        return Datasets(*sides)
    if asked.train == "synthetic":
        return None
    return datasets(
        asked, tokenizer, seed=seed, cache=run.folder / "data", lead=rank() == 0, timeout=run.parallelism.timeout
    )


def _hugging_face(run: Run, data: Datasets | None, tokenizer: Callable[[], Any]) -> Prepared:
    from merak_like import hf
    from merak_like.hf import pretrained

    asked = run.model
    changes = dict(asked.config)
    if data is not None and data.classes:
        names = dict(enumerate(data.classes))
        changes = {"num_labels": len(names), "id2label": names, "label2id": {n: i for i, n in names.items()}} | changes
    task = asked.task or ("sequence-classification" if data is not None and data.classes else None)
    whole = run.lora is not None  # additions are made on the CPU, beside weights that are there
    loaded = pretrained.load(
        asked.path,
        changes,
        task=task,
        dtype=asked.dtype,
        pretrained=asked.pretrained,
        seed=run.training.seed,
        whole=whole,
    )
    if data is None:
        made = rows_of(hf.example_for(loaded.model, SYNTHETIC, None if _sees_images(loaded.model) else run.data.seq))
        data = Datasets(*split(made, run.data.eval_share, run.training.seed)) if run.data.eval_share else Datasets(made)
    most = getattr(loaded.model.config, "max_position_embeddings", None)
    if isinstance(most, int) and run.data.seq > most > 0:
        raise ValueError(f"data.seq = {run.data.seq} tokens, but {type(loaded.model).__name__} has {most} positions")
    return Prepared(loaded.model, data, loaded.weights)


def _sees_images(model: Any) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "pixel_values"


def _samples(example: Any) -> list[Any]:
    """The rows of an example, as if they were data."""
    return [_row(part) for part in cut(example, rows(example))]


def _row(part: Any) -> Any:
    """A part of one row without its batch dimension."""
    if isinstance(part, Tensor):
        return part[0] if part.dim() else part
    if isinstance(part, dict):
        return {key: _row(value) for key, value in part.items()}
    return tuple(_row(value) for value in part) if isinstance(part, (tuple, list)) else part


def _called(spec: str) -> Any:
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(import_module(module.removesuffix(".py").replace("/", ".")), name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data.function = {spec!r}: {error}") from error
    finally:
        sys.path.pop(0)


def planned(run: Run, prepared: Prepared) -> Plan:
    """The plan of a run, without its ranks and without a weight moved."""
    steps = steps_of(run.training, len(prepared.data.train))
    return of_settings(prepared.model, run, prepared.example(run.training.batch), prepared.loss_fn, steps)


def start(run: Run) -> tuple[dict[str, Any], bool]:
    """Train as the run says; its folder then has plan, metrics, checkpoints, a page and the model in ``model/``.

    Whether it came to the end: a run that a signal interrupts has its checkpoint, but no model yet.
    """
    prepared = prepare(run)
    trainer = Trainer(
        prepared.model, run, prepared.data.train, prepared.data.eval, collate=prepared.collate,
        loss_fn=prepared.loss_fn, weights=prepared.weights, tokenizer=prepared.tokenizer,
        compute_metrics=accuracy if prepared.data.classes else None,
    )  # fmt: skip
    if rank() == 0:
        record(run, trainer.engine.plan)
    summary = trainer.train()
    if not trainer.interrupted:
        trainer.save(run.folder / "model")
    trainer.close()
    if rank() == 0:
        (run.folder / REPORT).write_text(page(run.folder), encoding="utf-8")
    return summary, not trainer.interrupted


def weights_of(checkpoint: Path, output: Path) -> None:
    """Write what a checkpoint of a run has of weights, as the run itself does at its end.

    This process does it for itself, whatever ranks there are, and needs the memory of one copy of the weights.
    """
    run = load(checkpoint.parent.parent / "config.resolved.yaml", [])
    prepared = prepare(run)
    compute = precision_of(run.lowered).compute
    save = habits(prepared.model)[2]
    save(prepared.model, output, weights_alone(checkpoint, prepared.model, compute))
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(output)


def record(run: Run, plan: Plan) -> None:
    """Write what a run was: the resolved file, the plan, the environment."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.resolved.yaml").write_text(to_yaml(run), encoding="utf-8")
    plan.save(run.folder / "plan.json")
    (run.folder / "env.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")


def environment() -> dict[str, Any]:
    """The machine and the versions, as plain data."""
    return {
        "merak_like": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "command": sys.argv,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
    }


def installed(package: str) -> str | None:
    """The version of a package; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
