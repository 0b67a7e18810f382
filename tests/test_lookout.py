"""What a run watches itself with, as far as a machine without a GPU can tell; more is in the tests of the trainer."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import _compat
from merak_like.trainer import lookout
from merak_like.trainer.lookout import Profiling, check
from merak_like.trainer.settings import Profile


def test_memory_of_gpus_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    for name in ("_record_memory_history", "_dump_snapshot"):
        given = inspect.signature(getattr(torch.cuda.memory, name)).bind
        monkeypatch.setattr(torch.cuda.memory, name, lambda *args, given=given: said.append(given(*args).arguments))
    _compat.record_memory("all")
    _compat.dump_memory("snapshot")
    _compat.record_memory("state")
    _compat.record_memory(None)
    assert said == [{"enabled": "all"}, {"filename": "snapshot"}, {"enabled": "state"}, {"enabled": None}]


def test_memory_of_a_gpu_is_recorded_beside_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that is not here: it begins with the first step asked for and is written at the end."""
    said: list[Any] = []
    monkeypatch.setattr(lookout, "record_memory", said.append)
    monkeypatch.setattr(lookout, "dump_memory", lambda path: said.append(path.name))
    monkeypatch.setattr(lookout, "profile", lambda **asked: Recorder(said))
    engine: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cuda"), rank=3))
    profiling = Profiling(Profile(at=2, steps=2), engine, tmp_path)
    for step in range(1, 5):
        said.append(step)
        profiling.step_begin()
        profiling.step_end()
    profiling.end()
    assert said == [1, 2, "all", "start", 3, "stop", "rank-3.json", "rank-3.memory", "state", 4]


def test_rank_whose_weights_differ_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other ranks say is made up here; test_faults has four of them."""
    world, watch = SimpleNamespace(alone=False, size=3), SimpleNamespace(waiting=lambda what: nullcontext())
    engine: Any = SimpleNamespace(
        world=world, _watch=watch, _shards=SimpleNamespace(label=str), _parameters={"w": nn.Parameter(torch.ones(3))}
    )
    odd: dict[str, int] = {}

    def gather(said: list[Any], mine: dict[str, int]) -> None:
        said[:] = [mine, {**mine, **odd}, mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    check(engine, 4)
    odd["w"] = 7
    with pytest.raises(RuntimeError, match=r"after step 5 the ranks do not hold the same .*: rank 1 has its own w "):
        check(engine, 5)


class Recorder:
    """Stands in for torch's profiler."""

    def __init__(self, said: list[Any]) -> None:
        self._said = said

    def start(self) -> None:
        self._said.append("start")

    def stop(self) -> None:
        self._said.append("stop")

    def export_chrome_trace(self, path: str) -> None:
        self._said.append(Path(path).name)
