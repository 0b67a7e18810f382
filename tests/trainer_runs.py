"""Fifty steps of a small model, by plain transformers in one process, by ``HFTrainer`` and by ``Trainer``.

All three have a warm-up, a cosine, weight-decay groups, clipping, eight samples a step, evaluations and a best model.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from merak_like.trainer.loop import Trainer
from merak_like.trainer.settings import (
    Checkpoints,
    Evaluation,
    Logging,
    Optimizer,
    Parallelism,
    Schedule,
    Settings,
    Training,
)
from tests import training

STEPS, BATCH, EVERY = 50, 8, 10
SAMPLES = 60
"""Not a multiple of the batch: the last step of an epoch of transformers' loop has four samples."""
WHOLE = 56
"""A multiple: our own loop has whole batches only."""


def build(kind: str) -> nn.Module:
    """A model, the same weights in every process."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=32, **small))
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    config = BertConfig(vocab_size=100, max_position_embeddings=32, **small, **no_dropout)
    return BertForSequenceClassification(config)


def data(kind: str, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Counting from a number on; the class is the first number's."""
    first = torch.randint(0, 100, (count, 1), generator=torch.Generator().manual_seed(seed))
    return [
        {"input_ids": row, "labels": row if kind == "llama" else row[0] % 3} for row in (torch.arange(12) + first) % 100
    ]


def accuracy(predictions: Any) -> dict[str, float]:
    """What a user's compute_metrics does."""
    return {"accuracy": float((np.argmax(predictions.predictions, -1) == predictions.label_ids).mean())}


class Ran(NamedTuple):
    """What a run came to, as JSON can hold it."""

    loss: list[float]
    norm: list[float]
    rate: list[float]
    eval_loss: list[float]
    metric: list[float]
    best_step: int
    weights: dict[str, list[float]]


def arguments(folder: str, size: int, accumulation: int, eval_size: int = BATCH, **more: Any) -> TrainingArguments:
    """transformers' own way to say all this."""
    return TrainingArguments(
        folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=STEPS,
        learning_rate=1e-3, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=5, max_grad_norm=1.0,
        logging_steps=1, eval_strategy="steps", eval_steps=EVERY, save_strategy="steps", save_steps=EVERY,
        per_device_eval_batch_size=eval_size, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        use_cpu=True, report_to=[], disable_tqdm=True, **more,
    )  # fmt: skip


KEYS = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")


def by_transformers(kind: str, size: int, accumulation: int, samples: int = SAMPLES, **more: Any) -> Ran:
    """Plain, in this process."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = transformers.Trainer(
            build(kind), arguments(folder, size, accumulation, **more), train_dataset=data(kind, samples, 1),
            eval_dataset=data(kind, 20, 2), compute_metrics=accuracy,
        )  # fmt: skip
        trainer.train()
    trained: Any = trainer.model
    return _ran(trainer.state, trained.state_dict())


def by_hf_trainer(kind: str, dp: int, pp: int, folder: str, tp: int = 1, **more: Any) -> Ran | None:
    """The same script with another class and the degrees."""
    from merak_like.hf.trainer import HFTrainer

    trainer = HFTrainer(
        build(kind), arguments(f"{folder}/hf-{kind}-{dp}x{pp}x{tp}", BATCH // 2 // dp, 2, BATCH // dp, **more),
        train_dataset=data(kind, SAMPLES, 1), eval_dataset=data(kind, 20, 2),
        compute_metrics=accuracy, dp=dp, pp=pp, tp=tp, engine={"hardware": "a100-80gb"},
    )  # fmt: skip
    trainer.train()
    assert trainer.engine is not None
    weights = trainer.engine.full_state_dict()
    trainer.engine.close()
    return _ran(trainer.state, weights) if weights else None


def back_to_the_best(dp: int, pp: int, folder: str, zero: int, bf16: bool = False) -> bool:
    """The best is the first look, so the last weights must go: here, and in what the optimizer would update next."""
    from safetensors.torch import load_file

    from merak_like.hf.trainer import HFTrainer

    told = arguments(f"{folder}/best-{zero}-{bf16}-{dp}x{pp}", BATCH // 2 // dp, 2, BATCH // dp, greater_is_better=True)
    told.max_steps, told.eval_steps, told.save_steps = 4, 2, 2
    trainer = HFTrainer(
        build("llama"), told, train_dataset=data("llama", SAMPLES, 1), eval_dataset=data("llama", 8, 2), dp=dp, pp=pp,
        engine={"hardware": "a100-80gb", "zero": zero, "precision": "bf16" if bf16 else None},
    )  # fmt: skip
    trainer.train()
    engine = trainer.engine
    assert engine is not None
    assert trainer.state.best_global_step == 2
    kept = load_file(f"{told.output_dir}/checkpoint-2/model.safetensors")
    again = trainer.evaluate()["eval_loss"]
    assert abs(again - trainer.state.log_history[2]["eval_loss"]) < 1e-6, "computed with these weights"
    engine._update.publish()  # what the optimizer has, into the model
    weights = engine.full_state_dict()
    engine.close()
    return all(torch.equal(weights[name], tensor.to(weights[name].dtype)) for name, tensor in kept.items() if weights)


class Counting(TrainerCallback):
    """A user's callback: counts, and asks for one more look."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.seen[name] = self.seen.get(name, 0) + 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("steps")
        if state.global_step == 3:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["metrics"]["eval_loss"] > 0
        self._count("looks")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("saves")


def settings(folder: Path, dp: int = 1, pp: int = 1, tp: int = 1, **more: Any) -> Settings:
    """Our own way to say it."""
    return Settings(
        training=Training(steps=STEPS, batch=BATCH, shuffle=False),
        parallelism=Parallelism(dp=dp, pp=pp, tp=tp, hardware="a100-80gb", micro_batches=4 // dp, device="cpu"),
        optimizer=Optimizer(lr=1e-3, weight_decay=0.1), schedule=Schedule(name="cosine", warmup=5),
        evaluation=Evaluation(every=EVERY, batch=BATCH), checkpoints=Checkpoints(every=EVERY, best=True),
        logging=Logging(every=1, console=False), folder=folder, **more,
    )  # fmt: skip


def by_trainer(kind: str, dp: int, pp: int, folder: str, tp: int = 1) -> Ran | None:
    """With our own loop."""
    where = Path(folder) / f"own-{kind}-{dp}x{pp}x{tp}"
    trainer = Trainer(
        build(kind), settings(where, dp, pp, tp), data(kind, WHOLE, 1), data(kind, 20, 2),
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    weights = trainer.engine.full_state_dict()
    trainer.close()
    if not weights:
        return None
    lines = trainer.state.history
    return _as_ran(lines, trainer.state.best_step, weights)


PROMPTS = [[3, 4, 5], [50, 51, 52, 53, 54], [7]]


def speaks(dp: int, pp: int, tp: int = 1, folder: str = "") -> list[Any]:
    """What a model says, likeliest and by chance, and its logits for a batch that does not divide evenly."""
    from merak_like import auto_parallel
    from merak_like.runtime.predict import predict

    rows = torch.stack([row["input_ids"] for row in data("llama", 7, 3)])
    batch = {"input_ids": rows, "labels": rows}
    engine = auto_parallel(
        build("llama").double(), dp, pp, tp, example=batch, micro_batches=2, hardware="a100-80gb", device="cpu"
    )  # fmt: skip
    said = engine.generate(PROMPTS, max_new_tokens=4)
    said += engine.generate(PROMPTS[:1], max_new_tokens=4, temperature=0.8, top_k=50, top_p=0.9, seed=3)
    logits = predict(engine, batch)[1]["logits"]
    engine.close()
    return [said, logits.tolist()]


def by_lora(dp: int, pp: int, folder: str) -> float:
    """How far additions trained by the engine are from plain PyTorch: all its numbers, with dropout."""
    from merak_like import hf
    from merak_like.hf import lora
    from merak_like.trainer.config import Lora

    model = lora.wrap(build("llama").double(), Lora(r=4, dropout=0.1))
    rows = data("llama", 19, 1)
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    count = hf.loss_weight(model)
    assert count is not None
    one = training.Subject(model, lambda: batch, None, count)
    ours = training.by_engine(one, [batch] * 4, dp, pp, 4 // dp)
    if not ours.weights:
        return 0.0
    assert {name for name in ours.steps[0].gradients if "lora" not in name} == set()
    return training.same(ours, training.plainly(one, [batch] * 4, 4), 1e-10)


def _ran(state: Any, weights: dict[str, Tensor]) -> Ran:
    return _as_ran(state.log_history, state.best_global_step, weights)


def _as_ran(lines: list[dict[str, float]], best: int | None, weights: dict[str, Tensor]) -> Ran:
    columns: list[Any] = [[float(line[key]) for line in lines if key in line] for key in KEYS]
    flat = {name: tensor.flatten().tolist() for name, tensor in weights.items()}
    return Ran._make([*columns, best or 0, flat])


def far(ours: Ran, theirs: Ran) -> float:
    """The largest difference of all; AssertionError where the runs are not alike in kind."""
    assert ours.best_step == theirs.best_step
    assert ours.weights.keys() == theirs.weights.keys()
    pairs: list[tuple[Any, Any]] = [(ours[i], theirs[i]) for i in range(4)]
    assert all(len(a) == len(b) for a, b in pairs), [(len(a), len(b)) for a, b in pairs]
    pairs += [(ours.weights[name], theirs.weights[name]) for name in theirs.weights]
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)
