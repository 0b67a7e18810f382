"""Activations in another memory: bitwise the same training, and less of them where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like import Mesh, auto_parallel, make_plan, trace
from merak_like.runtime.methods.compiled import Compiled
from merak_like.runtime.methods.method import Job, Methods
from merak_like.runtime.methods.offload import Offload
from merak_like.runtime.methods.parking import Parking
from merak_like.trainer.methods import methods_of
from merak_like.trainer.settings import Settings

WIDTH = 96


class Block(nn.Module):
    """Attention whose q, k and v are views of one tensor, a dropout, and a feed-forward with an activation in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down, self.drop = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.drop(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x), inplace=self.in_place))


class Model(nn.Module):
    """Three blocks and a head, whose weight is the embedding's."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(3))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


BATCH = {"ids": torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(1))}


def trained(*methods: Any, in_place: bool = True, **more: Any) -> dict[str, Tensor]:
    """Losses, the last gradients and the weights after three steps."""
    torch.manual_seed(0)
    engine = auto_parallel(
        Model(in_place), example=BATCH, micro_batches=2, hardware="a100-80gb", device="cpu", methods=methods, seed=5,
        optimizer=lambda p: torch.optim.SGD(p, 0.1), **more,
    )  # fmt: skip
    losses = torch.tensor([engine.step(BATCH).loss for _ in range(3)])
    found = {"losses": losses, **{f"{n} grad": g for n, g in engine.full_gradients().items()}}
    found |= engine.full_state_dict()
    engine.close()
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return trained()


WAYS: dict[str, dict[str, Any]] = {
    "all": {}, "nothing ahead": {"ahead": 0}, "some ahead": {"ahead": 300_000}, "one block": {"blocks": r"blocks\.1"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_training_is_bitwise_the_same(way: str, plain: dict[str, Tensor]) -> None:
    method = Offload(**WAYS[way])
    found = trained(method)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    counted = method.parking.counted
    assert counted.back == counted.out > 0
    assert counted.held == 0, "what was read is gone"


@pytest.mark.parametrize(("more", "least"), [({"recompute": "full"}, 0), ({"schedule": "zb-h1", "in_place": False}, 1)])
def test_goes_with_recompute_and_with_a_w(more: dict[str, Any], least: int, plain: dict[str, Tensor]) -> None:
    method = Offload()
    found = trained(method, **more)
    assert all(torch.equal(found[name], tensor) for name, tensor in trained(**more).items())
    assert (method.parking.counted.out > 0) == bool(least), "what is run again keeps nothing"
    assert torch.equal(found["losses"], plain["losses"])


def test_what_is_kept_goes_out_once_and_weights_stay() -> None:
    """By hand, for one block and one micro-batch: each memory once, however many views of it are kept."""
    method = Offload(r"blocks\.1")
    trained(method)
    rows, number = 2 * 32, 4
    # the norm's input, what it makes; q, k, v in one; of the attention its output (seen flat by the dropout, whose mask
    # follows); the second half's input; what the ReLU leaves, for itself and for the layer after it
    kept = rows * number * (WIDTH + WIDTH + 3 * WIDTH + WIDTH + WIDTH + 2 * WIDTH)
    masks = rows * WIDTH * 4
    each = method.parking.counted.out / 6  # three steps of two micro-batches
    assert kept <= each <= kept + 2 * masks, (each, kept)
    assert method.parking.counted.most >= each


def test_one_block_is_less_than_all() -> None:
    some, every = Offload(r"blocks\.1"), Offload()
    trained(some)
    trained(every)
    assert 0 < 2.5 * some.parking.counted.out < every.parking.counted.out


def test_one_method_serves_a_second_engine() -> None:
    method = Offload(r"blocks\.1")
    trained(method)
    once = method.parking.counted.out
    trained(method)
    assert method.parking.counted.out == 2 * once > 0


def test_model_is_left_without_hooks() -> None:
    """They stayed when the engine was closed, and counted the calls of whoever had the model next."""
    model = Model()
    for _ in range(2):
        engine = auto_parallel(
            model, example=BATCH, hardware="a100-80gb", device="cpu", methods=[Offload(r"blocks\.1")]
        )
        assert model.blocks[1]._forward_hooks
        engine.step(BATCH)
        engine.close()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_planner_counts_fewer_bytes_and_the_link() -> None:
    found = {}
    for name, method in {"plain": None, "fast": Offload(bandwidth=1e13), "slow": Offload(bandwidth=1e7)}.items():
        traced = trace(Model().train(), BATCH, device="cpu")
        made = traced.graph if method is None else method.traced(traced, Model()).graph
        plan = make_plan(made, Mesh(), hardware="a100-80gb", batch=4, micro_batches=1)
        found[name] = plan.stages[0].memory.activations, plan.step_seconds
    assert found["fast"][0] < 0.2 * found["plain"][0]
    assert found["fast"][1] == pytest.approx(found["plain"][1], rel=1e-3), "hidden"
    assert found["slow"][1] > 2 * found["plain"][1]


def test_memory_that_changes_while_it_is_copied_is_told() -> None:
    """On a device the copy runs beside what follows; here that moment is made by hand."""
    parking, tensor = Parking(), torch.ones(5000)
    parked = parking.put(tensor, None)
    assert torch.equal(parking.get(parked.of(tensor), 0), tensor)
    parked.held, parked.version = tensor, tensor._version
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        parked.leave()


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks='h.*0'\): no module has such a path; there are 'embed', 'blocks'"):
        trained(Offload(r"h\.0"))
    with pytest.raises(ValueError, match="follows calls of modules, and with tp=2"):
        Methods([Offload("blocks.*")], Job("1f1b", 2, 1, 0))
    with pytest.raises(ValueError, match="zero=3 runs the model whole"):
        Methods([Offload()], Job("1f1b", 1, 1, 3))
    with pytest.raises(ValueError, match="which Compiled hides"):
        Methods([Offload(), Compiled()], Job("1f1b", 1, 1, 0))
    with pytest.raises(ValueError, match="above 0"):
        Offload(bandwidth=0)


def test_a_run_can_ask_for_it() -> None:
    asked = Settings.model_validate({"training": {"steps": 1}, "methods": {"offload": {"blocks": "layers.*"}}})
    assert [repr(method) for method in methods_of(asked.methods)] == [repr(Offload("layers.*"))]
