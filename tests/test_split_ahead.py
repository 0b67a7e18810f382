"""The edge encodes and sends behind its computing: the same frames in the same order, and nothing that hangs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from merak_like.runtime.links import Spec
from merak_like.split.ahead import Ahead
from merak_like.split.connection import Lost
from merak_like.split.exchange import Exchange
from merak_like.split.session import Session
from merak_like.split.wire import Key
from tests.split_pair import CUTS, made, pair, task

__all__ = ["pair"]
SPEC = Spec("x", (4, 6), torch.float32, True)
IDS = [(0, 1, 2, 3), (4, 5, 6, 7)]


class Wire:
    """Keeps what is sent, waiting for a word before each; a receive waits until it is closed."""

    def __init__(self) -> None:
        self.sent: list[tuple[Key, bytes]] = []
        self.go, self.over = threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def send(self, key: Key, body: bytes) -> None:
        while not self.go.wait(0.01):
            if self.error is not None:
                raise self.error
        self.sent.append((key, body))

    def receive(self, key: Key) -> bytes:
        assert self.over.wait(20), f"{key} is waited for, and nobody ends it"
        assert self.error is not None
        raise self.error

    def close(self, error: BaseException | None = None) -> None:
        self.error = self.error or error
        self.over.set()


def _put(exchange: Exchange, wire: Wire, step: int) -> None:
    exchange.begin(wire, step, IDS)
    for i in range(2):
        generator = torch.Generator().manual_seed(10 * step + i)
        exchange.put("up", "forward", i, {"x": torch.randn(4, 6, generator=generator)}, [SPEC])


@pytest.mark.parametrize("text", ["identity", "aqsgd(4)", "randtopk(0.5)", "aqsgd(2)|int8"])
def test_frames_and_memories_are_those_of_an_exchange_without_a_thread(text: str):
    found = []
    for kind in (Exchange, Ahead):
        exchange, wire = kind({"up": text, "down": text}, 0, torch.device("cpu")), Wire()
        wire.go.set()
        for step in range(3):
            _put(exchange, wire, step)
            if isinstance(exchange, Ahead):
                exchange.settle()
        found.append((wire.sent, exchange.state_dict()))
        if isinstance(exchange, Ahead):
            exchange.close()
    (plain, mine), (ahead, theirs) = found
    assert plain == ahead
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_computing_goes_on_while_nothing_is_taken():
    exchange, wire = Ahead({"up": "int8", "down": "int8"}, 0, torch.device("cpu")), Wire()
    _put(exchange, wire, 0)  # returns, though the wire takes nothing
    assert not wire.sent
    wire.go.set()
    exchange.settle()
    assert [key.micro_batch for key, _ in wire.sent] == [0, 1]
    exchange.close()


def test_what_goes_wrong_in_encoding_is_raised_where_the_engine_waits():
    """A codec that needs ids and gets none: the engine already waits for the answer to what never went out."""
    exchange, wire = Ahead({"up": "aqsgd(4)", "down": "int8"}, 0, torch.device("cpu")), Wire()
    wire.go.set()
    exchange.begin(wire, 0, [(), ()])
    exchange.put("up", "forward", 0, {"x": torch.ones(4, 6)}, [SPEC])
    with pytest.raises(ValueError, match="needs an id for each"):
        exchange.take("up", "backward", 0, [SPEC])
    exchange.close()


def test_a_step_that_is_given_up_does_not_wait_for_the_wire():
    """Its frames wait for an outbox that is full; going back must not take until that wait's limit."""
    exchange, wire = Ahead({"up": "aqsgd(4)", "down": "int8"}, 0, torch.device("cpu")), Wire()
    _put(exchange, wire, 0)
    began = time.monotonic()
    exchange.load_state_dict({})
    assert time.monotonic() - began < 5
    assert isinstance(wire.error, Lost)
    assert not exchange.state_dict()
    exchange.close()


def test_a_first_micro_batch_that_comes_before_the_host_serves_is_taken(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With many clients the host's thread slept after WELCOME, and the frame was refused: at most 0 bytes may come."""
    serve = Session.serve

    def late(self: Session, *args: Any) -> None:
        time.sleep(0.5)
        serve(self, *args)

    monkeypatch.setattr(Session, "serve", late)
    model, batch = made("calm")
    both = pair(model, batch, task(CUTS["calm"]))
    assert both.edge.step(batch).loss > 0
