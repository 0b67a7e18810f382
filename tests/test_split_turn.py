"""Whose turn it is: one at a time, first come first served, and each knows how long it stood in line."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from merak_like.split.turn import Turn


def test_a_session_counts_its_own_waits_and_nobody_elses():
    """However long the host has been up: the last waits of all are kept, not those of each."""
    turn = Turn(torch.device("cpu"))
    turn.waited.extend([0.0] * 20_000)  # the last ones are kept
    all_here = threading.Barrier(3)

    def work(_: int) -> float:
        before = turn.queued
        all_here.wait(10)
        with turn.held():
            time.sleep(0.05)
        return turn.queued - before

    with ThreadPoolExecutor(3) as pool:
        first, second, third = sorted(pool.map(work, range(3)))
    assert first < 0.04 < second
    assert third > second + 0.02
    assert turn.queued == 0.0
    assert turn.turns == 3
    assert turn.seconds == pytest.approx(first + second + third)
