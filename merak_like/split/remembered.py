"""What an edge remembers besides its weights: its session's name, and the secret under which ids of samples travel."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path

from merak_like.split.messages import Task
from merak_like.split.outline import LEAST_ID


class Remembered:
    """An edge's ``session.json``."""

    def __init__(self, folder: Path, task: Task) -> None:
        """Of a folder that an edge before has used, or anew. Raises ValueError where that one had another task."""
        self.path, self.task = folder / "session.json", task
        self.session: str | None = None
        """The session's name on the host."""
        self._secret = secrets.token_bytes(16)
        if not self.path.is_file():
            return
        known = json.loads(self.path.read_text(encoding="utf-8"))
        if Task.model_validate(known["task"], strict=False) != task:
            raise ValueError(f"{self.path} belongs to another task: take another folder, or the task it was begun with")
        self.session, self._secret = known["session"], bytes.fromhex(known["secret"])

    def keep(self) -> None:
        """Write it down; it is there, synced, when this returns."""
        known = {"session": self.session, "secret": self._secret.hex(), "task": self.task.model_dump(mode="json")}
        draft = self.path.with_name(".session.json")
        draft.write_text(json.dumps(known), encoding="utf-8")
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.rename(self.path)

    def disguised(self, sample: int) -> int:
        """An id that is the same at every visit and says nothing of the sample, nor by its digits."""
        digest = hashlib.blake2b(str(int(sample)).encode(), key=self._secret, digest_size=8).digest()
        return LEAST_ID + int.from_bytes(digest, "little") % (9 * LEAST_ID)
