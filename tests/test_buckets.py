"""Gradients that several ranks share: where they lie, and when their sum starts."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like.runtime.data_parallel import BUCKET_BYTES, Reducer
from merak_like.runtime.split_backward import PutOff
from merak_like.runtime.watch import Watch
from tests.faults import Small, items, mean_square

MINUTE = timedelta(seconds=60)


def test_buckets_go_from_the_last_layer_to_the_first_and_keep_groups_and_dtypes_apart() -> None:
    dp, shared = object(), object()
    parameters = {
        f"{i}": nn.Parameter(torch.zeros(4, dtype=torch.float64 if i == 3 else torch.float32)) for i in range(8)
    }
    groups: dict[str, Any] = dict.fromkeys(parameters, dp) | {"0": shared, "7": None}
    reducer = Reducer(parameters, groups, Watch(0, MINUTE))
    names = {id(p): name for name, p in parameters.items()}
    layout = [([names[id(p)] for p in b.parameters], b.group is dp, b.early) for b in reducer.buckets]
    assert layout == [(["6", "5", "4", "2", "1"], True, True), (["3"], True, True), (["0"], False, False)]
    reducer.watch.close()


def test_buckets_are_as_large_as_they_may_be() -> None:
    group = object()
    count = BUCKET_BYTES // 4 // 4
    parameters = {str(i): nn.Parameter(torch.zeros(count)) for i in range(9)}
    reducer = Reducer(parameters, dict.fromkeys(parameters, group), Watch(0, MINUTE))
    assert [len(bucket.parameters) for bucket in reducer.buckets] == [4, 4, 1]
    reducer.watch.close()


class Done:
    """A collective that is through."""

    def wait(self, limit: timedelta) -> bool:
        return True


def test_gradients_are_views_of_their_bucket_and_the_last_backward_starts_its_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Tensor] = []

    def all_reduce(tensor: Tensor, group: Any, async_op: bool) -> Done:
        started.append(tensor)
        tensor.mul_(2)  # as if another rank had the same
        return Done()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    reducer = Reducer({"used": used, "unused": unused}, {"used": "dp", "unused": "dp"}, Watch(0, MINUTE))
    for _ in range(2):
        reducer.begin()
        used.square().sum().backward()
        assert not started, "only the last backward may start it"
        reducer.enter(0, last=True)
        used.square().sum().backward()
        reducer.finish()
        assert torch.equal(used.grad, torch.full((3,), 8.0))  # type: ignore[arg-type]
        assert used.grad.untyped_storage().data_ptr() == reducer.buckets[0].flat.untyped_storage().data_ptr()  # type: ignore[union-attr]
        assert unused.grad is None, "no rank has a gradient for it"
        assert len(started) == 1
        started.clear()
    reducer.watch.close()


def test_bucket_starts_while_the_last_backward_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small(3).double()
    order: list[str] = []
    monkeypatch.setattr(
        dist, "all_reduce", lambda flat, **_: order.append("sum") or type("W", (), {"wait": lambda *a: True})()
    )
    monkeypatch.setattr("merak_like.runtime.data_parallel.BUCKET_BYTES", 1)
    parameters = dict(model.named_parameters())
    reducer = Reducer(parameters, dict.fromkeys(parameters, "dp"), Watch(0, MINUTE))
    for name, parameter in parameters.items():
        parameter.register_hook(lambda grad, name=name: order.append(name))
    reducer.begin()
    reducer.enter(0, last=True)
    mean_square(model(items()["x"]), items()).backward()
    assert order.index("sum") < order.index("layers.0.weight"), order
    reducer.finish()
    assert order.count("sum") == 6
    reducer.watch.close()


def test_bucket_waits_for_every_stage_that_reads_it_and_for_the_last_weight_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weight of two stages of this rank, and one whose gradients are put off: each sum starts with what is last."""
    started: list[str] = []
    names: dict[int, str] = {}
    monkeypatch.setattr(
        dist, "all_reduce",
        lambda flat, **_: started.append(names[flat.data_ptr()]) or type("W", (), {"wait": lambda *a: True})(),
    )  # fmt: skip
    monkeypatch.setattr("merak_like.runtime.data_parallel.BUCKET_BYTES", 1)
    parameters = {"later": nn.Parameter(torch.ones(2)), "tied": nn.Parameter(torch.ones(2))}
    pending = Counter[int]()
    readers = {"tied": {0, 3}, "later": {0}}
    reducer = Reducer(parameters, dict.fromkeys(parameters, "dp"), Watch(0, MINUTE), readers, pending)
    names.update((b.flat.data_ptr(), n) for b, n in zip(reducer.buckets, ("tied", "later"), strict=True))
    tied, later = parameters["tied"], parameters["later"]

    for _ in range(2):
        reducer.begin()
        waits = PutOff(pending)
        reducer.enter(3, last=True)
        tied.sum().backward()
        assert not started, "stage 0 still reads it"
        reducer.enter(0, last=True)
        for _ in range(2):
            waits.add(later, lambda: torch.ones(2))
        tied.sum().backward()
        assert started == ["tied"]
        later.sum().backward()
        assert started == ["tied"], "two gradients wait"
        waits.run()
        assert started == ["tied", "later"]
        assert later.grad is not None
        assert later.grad.tolist() == [3.0, 3.0]
        reducer.finish()
        assert started == ["tied", "later"]
        started.clear()
    waits.add(later, lambda: torch.ones(2))  # of a step that fails
    reducer.begin()
    assert not any(pending.values())
    reducer.watch.close()
