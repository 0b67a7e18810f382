"""What lets a job outlive its processes: checkpoints, and a polite end when a signal asks for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merak_like.runtime.checkpoint.contents import Contents, Restored
from merak_like.runtime.checkpoint.saver import Checkpoints
from merak_like.runtime.initialize import World
from merak_like.runtime.signals import Signals
from merak_like.runtime.watch import Watch


@dataclass
class Count:
    """Steps that a job has done: the one count, so that all that depends on it goes on with a checkpoint."""

    done: int = 0


class Lasting:
    """The part of an engine that saves and takes up. Every rank makes the same calls."""

    def __init__(self, contents: Contents, world: World, watch: Watch, count: Count | None = None) -> None:
        """``count`` is shared with what must know the step too."""
        self._count = Count() if count is None else count
        self.stopping = False
        """Whether a rank was sent one of the signals of ``stop_at``: true on all ranks after the same step."""
        self._checkpoints, self._watch = Checkpoints(contents, world, watch), watch
        self._signals = Signals()

    @property
    def steps(self) -> int:
        """Steps done, those before a checkpoint that was taken up included."""
        return self._count.done

    @steps.setter
    def steps(self, done: int) -> None:
        self._count.done = done

    def save(
        self, folder: str | Path, *, state: Mapping[str, Any] | None = None, background: bool = False,
        keep: int | None = None, spare: Collection[int] = (),
    ) -> Path | None:  # fmt: skip
        """Write all that training needs to go on exactly to ``folder/step-N``; every rank calls it.

        ``state`` is kept beside it: values, and objects with ``state_dict`` and ``load_state_dict`` such as a learning
        rate schedule; of each key that of the first rank that has it. With ``background`` it is copied and written
        while training goes on; the next update waits for the copy, so change nothing by hand before. What fails then is
        raised by the next ``save``, ``saved`` or ``close``. ``keep`` removes all but so many complete checkpoints, and
        those of the steps in ``spare``. Returns the checkpoint, or None while it is being written.
        """
        self._open()
        return self._checkpoints.save(
            Path(folder), self.steps, state or {}, background=background, keep=keep, spare=spare
        )

    def saved(self) -> Path | None:
        """Wait for what ``save`` writes in the background; the last checkpoint written."""
        return self._checkpoints.wait()

    def load(self, folder: str | Path, *, state: Mapping[str, Any] | None = None) -> Restored:
        """Go on from a checkpoint, or from the newest whole one in a folder, whatever layout wrote it.

        Objects in ``state`` get back what they had. Raises ValueError if there is none, or it is not of this job, and
        CheckpointError if none is whole.
        """
        restored = self.resume(folder, state=state)
        if restored is None:
            raise ValueError(f"there is no checkpoint in {folder}: give the folder that engine.save was given")
        return restored

    def resume(self, folder: str | Path, *, state: Mapping[str, Any] | None = None) -> Restored | None:
        """As ``load``, but None where there is no checkpoint yet."""
        self._open()
        restored = self._checkpoints.load(Path(folder), state or {})
        self.steps = self.steps if restored is None else restored.step
        return restored

    def stop_at(self, *signals: int) -> None:
        """Do not end when this process is sent one of these signals, but let ``stopping`` say so on every rank."""
        self._open()
        self._signals.listen(*signals)

    def heed(self, signals: Signals) -> None:
        """As ``stop_at``, with signals that somebody listened to before there was an engine, and their handlers."""
        self._open()
        self._signals.close()
        self._signals = signals

    def _end(self) -> None:
        self._signals.close()
        self._checkpoints.close()

    def _open(self) -> None:
        if self._watch.closed:
            raise ValueError("this engine was closed: build another with auto_parallel")
