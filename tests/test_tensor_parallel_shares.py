"""Micro-batches in shares: every sum but the last runs under something, and gradients leave before those of weights."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like._compat import TorchDispatchMode
from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.runtime.batches import rows
from merak_like.runtime.exchange import Messages
from merak_like.runtime.groups import Groups
from merak_like.runtime.pair import Pair
from merak_like.runtime.split_backward import PutOff
from merak_like.runtime.stage import Stage
from merak_like.runtime.tensor_parallel import collectives
from merak_like.runtime.tensor_parallel.phased_stage import PhasedStage
from merak_like.runtime.tensor_parallel.sharding import Sharded
from tests import lockstep
from tests.lockstep import in_lockstep, plain
from tests.training import Subject, subject, worst

BLOCKS = 4
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Block(nn.Module):
    """A feed-forward block: one sum over ranks forward, one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.LayerNorm(8), nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(x, labels)


class Desk(TorchDispatchMode):
    """What one of two ranks does, in order: sums begun and waited for, products, gradients of weights. Nothing is sent,
    so the numbers are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.events = list[tuple[str, int]]()

    def begin(self, *_: Any) -> int:
        number = sum(kind == "begin" for kind, _ in self.events)
        self.events.append(("begin", number))
        return number

    def waiting(self, *what: object) -> AbstractContextManager[None]:
        return nullcontext()

    def wait(self, work: int, *what: object) -> None:
        self.events.append(("wait", work))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.events.append(("product", -1))
        return func(*args, **(kwargs or {}))

    def under(self, first: int, stop: int) -> list[set[str]]:
        """For each sum begun among these events, what was done until it was waited for."""
        found = list[set[str]]()
        for at, (kind, number) in enumerate(self.events[first:stop], first):
            if kind == "begin":
                landed = self.events.index(("wait", number))
                found.append({kind for kind, _ in self.events[at:landed]} & {"product", "weights"})
        return found


@lru_cache
def run(shares: int, samples: int, again: bool = False, put_off: bool = False) -> tuple[Desk, int, Any]:
    """A micro-batch on rank 0 of 2: its desk, how many events its forward had, and the stage."""
    torch.manual_seed(0)
    desk, net = Desk(), Net()
    batch = {"x": torch.randn(samples, 3, 8), "labels": torch.randn(samples, 3, 8)}
    mine = Sharded(net, 2, lambda loss, _: loss, shares)
    traced = mine.trace(batch, "cpu")
    mine.graph(traced)
    groups = Groups(Mesh(1, 1, 2), Coord(0, 0, 0), (0,), {}, dict.fromkeys(mine.spans()))
    for name, tensor in net.named_parameters():
        tensor.data = mine.shards(0).cut(name, tensor.data)
    stop = len(traced.graph.ops)
    stage = mine.prepare(groups, desk)(traced, (0, stop), batch).make(  # type: ignore[arg-type]
        0, [(0, stop)] if again else (), torch.device("cpu"), None
    )
    weights = PutOff.run

    def noted(later: PutOff) -> None:
        desk.events.append(("weights", -1))
        weights(later)

    with mock.patch.object(collectives, "all_reduce", desk.begin), mock.patch.object(PutOff, "run", noted), desk:
        out = stage.forward(0, batch, {}, put_off=put_off)
        forward = len(desk.events)
        stage.backward(0, {"loss": torch.ones_like(out["loss"])})
        if put_off:
            stage.weight(0)
    return desk, forward, stage


@pytest.mark.parametrize("shares", [2, 3])
def test_only_the_last_sum_of_a_forward_is_waited_for_idly(shares: int) -> None:
    desk, forward, stage = run(shares, 2 * shares + 1)
    assert isinstance(stage, PhasedStage)
    under = desk.under(0, forward)
    assert len(under) == BLOCKS * shares
    assert [at for at, done in enumerate(under) if "product" not in done] == [len(under) - 1]


@pytest.mark.parametrize("shares", [2, 3])
def test_gradients_leave_before_the_gradients_of_weights_are_computed(shares: int) -> None:
    desk, forward, _ = run(shares, 2 * shares + 1)
    under = desk.under(forward, len(desk.events))
    assert len(under) == BLOCKS * shares
    assert all(done == {"product", "weights"} for done in under)


def test_what_is_put_off_hides_nothing_but_the_other_share_does() -> None:
    desk, forward, _ = run(2, 5, put_off=True)
    under = desk.under(forward, len(desk.events))
    assert [at for at, done in enumerate(under) if not done] == [len(under) - 1]


def test_what_is_computed_again_sends_nothing_again() -> None:
    desk, forward, _ = run(2, 5, again=True)
    assert len(desk.under(0, len(desk.events))) == 2 * 2 * BLOCKS
    assert all("weights" in done for done in desk.under(forward, len(desk.events)))


def test_a_micro_batch_of_one_sample_runs_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        desk, forward, stage = run(2, 1)
    assert isinstance(stage, Stage)
    assert desk.under(0, forward) == [set()] * BLOCKS, "every sum is waited for where it is begun"


def net() -> tuple[Subject, Any]:
    torch.manual_seed(0)
    batch = {name: torch.randn(5, 16, 8) for name in ("x", "labels")}
    return Subject(Net(), lambda: batch, lambda loss, _: loss, rows), batch


def gpt2() -> tuple[Subject, Any]:
    one = subject("gpt2", dropout=False, dtype=torch.float32)
    return replace(one, model=one.model.train()), one.batch(5, 16)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("model", [net, pytest.param(gpt2, marks=pytest.mark.slow)])
def test_shares_under_autocast_are_no_further_off_than_autocast_itself(
    model: Callable[[], tuple[Subject, Any]], sequence_parallel: bool
) -> None:
    one, batch = model()
    exact = plain(one, batch)

    def lower() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    with lower():
        loss, gradients = plain(one, batch)
    off = abs(loss - exact[0]), worst(gradients, exact[1])[0]
    assert min(off) > 1e-6, "autocast changed nothing"
    ran = in_lockstep(one, batch, 2, sequence_parallel, shares=2, around=lower)
    assert max(abs(each - exact[0]) for each in ran.losses) <= 3 * max(off[0], 1e-3)
    assert worst(ran.gradients, exact[1])[0] <= 3 * off[1]


@pytest.mark.parametrize("shares", [1, 3])
def test_what_is_summed_through_a_socket_is_what_one_process_computes(
    shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads, several messages on their way at once."""
    ends = [Pair(end) for end in socket.socketpair()]

    def begin(tensor: Tensor, group: lockstep.Fake, op: Any = None) -> tuple[Messages, lockstep.Fake]:
        theirs = torch.empty_like(tensor)
        return Messages([ends[group.rank].swap(tensor, theirs)], lambda: tensor.add_(theirs)), group

    def wait(_: Any, work: tuple[Messages, lockstep.Fake], what: str, peer: str) -> None:
        messages, group = work
        while not messages.wait(timedelta()):
            group.ring.hand_on(group.rank)
            group.ring.await_turn(group.rank)

    monkeypatch.setattr(lockstep, "all_reduce", begin)
    monkeypatch.setattr(lockstep.Free, "wait", wait)
    torch.manual_seed(0)
    batch = {name: torch.randn(7, 3, 8, dtype=torch.float64) for name in ("x", "labels")}
    one = Subject(Net().double(), lambda: batch, lambda loss, _: loss, rows)
    loss, gradients = plain(one, batch)
    ran = in_lockstep(one, batch, 2, sequence_parallel=False, shares=shares)
    assert max(abs(each - loss) for each in ran.losses) <= 1e-10
    assert worst(ran.gradients, gradients)[0] <= 1e-10
