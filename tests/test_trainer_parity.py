"""``Trainer`` and ``HFTrainer`` give what plain transformers gives in one process: losses, norms, rates, evaluations,
the best step, the weights, to 1e-5 over 50 steps, on every layout."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback

from merak_like.hf.numbered import NUMBERS
from merak_like.hf.trainer import HFTrainer
from tests.ranks import Call, results_of, selected_calls
from tests.trainer_runs import (
    BATCH,
    EVERY,
    PROMPTS,
    SAMPLES,
    STEPS,
    WHOLE,
    Ran,
    accuracy,
    arguments,
    build,
    by_hf_trainer,
    by_lora,
    by_trainer,
    by_transformers,
    data,
    far,
    speaks,
)

LAYOUTS = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1))


@cache
def plain(kind: str) -> Ran:
    """The reference. Accumulation where transformers counts it right: its BERT doubles the loss with it."""
    accumulation = 2 if kind == "llama" else 1
    return by_transformers(kind, BATCH // accumulation, accumulation)


@cache
def plain_in_order(kind: str) -> Ran:
    """The reference of our own loop, which shuffles in its own way."""
    return by_transformers(kind, BATCH, 1, WHOLE, train_sampling_strategy="sequential")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_hf_trainer_alone_is_transformers(kind: str, tmp_path: Path) -> None:
    """With accumulation: in transformers#35438 a classifier's own loss, a mean, was divided by nothing.

    The engine cuts a step of eight samples into two micro-batches and has the loss of the whole eight.
    """
    ours, theirs = by_hf_trainer(kind, 1, 1, str(tmp_path)), plain(kind)
    assert ours is not None
    assert (len(ours.loss), len(ours.eval_loss)) == (STEPS, STEPS // EVERY)
    assert ours.metric == pytest.approx(theirs.metric)
    assert far(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_trainer_alone_is_transformers(kind: str, tmp_path: Path) -> None:
    ours = by_trainer(kind, 1, 1, str(tmp_path))
    assert ours is not None
    assert len(ours.loss) == STEPS
    assert far(ours, plain_in_order(kind)) < 1e-5
    assert ours.metric == pytest.approx(plain_in_order(kind).metric)


def calls() -> Iterator[Any]:
    """Both trainers on every layout; the causal model on all, the classifier on the largest."""
    for function in ("by_trainer", "by_hf_trainer"):
        for kind, layouts in (("llama", LAYOUTS), ("bert", LAYOUTS[3:])):
            for dp, pp, tp in layouts:
                arguments = {"kind": kind, "dp": dp, "pp": pp, "tp": tp}
                usual = kind == "llama" and (dp, pp, tp) in (LAYOUTS[1], LAYOUTS[2])
                name, marks = f"{function}-{kind}-{dp}x{pp}x{tp}", [pytest.mark.slow] * (not usual)
                yield pytest.param(Call(name, f"tests.trainer_runs:{function}", arguments), id=name, marks=marks)


LORA = [
    Call(f"by_lora-{dp}x{pp}", "tests.trainer_runs:by_lora", {"dp": dp, "pp": pp}) for dp, pp, tp in LAYOUTS if tp == 1
]


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Call], list[Any]]:
    """One job for two ranks and one for four, for all selected tests."""
    folder = str(tmp_path_factory.mktemp("runs"))
    asked = [call._replace(arguments={**call.arguments, "folder": folder}) for call in selected_calls(request)]
    found = results_of(asked)
    by_name = {call.name: call for call in asked}
    return lambda call: found(by_name[call.name])


@pytest.mark.ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize("call", list(calls()))
def test_on_several_ranks_as_in_one_process(call: Call, result: Callable[[Call], list[Any]]) -> None:
    first, *others = result(call)
    assert others == [None] * len(others)
    kind = call.arguments["kind"]
    theirs = plain(kind) if "hf" in call.name else plain_in_order(kind)
    ours = Ran(*first)
    assert far(ours, theirs) < 1e-5
    assert ours.metric == pytest.approx(theirs.metric)


BEST = [
    Call(f"best-{zero}-{bf16}", "tests.trainer_runs:back_to_the_best", {"dp": 2, "pp": 1, "zero": zero, "bf16": bf16})
    for zero, bf16 in ((3, False), (1, True), (2, False))
]


@pytest.mark.ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "call", [pytest.param(call, id=call.name, marks=[pytest.mark.slow] * bool(i)) for i, call in enumerate(BEST)]
)
def test_best_weights_come_back_where_they_are_spread(call: Call, result: Callable[[Call], list[Any]]) -> None:
    """With zero=3 the rows of a weight met the whole of it, which torch refuses; masters of bf16 kept the last ones."""
    assert all(result(call))


SPEAKING = [
    Call(f"speaks-{dp}x{pp}x{tp}", "tests.trainer_runs:speaks", {"dp": dp, "pp": pp, "tp": tp})
    for dp, pp, tp in ((1, 1, 2), (2, 1, 1), (1, 2, 2))
]


@pytest.mark.ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "call", [pytest.param(call, id=call.name, marks=[pytest.mark.slow] * bool(i)) for i, call in enumerate(SPEAKING)]
)
def test_predictions_and_text_are_those_of_one_process(call: Call, result: Callable[[Call], list[Any]]) -> None:
    text, logits = speaks(1, 1)
    plain: Any = build("llama").double().eval()
    alone: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    theirs = [plain.generate(torch.tensor([p]), do_sample=False, **alone)[0].tolist() for p in PROMPTS]
    torch.manual_seed(3)
    drawn = plain.generate(
        torch.tensor(PROMPTS[:1]), do_sample=True, temperature=0.8, top_k=50, top_p=0.9, **alone
    )  # fmt: skip
    assert text == [*theirs, drawn[0].tolist()]
    rows = torch.stack([row["input_ids"] for row in data("llama", 7, 3)])
    torch.testing.assert_close(torch.tensor(logits).double(), plain(input_ids=rows).logits, rtol=0, atol=1e-6)
    for said, made in result(call):
        assert said == text
        torch.testing.assert_close(torch.tensor(made), torch.tensor(logits), rtol=0, atol=1e-6)


def test_bf16_is_that_of_transformers(tmp_path: Path) -> None:
    """To a hundredth: bfloat16 has three digits. It must not be float32 under another name either."""
    ours = by_hf_trainer("llama", 1, 1, str(tmp_path), bf16=True)
    theirs = by_transformers("llama", BATCH // 2, 2, bf16=True)
    assert ours is not None
    assert ours.loss == pytest.approx(theirs.loss, abs=0.01)
    assert ours.loss != plain("llama").loss


def test_lora_alone_is_plain_pytorch(tmp_path: Path) -> None:
    assert by_lora(1, 1, str(tmp_path)) < 1e-10


@pytest.mark.ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "call", [pytest.param(call, id=call.name, marks=[pytest.mark.slow] * (call is not LORA[-1])) for call in LORA]
)
def test_lora_on_several_ranks_as_in_one_process(call: Call, result: Callable[[Call], list[Any]]) -> None:
    assert max(result(call)) < 1e-10


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 (pass the loss as engine="),
        ({"torch_compile": True}, "torch_compile=True (pass engine={'methods': (Compiled(),)}"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    ],
)
def test_what_hf_trainer_cannot_honour_is_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        HFTrainer(build("llama"), arguments(str(tmp_path), 4, 2, **more), train_dataset=[], eval_dataset=[])


def test_a_codec_that_remembers_is_told_positions(tmp_path: Path) -> None:
    """Of rows that lose a column, in the order of transformers' sampler; columns and collator are as without."""
    rows = [{**row, "odd": "word"} for row in data("llama", 10, 1)]
    asked = arguments(str(tmp_path), 4, 1)

    def batches(train: Any, **more: Any) -> list[Any]:
        trainer = HFTrainer(
            build("llama"), asked, train_dataset=train, eval_dataset=rows, pp=2, engine=more,
            data_collator=transformers.default_data_collator,
        )  # fmt: skip
        torch.manual_seed(1)
        return list(trainer.get_train_dataloader())

    told, plain = batches(rows, codec="aqsgd(4)"), batches(rows, codec="int8")
    assert sorted(one for batch in told for one in batch[NUMBERS].tolist()) == [*range(10)]
    for with_numbers, without in zip(told, plain, strict=True):
        picked = torch.stack([rows[one]["input_ids"] for one in with_numbers.pop(NUMBERS).tolist()])
        assert torch.equal(with_numbers["input_ids"], picked)
        assert with_numbers.keys() == without.keys() == {"input_ids", "labels"}
        assert torch.equal(with_numbers["input_ids"], without["input_ids"])

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(rows)

    with pytest.raises(ValueError, match="positions, which Stream has not"):
        batches(Stream(), codec="aqsgd(4)")


def test_what_would_not_be_exact_is_refused(tmp_path: Path) -> None:
    samples = data("llama", 16, 1)
    asked = arguments(str(tmp_path), 4, 2)
    whole = build("llama")
    optimizers = (torch.optim.SGD(whole.parameters()), None)
    with pytest.raises(ValueError, match="a rank has its stage only"):
        HFTrainer(whole, asked, train_dataset=samples, eval_dataset=samples, optimizers=optimizers)
    with pytest.raises(ValueError, match="there is no whole checkpoint of HFTrainer in"):
        HFTrainer(build("llama"), asked, train_dataset=samples, eval_dataset=samples).train(resume_from_checkpoint=True)


def test_step_that_is_left_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loop takes a loss that is nan out of the mean that it logs (``logging_nan_inf_filter``)."""
    said: list[str] = []
    monkeypatch.setattr("merak_like.hf.trainer.logger.warning", said.append)
    asked = arguments(str(tmp_path), 4, 2)
    asked.max_steps, asked.eval_strategy, asked.save_strategy, asked.load_best_model_at_end = 2, "no", "no", False
    trainer = HFTrainer(
        build("llama"), asked, train_dataset=data("llama", 16, 1),
        engine={"hardware": "a100-80gb", "skip_not_finite": 1},
    )  # fmt: skip
    trainer.add_callback(Spoilt(trainer))
    trainer.train()
    assert trainer.engine is not None
    trainer.engine.close()
    assert said == [f"step 1 left out: loss {trainer.state.log_history[0]['loss']}, gradient norm nan"]


class Spoilt(TrainerCallback):
    """A gradient of the first step is nan."""

    def __init__(self, trainer: HFTrainer) -> None:
        self._trainer, self._hook = trainer, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is None:
            first: Any = next(iter(self._trainer.engine.model.parameters()))  # type: ignore[union-attr]
            self._hook = first.register_hook(lambda gradient: gradient * float("nan"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()  # type: ignore[union-attr]


def test_hf_trainer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped by a signal in the midst of its second epoch; the newest checkpoint there was cut off by a kill."""

    class Told(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 12:
                os.kill(os.getpid(), signal.SIGTERM)

    def run(folder: str, *callbacks: Any, resume: bool | None = None) -> Any:
        patience = EarlyStoppingCallback(early_stopping_patience=50)
        asked = arguments(str(tmp_path / folder), 4, 2, restore_callback_states_from_checkpoint=True)
        asked.max_steps, asked.eval_steps, asked.save_steps = 20, 5, 5
        trainer = HFTrainer(
            build("llama"), asked, train_dataset=data("llama", SAMPLES, 1), eval_dataset=data("llama", 20, 2),
            compute_metrics=accuracy, callbacks=[patience, *callbacks], engine={"hardware": "a100-80gb"},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.engine is not None
        weights = trainer.engine.full_state_dict()
        trainer.engine.close()
        columns = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy", "step")
        lines = [{k: line[k] for k in columns if k in line} for line in trainer.state.log_history]
        return lines, trainer.state.best_global_step, {name: w.tolist() for name, w in weights.items()}, trainer.state

    whole = run("whole")
    assert run("stopped", Told())[3].global_step == 13
    shutil.copytree(tmp_path / "stopped/checkpoint-13", tmp_path / "stopped/checkpoint-14")
    (tmp_path / "stopped/checkpoint-14/trainer_state.json").unlink()
    last = run("stopped", resume=True)
    assert last[1:3] == whole[1:3]
    steps = [line for line in last[0] if "loss" in line or "eval_loss" in line]
    assert steps == [line for line in whole[0] if "loss" in line or "eval_loss" in line]
