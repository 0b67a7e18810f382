"""Saving and loading: what the ranks do together so that a checkpoint is whole or not there.

Torch's format is imported when something is written or read: it needs ``torch.distributed``, which torch may have been
built without, and an engine of one process does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from merak_like import __version__
from merak_like.runtime.checkpoint import folder as files
from merak_like.runtime.checkpoint.boxes import Held
from merak_like.runtime.checkpoint.contents import Contents, Restored
from merak_like.runtime.checkpoint.folder import CheckpointError, Manifest
from merak_like.runtime.checkpoint.memories import KIND
from merak_like.runtime.checkpoint.packing import give_back, pack, refuse_missing, unpack
from merak_like.runtime.groups import Group, files_group
from merak_like.runtime.initialize import World
from merak_like.runtime.signals import give_way
from merak_like.runtime.watch import Watch

Join = Callable[[list[Any]], list[Any]]
"""What all ranks told, by rank, to what each shall get."""


class Checkpoints:
    """Writes and reads the checkpoints of one engine; one is written at a time."""

    def __init__(self, contents: Contents, world: World, watch: Watch) -> None:
        self._contents, self._world, self._watch = contents, world, watch
        self._group: Group = None
        self._thread: threading.Thread | None = None
        self._written: Path | None = None
        self._error: Exception | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._room: dict[str, torch.Tensor] = {}
        """Memory of the last copy, for the next one: to get it anew costs as much as to fill it."""

    # --- saving --------------------------------------------------------------------------------------------------

    def save(
        self, folder: Path, step: int, state: Mapping[str, Any], *, background: bool, keep: int | None,
        spare: Collection[int] = (),
    ) -> Path | None:  # fmt: skip
        """Write a checkpoint, or copy what goes into it and leave the writing to a thread."""
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: at least the checkpoint that is being written must stay")
        self.wait()
        self._join_group()
        held, facts = self._contents.written(), self._contents.facts(state)
        if not background:
            return self._write(folder, step, held, facts, keep, spare)
        changing = {self._contents.key(name) for name in self._contents.buffers}
        early = [i for i, one in enumerate(held) if one.key in changing]
        for i, one in zip(early, self._copy([held[i] for i in early]), strict=True):
            held[i] = one  # buffers change in a forward, all else in an update at most, which waits: see ``settle``
        early += [i for i, one in enumerate(held) if one.key.startswith(f"{KIND}.")]  # which are copies
        self._copied.clear()
        work = lambda: self._in_thread(folder, step, held, early, facts, keep, spare)  # noqa: E731
        self._thread = threading.Thread(target=work, name="merak-checkpoint")
        self._thread.start()
        return None

    def wait(self) -> Path | None:
        """Wait for what is being written; the last checkpoint. Raises what its writing failed with, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._written

    def close(self) -> None:
        """Wait, and let go of the group."""
        try:
            self.wait()
        finally:
            self._room.clear()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def settle(self) -> None:
        """Wait until what is being written no longer needs the weights and the optimizer's state."""
        self._copied.wait()

    def _in_thread(
        self, folder: Path, step: int, held: list[Held], early: list[int], facts: Any, keep: int | None,
        spare: Collection[int],
    ) -> None:  # fmt: skip
        try:
            late = sorted({*range(len(held))} - {*early})
            for i, one in zip(late, self._copy([held[i] for i in late]), strict=True):
                held[i] = one
            self._copied.set()
            give_way()
            self._write(folder, step, held, facts, keep, spare)
        except Exception as error:
            self._error = error
        finally:
            self._copied.set()

    def _copy(self, held: list[Held]) -> list[Held]:
        copies = []
        for one in held:
            made = []
            for part in one.parts:
                key = f"{one.key} {part.start}"
                room = self._room.get(key)
                if room is None or room.shape != part.tensor.shape or room.dtype != part.tensor.dtype:
                    room = self._room[key] = torch.empty_like(part.tensor, device="cpu")
                made.append(part._replace(tensor=room.copy_(part.tensor)))
            copies.append(one._replace(parts=tuple(made)))
        return copies

    def _write(
        self, folder: Path, step: int, held: list[Held], facts: Any, keep: int | None, spare: Collection[int]
    ) -> Path:  # fmt: skip
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        from merak_like.runtime.checkpoint.planners import Writing

        planner = Writing(held)
        about = {"model": self._contents.plan.model, "mesh": str(self._contents.plan.mesh),
                 "merak_like": __version__, "torch": torch.__version__}  # fmt: skip
        plan = planner.create_local_plan()

        def start(told: list[Any]) -> list[Any]:
            place = files.begin(folder, step)
            job = pack("the state of the job", Contents.joined([one for one, _ in told], step))
            files.write(place / files.JOB, job)
            plans, metadata = planner.create_global_plan([one for _, one in told])
            plans = FileSystemWriter(place).prepare_global_plan(plans)
            return [(place, plan, metadata if rank == 0 else None) for rank, plan in enumerate(plans)]

        place, plan, metadata = self._together(f"start checkpoint {step}", lambda: (facts, plan), start)
        writer = FileSystemWriter(place)

        def data() -> Any:
            if not plan.items:
                return [], {}
            results = writer.write_data(planner.finish_plan(plan), planner).value()
            names = {result.storage_data.relative_path for result in results}
            return results, {name: files.fingerprint(place / name) for name in sorted(names)}

        def finish(told: list[Any]) -> list[Any]:
            writer.finish(metadata, [results for results, _ in told])
            names = {name: digest for _, one in told for name, digest in one.items()}
            names |= {name: files.fingerprint(place / name) for name in (files.JOB, ".metadata")}
            made = files.commit(place, Manifest(step, about, names))
            if keep is not None:
                files.prune(folder, keep, spare)
            return [made] * len(told)

        written: Path = self._together(f"write checkpoint {step}", data, finish)
        self._written = written
        return written

    # --- loading -------------------------------------------------------------------------------------------------

    def load(self, folder: Path, state: Mapping[str, Any]) -> Restored | None:
        """Take up the newest checkpoint that is whole; None if there is none at all.

        Raises CheckpointError if there are some and none can be used.
        """
        self.wait()
        self._join_group()
        damaged: list[str] = []
        first: Join = lambda told: told[:1] * len(told)  # noqa: E731
        for path in self._together("look for checkpoints", lambda: files.candidates(folder), first):
            wrong = self._together(f"check {path}", lambda path=path: self._problem(path), self._worst)
            if not wrong:
                return self._take_up(path, state, tuple(damaged))
            damaged.append(wrong)
        if damaged:
            raise CheckpointError(f"no checkpoint in {folder} can be used: " + "; ".join(damaged))
        return None

    def _problem(self, path: Path) -> str:
        """What is wrong with a checkpoint, as far as this rank looks: the files are shared out."""
        try:
            listed = sorted(Manifest.read(path).files.items())
        except CheckpointError as error:
            return str(error)
        mine = listed[self._world.rank :: self._world.size]
        return next((wrong for name, said in mine if (wrong := files.problem(path, name, said))), "")

    @staticmethod
    def _worst(told: list[str]) -> list[str]:
        return [next(filter(None, told), "")] * len(told)

    def _take_up(self, path: Path, state: Mapping[str, Any], damaged: tuple[str, ...]) -> Restored:
        from merak_like.runtime.checkpoint.planners import Saved
        from merak_like.runtime.checkpoint.restoring import Restoring

        job, saved = unpack((path / files.JOB).read_bytes()), Saved(path)
        found = {key: unpack(data) for key, data in job["state"].items()}

        restoring = Restoring(self._contents, saved, job)

        def check() -> None:
            refuse_missing(found, state)
            restoring.check()

        self._together(f"take up {path}", check)
        self._together(f"read {path}", restoring.read)
        restoring.adopt(self._world.rank)
        give_back(found, state)
        return Restored(path, job["step"], found, damaged)

    # --- together ------------------------------------------------------------------------------------------------

    def _join_group(self) -> None:
        if self._group is None and not self._world.alone:
            self._group = files_group(self._world)

    def _together(
        self, what: str, mine: Callable[[], Any], join: Callable[[list[Any]], list[Any]] | None = None
    ) -> Any:
        """Each rank does its own part, rank 0 joins them, and each gets its own answer.

        What fails anywhere is raised everywhere: ValueError for what the user gave, else CheckpointError.
        """
        told = self._gather(what, _attempt(mine))
        answers: list[Any] = []
        if self._world.rank == 0:
            values, failed = (
                [value for value, _ in told],
                [(rank, error) for rank, (_, error) in enumerate(told) if error],
            )
            joined, error = (None, None) if failed or join is None else _attempt(lambda: join(values))
            rank, error = failed[0] if failed else (0, error)
            if error:
                kind, words = error
                error = (kind, words if kind is ValueError else f"rank {rank} could not {what}: {words}")
            answers = [(one, error) for one in joined or [None] * self._world.size]
        value, error = self._scatter(what, answers)
        if error:
            kind, words = error
            raise kind(words)
        return value

    def _gather(self, what: str, mine: Any) -> list[Any]:
        if self._world.alone:
            return [mine]
        everyone: list[Any] | None = [None] * self._world.size if self._world.rank == 0 else None
        with self._waiting(f"all ranks to {what}"):
            dist.gather_object(mine, everyone, dst=0, group=self._group)
        return everyone or []

    def _scatter(self, what: str, answers: list[Any]) -> Any:
        if self._world.alone:
            return answers[0]
        mine: list[Any] = [None]
        with self._waiting(f"rank 0 to {what}"):
            dist.scatter_object_list(mine, answers or None, src=0, group=self._group)
        return mine[0]

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """The watch tells of one wait at a time, that of the training; the group's own limit ends a thread's."""
        if threading.current_thread() is not self._thread:
            with self._watch.waiting(what):
                yield
            return
        try:
            yield
        except RuntimeError as error:
            text = str(error).strip().splitlines()[0][:200]
            raise CheckpointError(f"rank {self._world.rank} gave up waiting for {what}: {text}") from None


Failure = tuple[type[Exception], str] | None


def _attempt(work: Callable[[], Any]) -> tuple[Any, Failure]:
    """The result of some work, or what it failed with in a form that can travel."""
    try:
        return work(), None
    except ValueError as error:
        return None, (ValueError, str(error))
    except Exception as error:
        words = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        return None, (CheckpointError, words)
