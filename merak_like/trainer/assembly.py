"""From settings and data to an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merak_like.api import auto_parallel
from merak_like.deciding import alone
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.text import parse_bytes
from merak_like.runtime.engine import Engine
from merak_like.runtime.shortage import NoMemory
from merak_like.trainer.data.loader import Samples, Share
from merak_like.trainer.deepspeed import engine_arguments
from merak_like.trainer.groups import optimizer_factory
from merak_like.trainer.methods import methods_of
from merak_like.trainer.reading import Reading
from merak_like.trainer.settings import Parallelism, Settings, Training


def check(args: Settings, eval_dataset: Samples | None) -> None:
    """Raise ValueError for settings that contradict each other or the data."""
    if eval_dataset is None and (args.evaluation.every or args.checkpoints.best):
        asked = "evaluation.every" if args.evaluation.every else "checkpoints.best"
        raise ValueError(f"{asked} is set, but there is no eval_dataset to look at")


def assembled(
    model: nn.Module, args: Settings, example: Any, loss_fn: Any, loss_weight: Any, learns: Mapping[str, Any],
    weights: Any,
) -> Engine:  # fmt: skip
    """What ``auto_parallel`` makes of the settings, and of what they say of learning (``engine_arguments``)."""
    asked = args.parallelism
    return auto_parallel(
        model, asked.dp, asked.pp, asked.tp, example=example, loss_fn=loss_fn, loss_weight=loss_weight,
        optimizer=learns["optimizer"] or optimizer_factory(model, args.optimizer), schedule=asked.schedule,
        chunks=asked.chunks, recompute=asked.recompute, micro_batches=learns["micro_batches"],
        max_grad_norm=learns["max_grad_norm"], weights=weights, plan=Plan.load(asked.plan) if asked.plan else None,
        hardware=asked.hardware, memory_limit=_limit(asked), device=asked.device, timeout=asked.timeout,
        seed=args.training.seed, zero=learns["zero"], zero_backend=learns["zero_backend"],
        sequence_parallel=asked.sequence_parallel, tp_shares=asked.tp_shares, codec=asked.codec,
        fuse=asked.fuse, skip_not_finite=args.training.skip_bad_steps, precision=learns["precision"],
        methods=methods_of(args.methods),
    )  # fmt: skip


def steps_of(asked: Training, samples: int) -> int:
    """How many steps a run has."""
    return asked.steps or ceil((asked.epochs or 0) * samples / asked.batch)


def planned(model: nn.Module, args: Settings, example: Any, loss_fn: Any, steps: int) -> Plan:
    """The plan that ``assembled`` would come to, decided without ranks. Raises ValueError for degrees that are open."""
    asked = args.parallelism
    if asked.plan is not None:
        return Plan.load(asked.plan)
    if asked.ranks is None:
        raise ValueError(
            "a degree of auto is chosen when torchrun has started the ranks: say degrees for --dry-run, or see the "
            "choices with merak plan --world RANKS"
        )
    mesh = Mesh(**{axis: degree for axis, degree in asked.degrees.items() if isinstance(degree, int)})
    learns = engine_arguments(args, steps)
    with around(args):
        return alone(
            model, mesh, example, loss_fn=loss_fn, schedule=asked.schedule, chunks=asked.chunks,
            recompute=asked.recompute, micro_batches=learns["micro_batches"], tp_shares=asked.tp_shares,
            sequence_parallel=asked.sequence_parallel, fuse=asked.fuse, zero=learns["zero"],
            zero_backend=learns["zero_backend"], precision=learns["precision"], methods=methods_of(args.methods),
            hardware=asked.hardware, memory_limit=_limit(asked), codec=asked.codec,
        )  # fmt: skip


def _limit(asked: Parallelism) -> int | None:
    return parse_bytes(asked.memory_limit) if isinstance(asked.memory_limit, str) else asked.memory_limit


@contextmanager
def leaving_record(folder: Path) -> Iterator[None]:
    """Write down what was in memory when it ended."""
    try:
        yield
    except NoMemory as error:
        error.save(folder)
        raise


@contextmanager
def around(args: Settings) -> Iterator[None]:
    """What precision and repeatability need around everything that computes; where memory ends, a record is left."""
    kind = torch.device(args.parallelism.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    with (
        leaving_record(args.folder / "memory"),
        torch.autocast(kind, torch.bfloat16) if args.precision == "autocast" else nullcontext(),
    ):
        if not args.training.deterministic or torch.are_deterministic_algorithms_enabled():
            yield
            return
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def share(engine: Engine, samples: Samples, batch: int, reading: Reading) -> Share:
    """A replica reads only its own samples where that cannot change a shape, and so a number; a rank its values."""
    mesh = engine.plan.mesh
    own = mesh.dp > 1 and getattr(samples, "uniform", False) and batch % (mesh.dp * engine.plan.micro_batches) == 0
    return Share(engine.groups.coord.dp if own else 0, mesh.dp if own else 1, reading.names, engine.names.needed)


def restore_options(engine: Engine, fresh: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Give the optimizer's groups options of the settings back: a checkpoint brings those it was written with.

    ``fresh`` is empty where the settings did not make the optimizer.
    """
    groups = engine.optimizer.param_groups if engine.optimizer is not None and fresh else []
    for group, options in zip(groups, fresh, strict=True):
        group.update({name: options[name] for name in names if name in options})
