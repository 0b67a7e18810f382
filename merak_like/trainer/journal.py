"""What rank 0 writes down while a run goes: ``metrics.jsonl`` always, a progress bar, and trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from merak_like.trainer.settings import Logging
from merak_like.trainer.trackers import TRACKERS, Tracker

METRICS = "metrics.jsonl"


class Journal:
    """Takes lines of numbers, from ``start`` to ``close``. Another rank's than the lead keeps quiet."""

    def __init__(self, folder: Path, asked: Logging, settings: Mapping[str, Any], steps: int, *, lead: bool) -> None:
        self.folder, self.lead = folder, lead
        self._asked, self._settings, self._steps = asked, settings, steps
        self._trackers: list[Tracker] = []
        self._file: Any = None
        self._bar: Progress | None = None

    def start(self, step: int) -> None:
        """The loop begins, behind a step: lines of later ones, which are done again, are taken out of the file."""
        if self.lead and self._file is None:
            asked = self._asked
            self.folder.mkdir(parents=True, exist_ok=True)
            up_to(self.folder / METRICS, step)
            self._file = (self.folder / METRICS).open("a", encoding="utf-8")
            self._trackers = [TRACKERS[name](self.folder, asked.project, self._settings) for name in asked.trackers]
            if asked.console:
                self._bar = _bar()
                self._task = self._bar.add_task("", total=self._steps)
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, completed=step)

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """One line; to trackers only what is a number."""
        if self._file is None:
            return
        print(json.dumps({"step": step, "time": round(time.time(), 3), **numbers}), file=self._file, flush=True)
        for log, _ in self._trackers:
            log({name: value for name, value in numbers.items() if isinstance(value, int | float)}, step)
        if self._bar is not None:
            text = ", ".join(shown(name, value) for name, value in numbers.items() if name in SHOWN)
            if not text:
                return
            if any(name.startswith("eval_") for name in numbers) or not self._bar.console.is_terminal:
                self._bar.console.print(f"step {step}/{self._steps}: {text}")
            else:
                self._bar.update(self._task, description=text)

    def tick(self, step: int) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line for people."""
        if self._bar is not None:
            self._bar.console.print(text)

    def stop(self) -> None:
        """The loop ends; lines may still come."""
        if self._bar is not None:
            self._bar.stop()

    def close(self) -> None:
        """The end."""
        self.stop()
        if self._file is not None:
            self._file.close()
            for _, end in self._trackers:
                end()
            self._trackers.clear()
            self._bar, self._file = None, None


def up_to(file: Path, step: int) -> None:
    """Leave only the lines of a metrics file up to a step; one that was cut off goes, too."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step(line) <= step]
    if kept != lines:
        part = file.with_name(f"{file.name}.part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(file)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


SHOWN = {
    "loss": "loss {:.4g}", "grad_norm": "gradient norm {:.3g}", "items_per_second": "{:,.0f} items/s",
    "model_flops_utilisation": "MFU {:.1%}", "eval_loss": "eval loss {:.4g}", "eval_perplexity": "perplexity {:.4g}",
    "eval_accuracy": "accuracy {:.1%}",
}  # fmt: skip
"""What the console says of a line."""


def shown(name: str, value: float) -> str:
    """A number for people."""
    return SHOWN.get(name, name + " {:.4g}").format(value)


def _bar() -> Progress:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
