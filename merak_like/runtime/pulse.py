"""Signs of life: every rank counts on in the job's store, so that the rank to blame can be named.

When one rank dies, its neighbours lose their connection to it, give up and end, and so do theirs: what a rank sees is
often only the last link of a chain. The one to blame is the rank that stopped counting without having given up.
"""

from __future__ import annotations

import time
from typing import Any

INTERVAL = 0.5
"""Seconds from one count to the next."""
PATIENCE = 6 * INTERVAL
"""Seconds without a count after which a rank counts as lost."""
GAVE_UP = "gave up"
"""Noted by a rank that ends because of another one."""


class Pulse:
    """One rank's view of who is alive. ``store`` is a ``torch.distributed`` store that all ranks reach."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.note("")
        self.beat()

    def beat(self) -> None:
        """Count on."""
        self.store.add(f"beat/{self.rank}", 1)

    def note(self, why: str) -> None:
        """Leave a word for the others on how this rank ended; empty takes it back."""
        self.store.set(f"note/{self.rank}", why)

    def alarm(self) -> None:
        """Ask every rank to look around now, while all that can still count do so."""
        self.store.set("alarm", "on")

    def alarmed(self) -> bool:
        """Whether a rank has lost another one."""
        return self.store.check(["alarm"])

    def look(self) -> str:
        """Watch the others for a while; who is to blame, or nothing if all are well."""
        before = self._counts()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(INTERVAL)
            self.beat()
        after = self._counts()
        found = []
        for rank in range(self.size):
            note = self._get(f"note/{rank}")
            if note and note != GAVE_UP:
                found.append(f"rank {rank} failed with {note}")
            elif before[rank] == after[rank] and not note and rank != self.rank:
                found.append(f"rank {rank} gives no sign of life: it was killed, is frozen or cut off")
        return "; ".join(found)

    def _counts(self) -> list[str]:
        return [self._get(f"beat/{rank}") for rank in range(self.size)]

    def _get(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""
