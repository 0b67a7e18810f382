"""Collectives by messages: what torch's own give, on every rank the same bits."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.runtime import exchange, pair
from merak_like.runtime.pair import Pair, pair_of
from tests.ranks import Call, torchrun

MINUTE = timedelta(seconds=60)
SIZE = 10
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def given(rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """What a rank gives, which another can compute as well."""
    numbers = torch.randn(ranks, ranks * SIZE, generator=torch.Generator().manual_seed(7)) * 8
    return numbers.to(dtype)[rank]


def exchanges(world: int, ways: Sequence[int] = (exchange.MOST,)) -> list[dict[str, int]]:
    """On each rank, for each way: begin all of them, wait for all, and compare with what was given. How each went.

    ``ways``: bytes of a message that goes through the socket of a pair.
    """
    dist.init_process_group("gloo")
    before, found = exchange.MOST, list[dict[str, int]]()
    try:
        group = dist.new_group(backend="gloo")
        for exchange.MOST in ways:
            found.append(exchanged(world, group))
        return found
    finally:
        exchange.MOST = before
        dist.destroy_process_group()


def exchanged(world: int, group: Any) -> dict[str, int]:
    """Everything once, by this rank; how it went."""
    rank = dist.get_rank()
    begun: list[tuple[str, Any, Tensor, Tensor]] = []
    for dtype in DTYPES:
        all_given = torch.stack([given(r, world, dtype) for r in range(world)])
        added, runs = all_given.sum(0, dtype=dtype), all_given.view(world, world, SIZE)
        for op, whole in ((exchange.SUM, added), (exchange.MAX, all_given.amax(0))):
            mine = given(rank, world, dtype)
            begun.append((f"reduce {dtype}", exchange.all_reduce(mine, group, op), mine, whole))
        own = torch.empty(SIZE, dtype=dtype)
        work = exchange.reduce_scatter(own, given(rank, world, dtype), group)
        begun.append((f"scatter {dtype}", work, own, added.view(world, SIZE)[rank]))
        flat = torch.empty(world * SIZE, dtype=dtype)
        work = exchange.all_gather(flat, runs[rank, 0].contiguous(), group)
        begun.append((f"gather {dtype}", work, flat, runs[:, 0].reshape(-1)))
        place = flat.clone()
        place.view(world, SIZE)[rank] = runs[rank, 0]
        work = exchange.all_gather(place, place.view(world, SIZE)[rank], group)
        begun.append((f"gather in place {dtype}", work, place, runs[:, 0].reshape(-1)))
        rows = torch.empty(2 * world, SIZE // 2, dtype=dtype)
        work = exchange.all_gather(rows, runs[rank, 0].reshape(2, -1), group)
        begun.append((f"gather rows {dtype}", work, rows, runs[:, 0].reshape(rows.shape)))
    for what, work, found, wanted in begun:
        assert work.wait(MINUTE) is not False, what
        torch.testing.assert_close(found, wanted, msg=lambda text, what=what: f"{what}: {text}")
        everywhere = [torch.empty_like(found) for _ in range(world)]
        dist.all_gather(everywhere, found)
        if "scatter" not in what:
            assert all(torch.equal(found, other) for other in everywhere), what
    kinds = [type(work).__name__ for _, work, *_ in begun] + ["pair"] * (
        exchange.MOST > 0 and world == 2 and pair_of(group) is not None
    )
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.ranks
@pytest.mark.timeout(120)
def test_two_ranks_swap_and_have_the_same_bits() -> None:
    """All by a socket, all by gloo, and by what is small (one dtype of four is half as wide, one a quarter)."""
    ways = [exchange.MOST, 0, SIZE * 4]
    job = torchrun([Call("two", "tests.test_exchange:exchanges", {"world": 2, "ways": ways})], 2)
    pairs = [{"pair": 1} if way and sys.platform == "linux" else {} for way in ways]
    assert job.results("two") == [[{"Messages": 6 * len(DTYPES)} | pair for pair in pairs]] * 2


@pytest.mark.ranks
@pytest.mark.timeout(120)
def test_more_ranks_send_runs_to_their_owners() -> None:
    job = torchrun([Call("three", "tests.test_exchange:exchanges", {"world": 3})], 3)
    assert [found["Messages"] for (found,) in job.results("three")] == [len(DTYPES)] * 3


def ends() -> tuple[Pair, Pair]:
    one, other = socket.socketpair()
    return Pair(one), Pair(other)


def test_messages_of_a_pair_come_in_order_whoever_waits_for_which() -> None:
    one, other = ends()
    sizes = (3, 0, 1000, 1)
    sent, got = [torch.rand(n) for n in sizes], [torch.empty(n) for n in sizes]
    back = [torch.empty(n) for n in sizes]
    begun = [one.swap(mine, theirs) for mine, theirs in zip(sent, got, strict=True)]
    answered = [other.swap(mine + 1, theirs) for mine, theirs in zip(sent, back, strict=True)]
    assert begun[2].wait(MINUTE)
    assert answered[3].wait(MINUTE)
    assert begun[0].wait(MINUTE)
    assert begun[3].wait(MINUTE)
    assert all(torch.equal(a + 1, b) for a, b in zip(sent, got, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sent, back, strict=True))


def test_what_the_kernel_cannot_take_at_once_leaves_while_one_waits() -> None:
    one, other = ends()
    mine, theirs = torch.rand(2, 1 << 20)
    got, back = torch.empty_like(theirs), torch.empty_like(mine)
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(other.swap(theirs, back).wait(MINUTE)))
    thread.start()
    assert one.swap(mine, got).wait(MINUTE)
    thread.join(60)
    assert done == [True]
    assert torch.equal(got, theirs)
    assert torch.equal(back, mine)


def test_a_pair_waits_no_longer_than_its_limit() -> None:
    one, _ = ends()
    late = one.swap(torch.ones(1 << 20), torch.empty(2))
    assert late.wait(timedelta(milliseconds=20)) is False


def test_a_pair_of_which_one_is_gone_says_so() -> None:
    one, other = ends()
    begun = one.swap(torch.ones(2), torch.empty(2))
    del other
    with pytest.raises(RuntimeError, match="closed by peer"):
        begun.wait(MINUTE)
    with pytest.raises(RuntimeError, match="closed by peer"):
        one.swap(torch.ones(2), torch.empty(2))


@pytest.mark.skipif(sys.platform != "linux", reason="abstract socket names are Linux's; elsewhere gloo is used")
def test_only_a_caller_of_this_user_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0merak-test")
        listener.listen()
        name = listener.getsockname()
        with pair._called(name) as caller:  # type: ignore[union-attr]
            answered = pair._answered(listener)
            assert answered is not None
            caller.sendall(b"word")
            assert answered.recv(4) == b"word"
            answered.close()
        monkeypatch.setattr(pair.os, "getuid", lambda: -2)
        with pair._called(name):  # type: ignore[union-attr]
            assert pair._answered(listener) is None
    assert pair._called(name) is None, "nobody listens there any more, as on another host"
    assert pair._called(b"") is None


class Late:
    """A transfer that does not come."""

    def wait(self, limit: timedelta) -> bool:
        return limit > MINUTE


def test_what_did_not_come_is_not_added() -> None:
    done: list[str] = []
    note: Callable[[], None] = partial(done.append, "added")
    messages = exchange.Messages([Late(), Late()], note)
    assert messages.wait(MINUTE) is False
    assert done == []
    assert messages.wait(2 * MINUTE)
    assert done == ["added"]
