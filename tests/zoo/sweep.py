"""Every (model type, task) pair of transformers' auto classes as a tiny model, and which of them train at all.

`python -m tests.zoo.sweep` writes sweep_status.json: the pairs that build and train in plain PyTorch, and one line on
why each of the others does not. It goes on where it stopped; `--again` asks once more for what failed, `--all` for
everything. A sweep of something else over the same models takes its pairs from there: `read()["trains"]`.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import inspect
import json
import multiprocessing as mp
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from tests.zoo.case import Batch, generator, mean_square
from tests.zoo.shrink import FIRST_TOKEN, IMAGE, LAST_TOKEN, shrink

STATUS = Path(__file__).with_name("sweep_status.json")
TASKS = {
    "causal-lm": ("CAUSAL_LM", transformers.AutoModelForCausalLM),
    "seq2seq-lm": ("SEQ_TO_SEQ_CAUSAL_LM", transformers.AutoModelForSeq2SeqLM),
    "masked-lm": ("MASKED_LM", transformers.AutoModelForMaskedLM),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION", transformers.AutoModelForSequenceClassification),
    "image-classification": ("IMAGE_CLASSIFICATION", transformers.AutoModelForImageClassification),
}
SECONDS, WEIGHTS, MEMORY = 60, 50e6, 8 << 30  # per pair: time, bytes of weights, bytes of memory
LENGTH = 16


# what a model needs beside the inputs of its task, and the parts of a config that a task's model is built from
EXTRA: dict[str, Callable[[Any, int], Batch]] = {
    "git": lambda config, size: {"pixel_values": _noise(size, 3, IMAGE, IMAGE)},
    "musicgen": lambda config, size: _codes(config.num_codebooks, size),
    "musicgen_melody": lambda config, size: _codes(config.num_codebooks, size),
    "shieldgemma2": lambda config, size: {
        "input_ids": torch.full((size, LENGTH), FIRST_TOKEN).index_fill_(1, torch.arange(4), config.image_token_index),
        "token_type_ids": (torch.arange(LENGTH) < 4).long().expand(size, -1),
        "labels": None,
    },
    "siglip2": lambda config, size: {
        "pixel_values": _noise(size, 16, 3 * config.vision_config.patch_size**2),
        "pixel_attention_mask": torch.ones(size, 16, dtype=torch.long),
        "spatial_shapes": torch.full((size, 2), 4),
    },
    "voxtral_realtime": lambda config, size: {"input_features": _noise(size, config.audio_config.num_mel_bins, 128)},
}
PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(1))


def _codes(books: int, size: int) -> Batch:
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (size, LENGTH, books), generator=generator())
    mask = torch.ones(size * books, LENGTH, dtype=torch.long)
    return {"input_ids": ids.transpose(1, 2).reshape(-1, LENGTH), "attention_mask": mask, "labels": ids}


def pairs() -> Iterator[tuple[str, str]]:
    """Every (model type, task) that transformers' auto classes name."""
    for task, (mapping, _) in TASKS.items():
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
            yield model_type, task


def build(model_type: str, task: str, size: int = 2) -> tuple[nn.Module, Batch]:
    """A tiny model in train mode with random weights (seed torch first), and a batch of `size` for it."""
    config = shrink(model_type, task)
    auto = TASKS[task][1]
    if model_type in PART:
        model = auto._model_mapping[type(config)](getattr(config, PART[model_type]))
    else:
        model = auto.from_config(config, dtype=torch.float32)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if weights > WEIGHTS:
        raise ValueError(f"not small: {weights / 1e6:.0f} MB of weights")
    batch = batch_for(model, task, size)
    if model_type in EXTRA:
        batch |= EXTRA[model_type](model.config, size)
    return model.train(), batch


def batch_for(model: nn.Module, task: str, size: int = 2) -> Batch:
    """Of what the task has, what the model's forward asks for by name."""
    config: Any = model.config
    asks = inspect.signature(model.forward).parameters
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (size, LENGTH), generator=generator())
    ids[:, -1] = eos if isinstance(eos := getattr(config, "eos_token_id", None), int) else LAST_TOKEN
    labels = ids
    if task == "masked-lm":
        labels = ids.masked_fill(torch.arange(LENGTH) % 3 != 1, -100)
    elif task.endswith("classification"):
        labels = torch.arange(size) % 2
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if task == "image-classification" and "pixel_values" in asks:
        side = getattr(config, "image_size", IMAGE)
        side = side[0] if isinstance(side, (list, tuple)) else side
        batch = {"pixel_values": _noise(size, 3, side, side), "labels": labels}
    return {name: value for name, value in batch.items() if name in asks}


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or for the few models that compute none the mean square of what they return."""
    loss = getattr(output, "loss", None)
    return loss if loss is not None else mean_square(output[0])


def trains(model: nn.Module, batch: Batch) -> str:
    """Run forward and backward: "" if the loss is finite and the weights get finite gradients, else what is wrong."""
    loss = loss_of(model(**batch))
    if not torch.isfinite(loss):
        return f"loss {loss.item()}"
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not any(grad.any() for grad in grads):
        return "no gradient"
    return "" if all(torch.isfinite(grad).all() for grad in grads) else "a gradient is not finite"


def attempt(model_type: str, task: str) -> tuple[str, str]:
    """(why the pair does not train or "", what else is worth knowing or "")."""
    try:
        torch.manual_seed(0)
        failure = trains(*build(model_type, task))
        losses = []
        for _ in range(2):
            torch.manual_seed(0)
            model, batch = build(model_type, task)
            losses.append(loss_of(output := model(**batch)).item())
        notes = [] if losses[0] == losses[1] else ["two runs from one seed differ"]
        if getattr(output, "loss", None) is None:
            notes.append("computes no loss")
        return failure, "; ".join(notes)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240], ""


Answer = Callable[[str, str], tuple[str, str]]
"""What a worker does with (model type, task): (why it failed or "", what else is worth knowing or "")."""


def _work(connection: Any, answer: Answer) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        connection.send(answer(*asked))


class Worker:
    """One process that answers pairs, replaced when it hangs or dies."""

    def __init__(self, answer: Answer = attempt, seconds: int = SECONDS) -> None:
        self.process: Any = None
        self.answer, self.seconds = answer, seconds

    def attempt(self, model_type: str, task: str) -> tuple[str, str]:
        if self.process is None:
            context = mp.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.answer), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.connection.send((model_type, task))
            if self.connection.poll(self.seconds):
                return self.connection.recv()
            failure = f"not done in {self.seconds} s"
        except (EOFError, OSError):
            self.process.join()
            failure = f"the process died with exit code {self.process.exitcode}"
        self.process.kill()
        self.process = None
        return failure, ""


def read() -> dict[str, Any]:
    """The status: lists of "type/task" that train, notes on some, and a reason for each that does not train."""
    return json.loads(STATUS.read_text()) if STATUS.exists() else {"trains": [], "notes": {}, "fails": {}}


def _write(good: list[str], notes: dict[str, str], bad: dict[str, str]) -> dict[str, int]:
    counts = {"pairs": len(good) + len(bad), "train": len(good), "model types": len({n.split("/")[0] for n in good})}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    status = versions | {"counts": counts, "trains": sorted(good), "notes": notes, "fails": bad}
    STATUS.write_text(json.dumps(status, indent=1) + "\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--again", action="store_true", help="ask again for the pairs that failed")
    parser.add_argument("--all", action="store_true", help="ask again for every pair")
    options = parser.parse_args()
    status = {"trains": [], "notes": {}, "fails": {}} if options.all else read()
    good, notes, bad = status["trains"], status["notes"], {} if options.again else status["fails"]
    worker = Worker()
    for model_type, task in pairs():
        name = f"{model_type}/{task}"
        if name in good or name in bad:
            continue
        failure, note = worker.attempt(model_type, task)
        if failure:
            bad[name] = failure
        else:
            good.append(name)
        if note:
            notes[name] = note
        print(f"{name:50} {failure or 'trains'}{note and f' ({note})'}", flush=True)
        _write(good, notes, bad)
    print(json.dumps(_write(good, notes, bad)))


if __name__ == "__main__":
    main()
