"""Tracing beside other threads."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from merak_like.partitioner.tracer import trace
from merak_like.partitioner.tracer.fakes import clean_caches
from tests.test_tracer import MLP, WIDTH, seen, square


def test_threads_take_turns() -> None:
    """Two traces at once saw each other's functions: a host and an edge in one process failed at random."""
    models = [MLP(depth=depth) for depth in (4, 6, 4, 8)]
    example = {"x": torch.ones(3, WIDTH)}

    def traced(i: int) -> Any:
        return seen(trace(models[i], example, square))

    expected = [traced(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(traced, range(4))) == expected


def test_other_threads_make_their_tuples_while_caches_are_looked_for() -> None:
    """A tuple that is half made when all objects are listed has a second owner: CPython refuses to go on with it."""
    over, failed, made = threading.Event(), list[str](), [0]

    def make() -> None:
        while not over.is_set():
            try:
                made[0] += len(tuple(i for i in range(50)))
            except SystemError as error:
                failed.append(str(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=make)
    thread.start()
    try:
        for _ in range(4):
            with clean_caches():
                pass
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()
    assert made[0] > 0
    assert failed == []
