"""Steps side by side: an action of each in turn, whoever comes first, and what becomes of the others where one ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch

from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.runtime.recording import Observed
from merak_like.runtime.watch import PeerError
from merak_like.split.exchange import Exchange
from merak_like.split.pooled import AtCut
from merak_like.split.row import Row


class Steps(Observed):
    """An engine of three actions; the second may raise."""

    def __init__(self, name: str, log: list[str], error: Exception | None) -> None:
        self.name, self.log, self.error = name, log, error
        self._do = {Kind.F: self._forward}

    def _forward(self, action: Action) -> None:
        self.log.append(f"{self.name}{action.micro_batch}")
        if action.micro_batch == 1 and self.error is not None:
            raise self.error

    def run(self) -> None:
        for i in range(3):
            self._do[Kind.F](Action(Kind.F, i, 0))
        self.log.append(f"{self.name}.")


def beside(**errors: Exception | None) -> tuple[list[str], dict[str, BaseException]]:
    """What was done by these in a row, in which order, and what each ended with. RuntimeError breaks the row."""
    row, log = Row(len(errors), lambda error: isinstance(error, RuntimeError), 9.0), list[str]()

    def run(place: int, engine: Steps) -> None:
        with row.at(place, engine):
            engine.run()

    with ThreadPoolExecutor(len(errors)) as pool:
        steps = [(i, Steps(name, log, error)) for i, (name, error) in enumerate(errors.items())]
        runs = {engine.name: pool.submit(run, i, engine) for i, engine in reversed(steps)}
        assert not log  # nobody begins before all may
        row.begin()
        row.over()
        found = {name: one.exception(10) for name, one in runs.items()}
    return log, {name: error for name, error in found.items() if error is not None}


def test_an_action_of_each_in_turn():
    assert beside(a=None, b=None, c=None) == ("a0 b0 c0 a1 b1 c1 a2 b2 c2 a. b. c.".split(), {})


def test_who_ends_as_on_every_rank_leaves_the_others_at_it():
    wrong = ValueError("everybody has it")
    assert beside(a=None, b=wrong, c=None) == ("a0 b0 c0 a1 b1 c1 a2 c2 a. c.".split(), {"b": wrong})


def test_who_breaks_the_row_ends_it_for_all():
    log, errors = beside(a=None, b=RuntimeError("rank 1 is gone"))
    assert log == ["a0", "b0", "a1", "b1"]
    with pytest.raises(PeerError, match="a step beside this one broke the row: rank 1 is gone"):
        raise errors["a"]


def test_nobody_waits_for_a_turn_for_ever():
    row = Row(2, lambda error: isinstance(error, PeerError), 0.05)
    with pytest.raises(PeerError, match="the turn of step 1 did not come: the row was not begun for 0 s"):
        with row.at(1, Steps("b", [], None)):
            raise AssertionError("it has no turn yet")
    row = Row(2, lambda error: isinstance(error, PeerError), 0.05)
    row.begin()
    with pytest.raises(PeerError, match="the turn of step 1 did not come: step 0 is in one action"):
        with row.at(1, Steps("b", [], None)):
            raise AssertionError("step 0 never ended an action")
    with pytest.raises(PeerError, match="the row's end did not come"):
        row.over()


def test_who_brings_last_has_the_mean():
    """Replicas bring a round's micro-batches in any order."""
    ann, bob = (Exchange({}, 0, torch.device("cpu")) for _ in range(2))
    shared, x = AtCut([ann, bob]), torch.ones(2)
    assert shared.bring(ann, 0, {"x": x}) is None
    assert shared.bring(bob, 1, {"x": 2 * x}) is None
    for found, expected in ((shared.bring(bob, 0, {"x": 3 * x}), 2 * x), (shared.bring(ann, 1, {"x": 4 * x}), 3 * x)):
        assert cast("dict[str, Any]", found)["x"].equal(expected)
