"""Checkpoints that were not written to their end, or damaged later: noticed, named, and the one before is used."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import Engine, auto_parallel
from merak_like.runtime.checkpoint import folder as files
from merak_like.runtime.checkpoint.folder import CheckpointError, Manifest
from merak_like.runtime.checkpoint.saver import Checkpoints
from tests.faults import items, small

KILLED = 9


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One process's engine."""
    made = small(1, 1, depth=3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def reader() -> Iterator[Engine]:
    """Another engine, which only loads."""
    made = small(1, 1, depth=3)
    yield made
    made.close()


@pytest.fixture
def two(engine: Engine, tmp_path: Path) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """Checkpoints of two steps, and the weights that belong to them."""
    weights = {}
    for _ in range(2):
        engine.step(items())
        engine.save(tmp_path / "run")
        weights[engine.steps] = {k: v.clone() for k, v in engine.full_state_dict().items()}
    return tmp_path / "run", weights


class Stream:
    """A file whose writes count; the last one before the end writes half."""

    def __init__(self, stream: Any, count: Callable[[Callable[[], None]], None]) -> None:
        self._stream, self._count = stream, count

    def write(self, data: Any) -> int:
        def half() -> None:
            self._stream.write(bytes(data)[: len(bytes(data)) // 2])
            self._stream.flush()

        self._count(half)
        return self._stream.write(data)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Killing:
    """Ends this process as SIGKILL would, at a given one of its operations on files."""

    def __init__(self, at: int | None = None) -> None:
        self.done, self.at = 0, at

    def count(self, before: Callable[[], None] = lambda: None) -> None:
        """One operation is about to begin."""
        if self.done == self.at:
            before()
            os._exit(KILLED)
        self.done += 1

    def install(self) -> None:
        """Count every write, sync, rename, removal and new folder from now on."""
        opened = Path.open

        def open_counted(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
            stream = opened(path, mode, *more, **options)
            return Stream(stream, self.count) if "w" in mode else stream

        Path.open = open_counted  # type: ignore[method-assign, assignment]
        os.fsync = self._counted(lambda handle: None)  # the system does not die with this process
        for name in ("mkdir", "rename", "unlink", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count()
            return function(*arguments, **options)

        return counted


def in_child(work: Callable[[], int]) -> int:
    """Do something in a copy of this process; what it returned, or how it ended."""
    child = os.fork()
    if not child:
        try:
            os._exit(work())
        except BaseException:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_process_killed_at_any_write_leaves_a_checkpoint_that_can_be_used(
    engine: Engine, reader: Engine, two: tuple[Path, dict[int, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """Also at the removal of an old one (``keep``), and with what an earlier death left half-written lying about."""
    run, weights = two
    counted = tmp_path / "operations"

    def save(killing: Killing) -> int:
        killing.install()
        engine.save(run, keep=2)
        counted.write_text(str(killing.done))
        return 0

    engine.step(items())
    last = engine.steps
    weights[last] = {k: v.clone() for k, v in engine.full_state_dict().items()}
    shutil.copytree(run, tmp_path / "copy")
    assert in_child(lambda: save(Killing())) == 0
    total = int(counted.read_text())
    assert [path.name for path in files.candidates(run)] == [f"step-{n:08d}" for n in (last, last - 1)]
    trials = [*range(0, total - 30, total // 56), *range(total - 30, total)]
    assert len(trials) >= 80
    ends: set[int] = set()
    for at in trials:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "copy", run)
        if at % 2:
            shutil.copytree(run / f"step-{last - 1:08d}", run / f"saving-{last:08d}")
        assert in_child(lambda at=at: save(Killing(at))) == KILLED
        restored = reader.load(run)
        assert not restored.damaged, "what was not finished must not look like a checkpoint"
        ends.add(restored.step)
        state = reader.full_state_dict()
        assert all(torch.equal(state[k], v) for k, v in weights[restored.step].items())
    assert ends == {last - 1, last}, "before its rename it is not there, after it it is"
    written = engine.save(run, keep=1)
    assert list(run.iterdir()) == [written], "what earlier deaths left is removed"


def damages(path: Path, source: random.Random, trials: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Ways to spoil a checkpoint: every file cut, changed in one bit, or gone."""
    names = sorted(file.name for file in path.iterdir())
    for number in range(trials):
        file = path / names[number % len(names)]
        size = file.stat().st_size
        kind = ("cut", "flip", "gone")[0 if number % 2 else 1 if number % 22 else 2]

        def cut(file: Path = file, size: int = source.randrange(size)) -> None:
            with file.open("r+b") as stream:
                stream.truncate(size)

        def flip(file: Path = file, bit: int = source.randrange(8 * size)) -> None:
            data = bytearray(file.read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)

        yield file.name, {"cut": cut, "flip": flip, "gone": file.unlink}[kind]


def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(
    engine: Engine, reader: Engine, two: tuple[Path, dict[int, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    run, weights = two
    newest = files.candidates(run)[0]
    step = engine.steps
    shutil.copytree(newest, tmp_path / "copy")
    for name, damage in damages(newest, random.Random(0), 132):
        damage()
        restored = reader.load(run)
        assert restored.step == step - 1
        (told,) = restored.damaged
        assert name in told, (name, told)
        assert str(newest) in told
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "copy", newest)
    state = reader.full_state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights[step - 1].items())
    assert reader.load(run).step == step


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_told_apart(
    engine: Engine, two: tuple[Path, dict[int, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    run, _ = two
    for path in files.candidates(run):
        (path / "job.pt").write_bytes(b"")
    before = engine.full_state_dict()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*step-.*job.pt has 0 bytes instead"):
        engine.load(run)
    with pytest.raises(CheckpointError, match=r"job.pt has 0 bytes"):
        engine.resume(run)
    assert all(torch.equal(v, before[k]) for k, v in engine.full_state_dict().items())
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        engine.load(tmp_path / "nowhere")
    assert engine.resume(tmp_path / "nowhere") is None


def test_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / files.MANIFEST).write_text(Manifest(1, {}, {}, version=99).text())
    with pytest.raises(CheckpointError, match=r"has version 99, this merak_like reads version 1"):
        Manifest.read(tmp_path)


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(engine: Engine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = engine.save(run)
    engine.step(items())
    second = engine.save(run)
    assert first is not None
    assert second is not None
    (second / "job.pt").write_bytes(b"")
    engine.step(items())
    third = engine.save(run, keep=2)
    assert files.candidates(run) == [third, second, first]


def test_write_that_fails_in_the_background_is_raised_by_the_next_call(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        assert engine.save(tmp_path / "run", background=True) is None
        with pytest.raises(CheckpointError, match=r"rank 0 could not start checkpoint \d+: OSError: .*No space left"):
            engine.saved()
    assert engine.save(tmp_path / "run", background=True) is None
    written = engine.saved()
    assert written is not None
    assert files.candidates(tmp_path / "run") == [written]


def test_only_what_a_forward_changes_is_copied_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights, nearly all of a model that learns by LoRA, used to be copied in the call."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    engine = auto_parallel(
        model, example=torch.randn(4, 4), loss_fn=lambda out, batch: (out - batch).square().mean(),
        optimizer=torch.optim.SGD, hardware="a100-80gb", device="cpu",
    )  # fmt: skip
    copied: dict[bool, set[str]] = {True: set(), False: set()}
    copy = Checkpoints._copy

    def noted(self: Checkpoints, held: Any) -> Any:
        copied[threading.current_thread() is threading.main_thread()] |= {one.key for one in held}
        return copy(self, held)

    monkeypatch.setattr(Checkpoints, "_copy", noted)
    engine.save(tmp_path, background=True)
    engine.saved()
    engine.close()
    assert copied[True] == {f"model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert copied[False] == {f"model.{name}" for name, _ in model.named_parameters()}


def test_update_waits_until_what_is_written_in_the_background_is_copied(
    engine: Engine, reader: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is made beside the next forward and backward; here it is so slow that the update would be first."""
    late, copy = [], Checkpoints._copy

    def slow(self: Checkpoints, held: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
            late.append(time.monotonic())
        return copy(self, held)

    monkeypatch.setattr(Checkpoints, "_copy", slow)
    engine.step(items())
    before = {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}
    engine.save(tmp_path / "run", background=True)
    engine.step(items(seed=1))
    assert late, "the step was done before the copy began"
    assert any(not torch.equal(tensor, before[name]) for name, tensor in engine.full_state_dict().items())
    engine.saved()
    reader.load(tmp_path / "run")
    assert all(torch.equal(tensor, before[name]) for name, tensor in reader.full_state_dict().items())
