"""The loop in one process: callbacks, evaluation, the best model, bad steps, schedules, weight decay, speed."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    EarlyStoppingCallback,
    TrainerCallback,
    get_scheduler,
)
from transformers import Trainer as HF

from merak_like.api import auto_parallel
from merak_like.partitioner.report.text import bytes_text
from merak_like.runtime.batches import enough
from merak_like.trainer.groups import decayed, optimizer_factory
from merak_like.trainer.loop import Trainer
from merak_like.trainer.rates import rate, warmup_steps
from merak_like.trainer.settings import (
    Checkpoints,
    Evaluation,
    Logging,
    Optimizer,
    Parallelism,
    Profile,
    Schedule,
    Settings,
    Training,
)
from merak_like.trainer.weights import load_weights
from tests.trainer_runs import Counting, build, data

HERE = Parallelism(hardware="a100-80gb", micro_batches=2, device="cpu")


def quick(folder: Path, **more: Any) -> Settings:
    """Twelve short steps."""
    given: dict[str, Any] = {
        "training": Training(steps=12, batch=8), "parallelism": HERE, "optimizer": Optimizer(lr=1e-2),
        "logging": Logging(every=4, console=False), "folder": folder,
    }  # fmt: skip
    return Settings(**(given | more))


def test_callbacks_of_transformers_are_told_and_obeyed(tmp_path: Path) -> None:
    counting = Counting()
    asked = quick(tmp_path, evaluation=Evaluation(every=6), checkpoints=Checkpoints(every=6))
    trainer = Trainer(build("llama"), asked, data("llama", 40, 1), data("llama", 8, 2), callbacks=[counting])
    trainer.train()
    trainer.close()
    assert counting.seen == {"steps": 12, "looks": 3, "saves": 2}  # the look at step 3 is the callback's


class Epochs(TrainerCallback):
    """Notes where epochs begin and end."""

    def __init__(self, stop: bool = False) -> None:
        self.seen: list[str] = []
        self.stop = stop

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(f"begin {state.epoch:g}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(f"end {state.epoch:g}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = self.stop


def test_callbacks_are_told_of_epochs_and_cannot_cut_one_short(tmp_path: Path) -> None:
    epochs = Epochs()
    asked = quick(tmp_path, training=Training(epochs=2.0, batch=8))
    Trainer(build("llama"), asked, data("llama", 16, 1), callbacks=[epochs]).train()
    assert epochs.seen == ["begin 0", "end 1", "begin 1", "end 2"]
    with pytest.raises(ValueError, match="ask to stop the training"):
        Trainer(build("llama"), asked, data("llama", 16, 1), callbacks=[Epochs(stop=True)]).train()
    # What the first of the two runs in this folder left has another name.
    assert {"metrics.jsonl", "metrics-1.jsonl", "checkpoints-1"} <= {path.name for path in tmp_path.iterdir()}


def test_early_stopping_stops(tmp_path: Path) -> None:
    asked = quick(
        tmp_path, training=Training(steps=400, batch=8), optimizer=Optimizer(lr=0.3),
        evaluation=Evaluation(every=5), checkpoints=Checkpoints(best=True),
    )  # fmt: skip
    patience = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = Trainer(build("llama"), asked, data("llama", 40, 1), data("llama", 8, 2), callbacks=[patience])
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.history if "eval_loss" in line]
    assert trainer.state.step < 400
    assert min(losses) == losses[-3] == trainer.state.best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)  # the best weights are back


def test_a_run_leaves_its_numbers_and_a_model_that_loads(tmp_path: Path) -> None:
    asked = quick(
        tmp_path, training=Training(epochs=2.0, batch=8, deterministic=True, check_every=4),
        logging=Logging(every=4, console=False, profile=Profile(at=2, steps=2)),
    )  # fmt: skip
    trainer = Trainer(build("llama"), asked, data("llama", 36, 1), data("llama", 10, 2))
    said: list[str] = []
    trainer.journal.say = said.append  # type: ignore[method-assign]
    summary = trainer.train()
    (beside,) = said  # the third step, beside the plan
    assert re.match(r"a step takes \S+ \w+ \(planned for a100-80gb: .*\), of it the pipeline idles \d.* % \(pl", beside)
    assert beside.endswith(f"(planned for the model: {bytes_text(trainer.engine.plan.memory_bytes[0]['total'])})")
    trainer.save(tmp_path / "model")
    looked = trainer.evaluate()
    trainer.close()
    assert not torch.are_deterministic_algorithms_enabled(), "as it was before"
    assert json.loads((tmp_path / "profile/rank-0.json").read_text())["traceEvents"]
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert summary["train_steps"] == 9 == trainer.state.step  # two epochs of 4.5 batches
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 9]
    line = next(line for line in lines if "loss" in line)
    assert {"grad_norm", "learning_rate", "seconds_per_step", "items_per_second", "tflops_per_rank", "data_wait",
            "model_flops_utilisation"} <= line.keys()  # fmt: skip
    assert lines[-1]["peak_memory_bytes"] > 1e6
    assert lines[-1]["peak_memory_bytes_of_ranks"] == [lines[-1]["peak_memory_bytes"]]
    assert [(line["step"], line["planned_bubble"]) for line in lines if "bubble" in line] == [(3, 0.0)]
    assert looked["eval_perplexity"] == pytest.approx(math.exp(looked["eval_loss"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    batch = {key: torch.stack([sample[key] for sample in data("llama", 10, 2)]) for key in ("input_ids", "labels")}
    assert model(**batch).loss.item() == pytest.approx(looked["eval_loss"], abs=1e-5)


def test_a_step_that_is_not_finite_names_its_samples_and_leaves_the_weights(tmp_path: Path) -> None:
    class Brittle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    samples = [torch.full((4,), float("nan") if i == 13 else 1.0) for i in range(16)]

    def run(bad: int) -> Trainer:
        torch.manual_seed(0)
        asked = quick(
            tmp_path / str(bad), training=Training(steps=4, batch=4, shuffle=False, skip_bad_steps=bad),
            parallelism=HERE, logging=Logging(every=1, console=False),
        )  # fmt: skip
        return Trainer(Brittle(), asked, samples, loss_fn=lambda out, batch: out.square().mean())

    trainer = run(0)
    before = {}
    with pytest.raises(FloatingPointError) as told:
        trainer.train()
    assert "first in the batch itself of stage 0" in str(told.value)
    assert str(told.value).endswith("the batch is samples [12, 13, 14, 15]")
    before = trainer.engine.full_state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in before.values())
    lenient = run(1)
    lenient.train()
    assert (lenient.state.skipped, lenient.state.step) == (1, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), lenient.engine.full_state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_rates_are_those_of_transformers(name: str) -> None:
    theirs_name = "constant_with_warmup" if name == "constant" else name
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(theirs_name, optimizer, num_warmup_steps=7, num_training_steps=40)
    for step in range(40):
        assert rate(Schedule(name=name, warmup=7), step, 40) == pytest.approx(theirs.get_last_lr()[0])  # type: ignore[arg-type]
        optimizer.step()
        theirs.step()


def test_wsd_stays_then_falls_and_ends_where_it_should() -> None:
    asked = Schedule(name="wsd", warmup=0.1, decay=0.25, end=0.2)
    rates = [rate(asked, step, 100) for step in range(101)]
    assert rates[10:76] == [1.0] * 66
    assert rates[100] == pytest.approx(0.2)
    assert rates[87] == pytest.approx(1 - 0.8 * 12 / 25)
    with pytest.raises(ValueError, match="warmup = 30 steps, but training has 20"):
        warmup_steps(Schedule(warmup=30), 20)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_weights_that_decay_are_those_of_transformers(kind: str) -> None:
    model = build(kind)
    theirs = set(HF.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decayed(model) == theirs
    optimizer = optimizer_factory(model, Optimizer(weight_decay=0.1))(model.parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(theirs), len(list(model.parameters())) - len(theirs)
    ]  # fmt: skip


def test_a_short_batch_keeps_its_mean() -> None:
    batch = {"x": torch.arange(3.0), "scale": 2}
    full, times = enough(batch, 8)
    assert (full["x"].shape, times, full["scale"]) == ((9,), 3, 2)
    assert full["x"].mean() == batch["x"].mean()
    assert enough(batch, 3) == (batch, 1)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for asked in (quick(tmp_path, evaluation=Evaluation(every=3)), quick(tmp_path, checkpoints=Checkpoints(best=True))):
        with pytest.raises(ValueError, match="is set, but there is no eval_dataset"):
            Trainer(build("llama"), asked, data("llama", 40, 1))
    with pytest.raises(ValueError, match=r"say either training.steps or training.epochs"):
        Training(steps=3, epochs=1.0)
    asked = quick(tmp_path, evaluation=Evaluation(every=3, metric="eval_f1"))
    trainer = Trainer(build("llama"), asked, data("llama", 40, 1), data("llama", 8, 2))
    with pytest.raises(
        ValueError, match=r"evaluation.metric = 'eval_f1' is none of \['eval_loss', 'eval_perplexity'\]"
    ):
        trainer.train()


def test_a_folder_without_the_weights_is_refused(tmp_path: Path) -> None:
    engine = auto_parallel(nn.Linear(2, 2), example=torch.ones(2, 2), loss_fn=lambda out, _: out.mean(), device="cpu")
    with pytest.raises(ValueError, match=r"has no \['weight', 'bias'\] \(2 missing\)"):
        load_weights(engine, tmp_path)


def test_autocast_computes_in_bf16_and_keeps_weights_in_fp32(tmp_path: Path) -> None:
    asked = quick(tmp_path, precision="autocast")
    trainer = Trainer(build("llama"), asked, data("llama", 40, 1), data("llama", 8, 2))
    first = trainer.evaluate()["eval_loss"]
    exact = Trainer(build("llama"), quick(tmp_path), data("llama", 40, 1), data("llama", 8, 2)).evaluate()["eval_loss"]
    assert first != exact
    assert first == pytest.approx(exact, abs=0.05)
    trainer.train()
    assert all(t.dtype == torch.float32 for t in trainer.engine.full_state_dict().values())


def test_generate_says_what_transformers_says(tmp_path: Path) -> None:
    trainer = Trainer(build("llama"), quick(tmp_path, training=Training(steps=60, batch=8)), data("llama", 64, 1))
    trainer.train()
    prompts = [[3, 4, 5], [50, 51, 52, 53, 54], [7]]
    made = trainer.engine.generate(prompts, max_new_tokens=6)
    trainer.save(tmp_path / "model")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for prompt, text in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        theirs = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                                pad_token_id=0, eos_token_id=None)[0]  # fmt: skip
        assert text == theirs.tolist()
    sampled = [trainer.engine.generate(prompts, max_new_tokens=6, temperature=2.0, top_k=20, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    stopped = trainer.engine.generate(prompts[:1], max_new_tokens=6, end=made[0][4])
    assert stopped == [made[0][:5]]
    with pytest.raises(ValueError, match=r"30 new tokens behind a prompt of 5 are 35, but Llama\w+ has 32 positions: "
                                         "ask for at most 27"):  # fmt: skip
        trainer.engine.generate(prompts, max_new_tokens=30)
    with pytest.raises(ValueError, match=r"at least one token and at least one new one, found lengths \[2, 0\]"):
        trainer.engine.generate([[1, 2], []], max_new_tokens=1)


def test_a_model_that_reads_ahead_is_not_asked_for_text() -> None:
    """A masked language model says something, too: from the filling behind the text."""
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=50, num_attention_heads=2, max_position_embeddings=16, **small))
    ids = torch.arange(8).view(1, 8)
    engine = auto_parallel(model, example={"input_ids": ids, "labels": ids}, hardware="a100-80gb", device="cpu")
    with pytest.raises(ValueError, match="depends on what stands behind a text: generate is for causal"):
        engine.generate([[1, 2, 3]], max_new_tokens=2)
    engine.close()


def test_a_trainer_that_is_refused_leaves_nothing_open(tmp_path: Path) -> None:
    """Its engine was built, and nobody could close it: the watch went on, and signals were swallowed."""
    before, running = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    with pytest.raises(ValueError, match="takes TrainerCallback objects of transformers, found"):
        Trainer(build("llama"), quick(tmp_path), data("llama", 40, 1), callbacks=[EarlyStopping()])
    assert signal.getsignal(signal.SIGTERM) is before
    assert set(threading.enumerate()) <= running


class EarlyStopping:
    """No TrainerCallback."""


def test_half_precision_is_measured_by_its_own_peak(tmp_path: Path) -> None:
    peaks = {}
    for precision in ("fp32", "fp16", "bf16"):
        trainer = Trainer(build("llama"), quick(tmp_path / precision, precision=precision), data("llama", 40, 1))
        trainer.train()
        peaks[precision] = trainer.meter.peak
        assert trainer.meter.peak is not None
        line = next(line for line in trainer.state.history if "tflops_per_rank" in line)
        assert line["model_flops_utilisation"] == pytest.approx(line["tflops_per_rank"] * 1e12 / trainer.meter.peak)
        trainer.close()
    assert peaks == {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12}
