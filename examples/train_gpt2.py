"""Train an unmodified Hugging Face GPT-2 on Python's own documentation, over data- and pipeline-parallel ranks.

    torchrun --nproc-per-node 4 examples/train_gpt2.py --dp 2 --pp 2
    python examples/train_gpt2.py                                       # the same in one process

The text is what every Python brings along: the language reference (``pydoc_data``) and the docstrings of the standard
library. Tables, a chart, the plan and a checkpoint that ``from_pretrained`` loads are left in runs/gpt2. Exits with 1
unless the model predicts text it has not seen better than one that knows only how frequent each token is.

Needs ``pip install 'merak-like[hf,plots]'``, no GPU and no network. Several machines need a shared ``--runs`` folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from python_text import CONTEXT, VOCABULARY, prepared
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from merak_like import Engine, auto_parallel
from merak_like.partitioner.report.page import page
from merak_like.partitioner.report.table import render

MARGIN = 0.5
"""Nats below the unigram entropy that count as clearly below."""


def batch_of(rows: Tensor) -> dict[str, Tensor]:
    """GPT-2 moves the labels by one token itself."""
    return {"input_ids": rows, "labels": rows}


def cosine(steps: int, warm_up: int) -> Callable[[int], float]:
    """The share of the learning rate at a step: up to 1 in a line, then down to a tenth in half a cosine."""
    return lambda step: (
        (step + 1) / warm_up
        if step < warm_up
        else 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
    )


def unigram_entropy(rows: Tensor) -> float:
    """Nats per token of the best model that ignores context: the entropy of these very tokens' frequencies."""
    share = torch.bincount(rows[:, 1:].flatten()).double() / rows[:, 1:].numel()
    return float(-(share * share.log()).nansum())


class Log:
    """What the first rank writes down: metrics.jsonl, a progress bar, and in the end the chart."""

    def __init__(self, folder: Path, steps: int, console: Console) -> None:
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
        self.task = self.bar.add_task("", total=steps)
        self.file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self.lines: list[dict[str, float]] = []

    def __call__(self, **numbers: float) -> None:
        self.lines.append(numbers)
        print(json.dumps(numbers), file=self.file, flush=True)
        if "loss" in numbers:
            text = "loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, gradient norm {grad_norm:.2f}"
            self.bar.update(self.task, advance=1, description=text.format(**numbers))
        else:
            self.bar.console.print("step {step:4d}: validation loss {validation_loss:.3f}".format(**numbers))

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """The steps at which something was measured, and what was measured."""
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        return [step for step, _ in found], [value for _, value in found]


def draw(log: Log, engine: Engine, unigram: float, file: Path) -> None:
    """The chart: what was learned, against the best that can be done without looking at the context."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = log.column("validation_loss")
    axes.plot(*log.column("loss"), color="#a9c3e0", linewidth=1, label="training, each batch")
    axes.plot(steps, losses, "o-", color="#1f4e8c", linewidth=1.8, markersize=5, label="validation, other documents")
    axes.axhline(unigram, color="#b5482f", linestyle="--", linewidth=1.2)
    right = {"xy": (1, unigram), "xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    axes.annotate(f"unigram entropy {unigram:.2f}", **right, color="#b5482f", xytext=(0, 3), textcoords="offset points")
    end = {"xytext": (0, 8), "textcoords": "offset points", "ha": "right", "color": "#1f4e8c"}
    axes.annotate(f"{losses[-1]:.2f}", (steps[-1], losses[-1]), **end)
    axes.set_title("GPT-2 learns Python's documentation", loc="left", fontsize=13, fontweight="bold", pad=22)
    about = f"{engine.plan.mesh}, schedule {engine.plan.schedule}, {engine.plan.micro_batches} micro-batches"
    axes.text(0, 1.02, about, transform=axes.transAxes, color="#666666", va="bottom")
    axes.set(xlabel="step", ylabel="loss in nats per token", xlim=(0, None))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(framealpha=1, edgecolor="none", loc="upper right")
    figure.savefig(file, dpi=150)


def train(engine: Engine, rows: dict[str, Tensor], asked: argparse.Namespace, log: Callable[..., object]) -> float:
    """Train for the steps asked for, evaluating now and then; the last validation loss. ``log`` is told everything."""
    assert engine.optimizer is not None
    schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, cosine(asked.steps, max(1, asked.steps // 10)))
    generator = torch.Generator().manual_seed(0)
    every, valid = max(1, asked.steps // 5), float("nan")
    for step in range(1, asked.steps + 1):
        began = time.perf_counter()
        picked = torch.randint(len(rows["train"]), (asked.batch,), generator=generator)
        result = engine.step(batch_of(rows["train"][picked]))
        speed = asked.batch * CONTEXT / (time.perf_counter() - began)
        rate = schedule.get_last_lr()[0]
        log(step=step, loss=result.loss, grad_norm=result.grad_norm, learning_rate=rate, tokens_per_second=speed)
        schedule.step()
        if step % every == 0 or step == asked.steps:
            results = [engine.evaluate(batch_of(part)) for part in rows["valid"].split(asked.batch)]
            valid = sum(r.loss * r.tokens for r in results) / sum(r.tokens for r in results)
            log(step=step, validation_loss=valid)
    return valid


def main() -> None:
    """Prepare, plan, train, check, save, load again, write a text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("dp", 1, "replicas"),
        ("pp", 1, "pipeline stages"),
        ("steps", 250, "training steps"),
        ("batch", 8, f"rows of {CONTEXT} tokens in a step, over all replicas"),
    ):
        options.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    options.add_argument("--runs", type=Path, default=Path("runs"), help="where files go (default: runs)")
    options.add_argument("--device", help="default: a GPU for each rank if there are any, else the CPU")
    asked = options.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rank = int(os.environ.get("RANK", "0"))
    folder = asked.runs / "gpt2"
    text, rows = prepared(asked.runs, rank)
    rows["valid"] = rows["valid"][torch.linspace(0, len(rows["valid"]) - 1, 16 * asked.batch).long()]

    with torch.device("meta"):  # no memory here: each rank makes the weights of its own stage, and no others
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=224, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,  # not one pass over the text: nothing is learned by heart
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    engine = auto_parallel(
        model, asked.dp, asked.pp,
        example=batch_of(rows["train"][: asked.batch]), max_grad_norm=1.0, device=asked.device,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.1),
    )  # fmt: skip

    unigram = unigram_entropy(rows["valid"])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120, quiet=rank > 0)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        engine.plan.save(folder / "plan.json")
        (folder / "plan.html").write_text(page(engine.plan), encoding="utf-8")
        console.print(render(engine.plan), "")
        log = Log(folder, asked.steps, console)
        with log.bar:
            valid = train(engine, rows, asked, log)
        draw(log, engine, unigram, folder / "loss.png")
    else:
        valid = train(engine, rows, asked, lambda **_: None)
    unseen = batch_of(rows["valid"][: asked.batch])
    expected = engine.evaluate(unseen).loss
    engine.save_pretrained(folder / "checkpoint")
    engine.close()

    if rank == 0:  # from here on plain transformers
        tokenizer = AutoTokenizer.from_pretrained(text)
        tokenizer.save_pretrained(folder / "checkpoint")
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder / "checkpoint").eval()
        assert abs(loaded(**unseen).loss.item() - expected) < 1e-3, "the checkpoint is not the model that was trained"
        torch.manual_seed(0)
        start = tokenizer("Return a new list", return_tensors="pt")
        made = loaded.generate(**start, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40, pad_token_id=0)
        words = " ".join(tokenizer.decode(made[0]).split())
        console.print(Panel(Text(words), title="the checkpoint, loaded by from_pretrained, writes", width=100))
        console.print(f"validation loss {valid:.3f} nats per token, unigram entropy {unigram:.3f}")
        console.print(f"wrote loss.png, plan.html, plan.json, metrics.jsonl and checkpoint/ in {folder}")
        if not valid < unigram - MARGIN:
            sys.exit(f"a validation loss of {valid:.3f} is not clearly below the unigram entropy {unigram:.3f}")


if __name__ == "__main__":
    main()
