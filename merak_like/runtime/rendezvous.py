"""A name that all ranks of this start of a job share, and no earlier start had.

Torchrun keeps its store when it starts the ranks again, with the addresses of processes that are gone in it (torch
2.13), and its count of restarts differs from node to node. So the ranks agree on a name: each leaves a word that only
this process knows, and rank 0 answers to the word.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

PROCESS = uuid.uuid4().hex
"""A word that only this process knows, as long as it lives."""
PAUSE = 0.05
"""Seconds between two looks of rank 0."""


def agree_on_name(store: Any, rank: int, size: int, limit: timedelta) -> str:
    """The name, on every rank. Raises TimeoutError, naming the ranks that did not come, after the limit."""
    word = uuid.uuid4().hex
    store.set(f"merak/word/{rank}", word)
    if rank:
        try:
            store.wait([f"merak/answer/{word}"], limit)
        except RuntimeError:
            raise TimeoutError(f"rank {rank} waited {limit.total_seconds():.0f} s for rank 0 to start") from None
        name = store.get(f"merak/answer/{word}").decode()
        store.set(f"merak/came/{name}/{rank}", "")
        return name
    end = time.monotonic() + limit.total_seconds()
    answered: dict[int, str] = {}
    while missing := [other for other in range(1, size) if not store.check([f"merak/came/{word}/{other}"])]:
        if time.monotonic() > end:
            raise TimeoutError(f"rank 0 waited {limit.total_seconds():.0f} s for ranks {missing[:8]} to start")
        for other in missing:  # what it finds may be the word of an earlier start; then it looks again
            if store.check([f"merak/word/{other}"]):
                theirs = store.get(f"merak/word/{other}").decode()
                if answered.get(other) != theirs:
                    store.set(f"merak/answer/{theirs}", word)
                    answered[other] = theirs
        time.sleep(PAUSE)
    return word


def begun_before(store: Any, work: str) -> bool:
    """Whether other processes than this start's had begun this work of the job: a script may do several, by name.

    Torchrun's own count of restarts does not tell: it stays where it is when nodes come or go (torch 2.13).
    """
    return store.add(f"merak/begun/{work}", 0) > 0 and not store.check([f"merak/begun/{work}/{PROCESS}"])


def begin(store: Any, work: str) -> None:
    """Say that this start begins the work; every rank does, when all have asked whether it was begun."""
    store.set(f"merak/begun/{work}/{PROCESS}", "")
    store.add(f"merak/begun/{work}", 1)
