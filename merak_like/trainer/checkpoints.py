"""The checkpoints of a run: what ``Engine.save`` keeps, the loop's state beside it, and which of them a run takes up.

run/checkpoints/step-00000200     whole or not there
run/checkpoints-1/                of a run that was begun anew in this folder, or of steps that were gone back on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from merak_like.runtime import collect
from merak_like.runtime.checkpoint import folder as files
from merak_like.runtime.checkpoint.contents import Restored
from merak_like.runtime.engine import Engine
from merak_like.trainer.settings import Checkpoints

LOOP = "trainer"
"""The loop's part of a checkpoint's state."""
Resume = bool | Literal["auto"] | str | Path
"""False: begin anew. True: go on; "auto": where there is something to go on from. Or the folder of a checkpoint or run.

Ranks that torchrun starts again go on from what their run has, whatever was asked.
"""


class Checkpointer:
    """Saves and finds the checkpoints of one run. Every rank makes the same calls."""

    def __init__(self, engine: Engine, run: Path, asked: Checkpoints) -> None:
        self.engine, self.folder, self.asked = engine, run / "checkpoints", asked

    def save(self, loop: Mapping[str, Any], best: int | None, *, background: bool) -> None:
        """Write the job as it is, or copy it and leave the writing to a thread; ``best`` is a step to keep."""
        spare = () if best is None else (best,)
        state = {LOOP: loop}
        self.engine.save(self.folder, state=state, background=background, keep=self.asked.keep, spare=spare)

    def resume(self, asked: Resume) -> Restored | None:
        """Bring the engine to a checkpoint; None where the run begins anew.

        Raises ValueError where there is nothing to go on from, and CheckpointError where all there is is damaged.
        """
        again = self.engine.world.restarted(str(self.folder))
        if again or asked in (True, "auto"):
            found = self.engine.resume(self.folder)
            if found is not None:
                return self._of_a_trainer(found)
            if asked is True:
                raise ValueError(
                    f"there is no checkpoint in {self.folder} to resume from: say checkpoints.resume=auto to begin "
                    "anew where there is none"
                )
        if asked in (True, False, "auto"):
            return None
        return self._of_a_trainer(self.engine.load(within(Path(asked))))

    def begin(self) -> None:
        """Let a later start of this job know that this run has begun; every rank calls, when all have resumed."""
        self.engine.world.begin(str(self.folder))

    def load(self, step: int, folder: str | None) -> bool:
        """Bring the engine to the checkpoint of a step, of this run or in a folder; False if it is not there."""
        self.engine.saved()
        there = Path(folder) if folder else self.folder
        path = collect.from_first(
            (lambda: next((path for path in files.candidates(there) if files.step_of(path) == step), None))
            if self.engine.world.rank == 0 else None, self.engine.world, self.engine._watch,
        )  # fmt: skip
        return path is not None and self.engine.load(path).step == step

    def own(self, restored: Restored | None) -> bool:
        """Whether that is a checkpoint of this run."""
        return restored is not None and restored.path.resolve().parent == self.folder.resolve()

    def go_back(self, step: int) -> Path | None:
        """Set aside what is newer than a step, for one rank to call; where it went."""
        later = [path for path in files.candidates(self.folder) if files.step_of(path) > step]
        if not later:
            return None
        aside = free(self.folder)
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        return aside

    @staticmethod
    def _of_a_trainer(found: Restored) -> Restored:
        if LOOP not in found.state:
            raise ValueError(
                f"{found.path} was written by engine.save and knows nothing of the loop, it has {sorted(found.state)}: "
                "take it up with engine.load, or start from its weights with model.path"
            )
        return found


def within(folder: Path) -> Path:
    """Where the checkpoints are that a folder means: a run's, or itself."""
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Give what an earlier run left in a folder another name, so that two runs are not taken for one."""
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(free(folder / name))


def free(path: Path) -> Path:
    """The first of its numbered names that nothing has."""
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, 10**6))
    return next(name for name in names if not name.exists())
