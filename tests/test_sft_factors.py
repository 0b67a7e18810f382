"""Factors of low rank, and what SFT says about models it cannot change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from merak_like.split.element_weights import factor_by_elements
from merak_like.split.low_rank import factor, fisher_information
from merak_like.split.sft import Narrow, sft


def product(weight: Tensor, rank: int, fisher: Tensor | None = None) -> Tensor:
    u, s, v = factor(weight, rank, fisher)
    assert (u.shape, s.shape, v.shape) == ((weight.shape[0], rank), (rank, rank), (rank, weight.shape[1]))
    return u @ s @ v


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_are_the_best_of_their_rank(shape: tuple[int, int], dtype: torch.dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = torch.linalg.svdvals(weight.float())
    near = 0.02 if dtype == torch.bfloat16 else 1e-5
    for rank in (1, 4, 12):
        error = (weight.float() - product(weight, rank).float()).norm()
        torch.testing.assert_close(error, values[rank:].norm(), atol=near * values[0].item(), rtol=0)
    u, s, v = factor(weight, 4)
    assert torch.equal(s, s.diag().diag())
    torch.testing.assert_close(v.float() @ v.float().T, torch.eye(4), atol=near, rtol=0)
    assert u.dtype == dtype


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)])
def test_fisher_weighs_both_sides(shape: tuple[int, int]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    fisher = torch.rand(shape, generator=torch.Generator().manual_seed(1)) ** 4
    fisher[7] = 0  # a row that never mattered
    sides = fisher.sum(1, keepdim=True) * fisher.sum(0)

    def objective(guess: Tensor) -> float:
        return (sides * (weight - guess).square()).sum().item()

    for rank in (1, 4, 8):
        best = torch.linalg.svdvals(sides.sqrt() * weight)[rank:].square().sum().item()
        assert objective(product(weight, rank, fisher)) == pytest.approx(best, rel=1e-4)
        assert best < objective(product(weight, rank))
    even = product(weight, 4, torch.full_like(weight, 0.3))
    torch.testing.assert_close(even, product(weight, 4), atol=1e-5, rtol=1e-4)
    assert product(weight, 4, fisher).isfinite().all()
    assert product(weight, 4, torch.zeros_like(weight)).isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_weighted_factors_are_of_the_size_of_plain_ones(scale: float):
    """Information is as small as squared gradients. It was left in s, which then learnt nothing that lasted a step."""
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    fisher = scale * torch.rand(40, 16, generator=torch.Generator().manual_seed(1)) ** 4
    for u, s, v in (factor(weight, 4, fisher), factor_by_elements(weight, 4, fisher)):
        assert torch.equal(s, s.diag().diag())
        assert bool((s.diagonal().diff() <= 0).all())
        assert 1 / 3 < float(s[0, 0] / torch.linalg.matrix_norm(weight, 2)) < 3
        for one in (u.T @ u, v @ v.T):
            torch.testing.assert_close(one, torch.eye(4), atol=1e-5, rtol=0)


def test_fisher_information_is_the_mean_squared_gradient():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batches = [torch.randn(1, 3) for _ in range(5)]
    model.weight.grad = torch.ones(2, 3)
    found = fisher_information(model, ["weight"], batches, lambda m, x: m(x).square().sum())
    wanted = torch.stack([2 * model(x).T @ x for x in batches]).square().mean(0)
    torch.testing.assert_close(found["weight"], wanted.detach())
    assert torch.equal(model.weight.grad, torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_information(model, ["weight"], [], lambda m, x: m(x).sum())


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_ranks_a_weight_does_not_have_are_refused(rank: int):
    with pytest.raises(ValueError, match=f"ranks 1 to 12, asked for {rank}"):
        factor(torch.randn(30, 12), rank)


def test_fisher_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(12, 30\), its weight \(30, 12\)"):
        factor(torch.randn(30, 12), 2, torch.ones(12, 30))


class Block(nn.Module):
    """A feed-forward whose sum and matrices can be arranged."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fc1, self.fc2, self.side = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "plain":
                return x + self.fc2(self.fc1(x).relu())
            case "in place":
                out = self.fc2(self.fc1(x).relu())
                out += x
                return out
            case "beside":
                side = self.side(x)
                return x + side + self.fc2(self.fc1(x).relu())
            case "scaled":
                return 0.5 * x + self.fc2(self.fc1(x).relu())
            case "parallel":
                side = self.side(x)
                return self.fc2(self.fc1(x).relu()) + side + x
            case "no residual":
                return self.fc2(self.fc1(x).relu())
            case "attention":
                q, k = self.side(x), self.side(x)
                return x + self.side(torch.matmul((q @ k.mT).softmax(-1), x))
            case _:
                return x.relu()


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.block, self.head = Block(kind), nn.Linear(8, 1)
        self.twice = kind == "twice"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.block(x)
        if self.twice:
            x = self.block(x)
        return {"loss": self.head(x).square().mean()}


EXAMPLE = {"x": torch.ones(2, 3, 8)}


@pytest.mark.parametrize("kind", ["plain", "in place", "scaled"])
def test_one_addition_is_left_out_however_it_is_written(kind: str):
    torch.manual_seed(0)
    model = Model(kind)
    x = torch.randn(2, 3, 8)
    sft(model, EXAMPLE, "block", 8)
    block = model.block
    torch.testing.assert_close(block(x), block.fc2(block.fc1(x).relu()))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("parallel", r"must have one residual link around it, found 2 \(.*side by side"),
        ("beside", "found add, which its input does not come from"),
        ("no residual", "must have one residual link around it, found none"),
        ("attention", "that is attention, not a feed-forward"),
        ("twice", "'block' runs 2 times"),
        ("no matrix", "block has no matrix"),
    ],
)
def test_layers_without_a_narrow_place_are_refused_and_left_alone(kind: str, says: str):
    model = Model(kind)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=says):
        sft(model, EXAMPLE, "block", 2)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not isinstance(model.block, Narrow)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layer": "blok", "rank": 2}, "no layer 'blok'; near it: block"),
        ({"layer": "block", "rank": 9}, "ranks 1 to 8, asked for 9"),
        ({"layer": "block", "rank": 2, "skip": "all"}, "skip must be one of none, surrogate, found 'all'"),
        ({"layer": "block", "rank": 2, "fisher": {}}, "information of block.fc1.weight is missing"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], says: str):
    with pytest.raises(ValueError, match=says):
        sft(Model("plain"), EXAMPLE, **arguments)  # type: ignore[arg-type]


def test_a_layer_is_changed_once():
    model = Model("plain")
    sft(model, EXAMPLE, "block", 3)
    with pytest.raises(ValueError, match="changed already, to rank 3"):
        sft(model, EXAMPLE, "block", 2)


def test_a_pass_that_takes_another_way_is_an_error():
    """The example took one residual; a pass that adds beside it would need more than the wire."""
    model = Model("plain")
    sft(model, EXAMPLE, "block", 3)
    model.block.kind = "parallel"
    with pytest.raises(ValueError, match="2 times, not once"):
        model(**EXAMPLE)


def test_fisher_weighs_the_factors_of_a_model():
    torch.manual_seed(0)
    models = {how: Model("plain") for how in ("plain", "sides", "elements")}
    for model in models.values():
        model.load_state_dict(models["plain"].state_dict())
    batches = [{"x": torch.randn(1, 3, 8)} for _ in range(20)]
    fisher = fisher_information(models["sides"], ["block.fc1.weight"], batches, lambda m, b: m(**b)["loss"])
    weight, weights = models["plain"].block.fc1.weight.detach(), fisher["block.fc1.weight"]
    sft(models["plain"], EXAMPLE, "block", 2)
    for how in ("sides", "elements"):
        sft(models[how], EXAMPLE, "block", 2, fisher=fisher, weigh=how)
    off = {how: (weight - m.block.fc1.weight.detach()).square() for how, m in models.items()}
    whole = weights.sum(1, keepdim=True) * weights.sum(0)
    sides = {how: float((whole * each).sum()) for how, each in off.items()}
    elements = {how: float((weights * each).sum()) for how, each in off.items()}
    assert sides["sides"] < min(sides["plain"], sides["elements"])
    assert elements["elements"] < elements["sides"] < elements["plain"]
    with pytest.raises(ValueError, match="weigh must be one of sides, elements, found 'columns'"):
        sft(Model("plain"), EXAMPLE, "block", 2, weigh="columns")
