"""What the ranks do in the tests of codecs between stages in whole runs: jobs that go on, and trainers' own loops."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merak_like import Engine
from merak_like.trainer.config import Run
from merak_like.trainer.loop import Trainer
from merak_like.trainer.report import read_metrics
from merak_like.trainer.run import start
from merak_like.trainer.settings import Checkpoints, Logging, Optimizer, Parallelism, Schedule, Settings, Training
from tests.coded import chain, counted, visits
from tests.scenarios import leads
from tests.trainer_runs import arguments, build, data
from tests.training import engine


def shared() -> Path:
    """A folder that all ranks of the job have."""
    return Path(sys.argv[1])


def went_on(text: str, dp: int, pp: int, background: bool, tp: int = 1) -> None:
    """Six steps over two epochs, and the same stopped after three: equal bit for bit, byte for byte.

    What another codec or other cuts cannot use of the memories is dropped on both ends: first visits, which are exact.
    """
    one, which, parts = chain(), visits(6), 4
    rows = one.batch(24)["input"]
    batches = [{"input": rows[samples]} for samples in which]
    folder = shared() / f"{text}-{dp}x{pp}x{tp}"

    def made(text: str = text, **more: Any) -> Engine:
        return engine(one, batches[0], dp, pp, parts // dp, tp=tp, codec=text, **more)

    def train(ours: Engine) -> list[Any]:
        found: list[Any] = []
        for batch, samples in [*zip(batches, which, strict=True)][ours.steps :]:
            with counted() as sent:
                found.append((ours.step(batch, samples=samples).loss, sent["bytes"]))
        return found

    def ended(ours: Engine) -> dict[str, Tensor]:
        weights = ours.full_state_dict()
        ours.close()
        return weights

    ours = made()
    for batch, samples in zip(batches[:3], which, strict=False):
        ours.step(batch, samples=samples)
    ours.save(folder, background=background)
    losses, weights = train(ours), ended(ours)
    assert len(losses) == 3
    again = made()
    again.load(folder)
    assert train(again) == losses
    theirs = ended(again)
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    for more in ({"text": "aqsgd(2)|int8"}, {"schedule": "interleaved", "chunks": 2}):
        other = made(**more)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            other.load(folder)
        said = [str(one.message) for one in told if "memories of samples are of another codec or layout" in str(one)]
        assert len(said) == leads()
        whole = other.evaluate(batches[3]).loss
        assert abs(other.step(batches[3], samples=which[3]).loss - whole) < 1e-12  # its activations came whole
        assert abs(other.step(batches[3], samples=which[3]).loss - other.evaluate(batches[3]).loss) > 1e-12
        other.close()


def learns(dp: int, pp: int) -> None:
    """Two bits of changes end nearer to the uncoded run than two bits of values: the paper's point."""
    one, which = chain(), visits(60)
    rows = one.batch(24)["input"]
    losses: dict[str | None, list[float]] = {}
    for text in (None, "int2|int8", "aqsgd(2)|int8"):
        ours = engine(one, {"input": rows[:8]}, dp, pp, 4 // dp, codec=text)
        losses[text] = [ours.step({"input": rows[samples]}, samples=samples).loss for samples in which]
        ours.close()
    direct, change = (
        max(abs(a - b) for a, b in zip(losses[text][-6:], losses[None][-6:], strict=True))
        for text in ("int2|int8", "aqsgd(2)|int8")
    )
    assert change < direct / 3, (change, direct)


def left_out(dp: int, pp: int) -> None:
    """A step that is not finite changes no weight, and of what it sent nothing is remembered on either end."""
    one, parts = chain(), 4
    batch = one.batch(8)
    sick = {"input": batch["input"].clone()}
    sick["input"][2, 1, 5] = float("nan")  # of the second micro-batch
    ours = engine(one, batch, dp, pp, parts // dp, codec="aqsgd(4)", skip_not_finite=1)
    results, sent = [], list[int]()
    for given in (batch, sick, batch, batch):
        with counted() as found:
            results.append(ours.step(given, samples=range(8)))
        sent.append(found["bytes"])
    ours.close()
    assert [one.skipped for one in results] == [False, True, False, False]
    if ours.groups.coord.pp == 0:
        whole, change = sent[0] // parts, sent[1] // parts
        assert sent == [parts * whole, parts * change, whole + (parts - 1) * change, parts * change]


@contextmanager
def watched(engine: Engine) -> Iterator[list[tuple[Any, Sequence[int], int]]]:
    """Each step's batch, the samples that it was told, and the bytes that this rank sent."""
    found: list[tuple[Any, Sequence[int], int]] = []
    step = engine.step

    def stepped(batch: Any, *, samples: Any = None, **more: Any) -> Any:
        with counted() as sent:
            result = step(batch, samples=samples, **more)
        found.append((batch, [] if samples is None else [int(one) for one in samples], sent["bytes"]))
        return result

    engine.step = stepped  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del engine.step


ROWS = 12
"""Samples of what trainers train on."""


def _as_told(steps: Sequence[tuple[Any, Sequence[int], int]], samples: Sequence[Any]) -> None:
    """The rows of a batch are those of the samples that were told, as far as this rank has loaded any."""
    for batch, told, _ in steps:
        ids = batch["input_ids"] if isinstance(batch, dict) else batch.batch["input_ids"]
        assert len(ids) == len(told)
        if not ids.is_meta:
            assert torch.equal(ids, torch.stack([samples[one]["input_ids"] for one in told]))


def _sends_less(sent: Sequence[int], rows: int) -> None:
    """The first stage, which sends activations, once all samples have come."""
    if torch.distributed.get_rank() == 0:
        assert sent[0] - sent[8] > 0.6 * rows * 12 * 16 * 4, "of what a step's rows are without a codec"


def by_trainer(text: str, dp: int, pp: int) -> list[float]:
    """Our loop, whose last batch of an epoch has a sample of the next: stopped and taken up, it ends the same."""
    samples = data("llama", ROWS, 1)

    def trained(name: str, steps: int, **more: Any) -> tuple[Any, ...]:
        asked = Settings(
            training=Training(steps=steps, batch=5, seed=3), optimizer=Optimizer(lr=3e-3),
            parallelism=Parallelism(dp=dp, pp=pp, hardware="a100-80gb", micro_batches=2, device="cpu", codec=text),
            schedule=Schedule(name="constant"), checkpoints=Checkpoints(every=4), folder=shared() / name,
            logging=Logging(every=1, console=False), **more,
        )  # fmt: skip
        trainer = Trainer(build("llama"), asked, samples)
        with watched(trainer.engine) as steps_seen:
            trainer.train(resume="auto")
        weights = trainer.engine.full_state_dict()
        trainer.close()
        return [line["loss"] for line in trainer.state.history if "loss" in line], weights, steps_seen

    losses, weights, seen = trained(f"whole-{text}", 12)
    if "aqsgd" in text:
        _as_told(seen, samples)
        assert sorted(one for _, told, _ in seen for one in told) == sorted([*range(ROWS)] * 5)
        if dp == 1:  # of several replicas none has seen all
            assert any(len({*told}) < len(told) for _, told, _ in seen), "no sample came twice in a step"
            _sends_less([nbytes for *_, nbytes in seen], 5)
    else:
        assert not any(told for _, told, _ in seen)
    trained(f"parts-{text}", 4)
    again, theirs, _ = trained(f"parts-{text}", 12)
    assert again == losses
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    assert losses[-1] < losses[0]
    return losses


def by_hf_trainer(text: str, dp: int, pp: int) -> list[float]:
    """transformers' loop, shuffled by its own sampler; a last batch of two samples fills four micro-batches."""
    from merak_like.hf.trainer import HFTrainer

    samples = data("llama", ROWS + 2, 1)
    asked = arguments(str(shared() / f"hf-{text}"), 1, 4)
    asked.max_steps, asked.eval_steps, asked.save_steps = 12, 12, 12
    trainer = HFTrainer(
        build("llama"), asked, train_dataset=samples, eval_dataset=data("llama", 4, 2), dp=dp, pp=pp,
        engine={"hardware": "a100-80gb", "codec": text},
    )  # fmt: skip
    build_engine, found = trainer._build, list[Any]()

    def built(*given: Any, **more: Any) -> Engine:
        made = build_engine(*given, **more)
        found.append(watched(made))
        found.append(found[0].__enter__())
        return made

    trainer._build = built  # type: ignore[method-assign]
    trainer.train()
    if "aqsgd" in text:
        seen = found[1]
        _as_told(seen, samples)
        epoch = [one for _, told, _ in seen[:4] for one in told]
        assert sorted({*epoch}) == [*range(ROWS + 2)]
        assert [len(epoch), seen[3][1][:2]] == [16, seen[3][1][2:]]
        assert seen[4][1] != seen[0][1]  # another order
        _sends_less([nbytes for *_, nbytes in seen], 4)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.engine is not None
    trainer.engine.close()
    assert losses[-1] < losses[0]
    return losses


def from_a_file(text: str, dp: int, pp: int) -> list[float]:
    """``merak train run.yaml``, in its ranks."""
    folder = shared() / f"file-{text}"
    if leads():
        folder.mkdir()
        np.save(folder / "tokens.npy", torch.cat([row["input_ids"] for row in data("llama", ROWS, 1)]).numpy())
    torch.distributed.barrier()
    run = Run.model_validate(
        {
            "model": {"config": {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 16,
                "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            }},
            "data": {"train": str(folder / "tokens.npy"), "seq": 12, "packing": "stream"},
            "training": {"steps": 9, "batch": 4}, "optimizer": {"lr": 0.003},
            "parallelism": {"dp": dp, "pp": pp, "hardware": "a100-80gb", "device": "cpu", "codec": text},
            "logging": {"every": 1, "console": False}, "folder": str(folder / "out"),
        }
    )  # fmt: skip
    _, ended = start(run)
    assert ended
    losses = [line["loss"] for line in read_metrics(folder / "out") if "loss" in line]
    assert losses[-1] < losses[0]
    return losses
