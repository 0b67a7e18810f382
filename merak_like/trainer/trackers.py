"""Where numbers go besides ``metrics.jsonl``: trackers that are used when they are installed and asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

Log = Callable[[Mapping[str, float], int], None]
"""Take the numbers of a step."""
Tracker = tuple[Log, Callable[[], None]]
"""How to log, and how to end."""


def tensorboard(folder: Path, project: str, settings: Mapping[str, Any]) -> Tracker:
    """Event files in ``<folder>/tensorboard``."""
    writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def wandb(folder: Path, project: str, settings: Mapping[str, Any]) -> Tracker:
    """A run of Weights & Biases, named like the folder."""
    run = _module("wandb", "wandb").init(project=project, name=folder.name, dir=str(folder), config=dict(settings))
    return (lambda numbers, step: run.log(dict(numbers), step=step)), run.finish


def mlflow(folder: Path, project: str, settings: Mapping[str, Any]) -> Tracker:
    """A run of MLflow, named like the folder."""
    module = _module("mlflow", "mlflow")
    module.set_experiment(project)
    module.start_run(run_name=folder.name)
    return (lambda numbers, step: module.log_metrics(dict(numbers), step=step)), module.end_run


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
}
"""A tracker by the name that ``logging.trackers`` has for it."""


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"logging.trackers has {package!r}, but {error}: pip install {package}, or leave it out"
        ) from None
