"""Weights of few numbers: by elements' weights, by projection while training, by powers of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like import auto_parallel
from merak_like.runtime.methods import powers
from merak_like.runtime.methods.method import Job, Methods
from merak_like.runtime.methods.projection import LowRank, project, two_linears
from merak_like.split.element_weights import factor_elements, spread, weighted_error
from merak_like.split.low_rank import factor
from tests.kfac_runs import batches, model


@pytest.mark.parametrize("kind", ["even", "sides", "elements"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_weighting_by_elements_errs_least(kind: str, rank: int):
    torch.manual_seed(rank)
    weight = torch.randn(20, 12)
    sides, elements = torch.rand(20, 1).pow(4) * torch.rand(12).pow(4), torch.rand(20, 12).pow(4)
    fisher = {"even": torch.ones(20, 12), "sides": sides, "elements": elements}[kind]
    plain, by_sides = factor(weight, rank), factor(weight, rank, fisher)
    errors = [weighted_error(weight, p.u @ p.s, p.v, fisher) for p in (plain, by_sides)]
    ours = weighted_error(weight, *factor_elements(weight, rank, fisher), fisher)
    assert ours <= min(errors) * (1 + 1e-5)
    if kind == "elements":
        assert ours < 0.9 * min(errors)
    else:  # rows and columns alone matter: their weighting is best already
        assert errors[1] <= errors[0] * (1 + 1e-5)
        assert ours == pytest.approx(errors[1], rel=1e-3)
    assert (spread(fisher) > 0.5) == (kind == "elements")


def test_a_row_without_information_and_a_negative_one():
    fisher = torch.rand(6, 5)
    fisher[2] = 0
    left, right = factor_elements(torch.randn(6, 5), 2, fisher)
    assert (left @ right).isfinite().all()
    with pytest.raises(ValueError, match="negative"):
        factor_elements(torch.randn(6, 5), 2, -fisher)


def test_projection_is_the_nearest_of_that_rank_and_keeps_the_energy():
    torch.manual_seed(0)
    weight = torch.randn(8, 6)
    near, full = weight.clone(), weight.clone()
    project(near, 2)
    project(full, 2, energy=True)
    u, s, v = torch.linalg.svd(weight)
    assert torch.allclose(near, (u[:, :2] * s[:2]) @ v[:2], atol=1e-6)
    assert full.norm() == pytest.approx(float(weight.norm()), rel=1e-5)
    scale = torch.rand(8, 1) + 0.5
    scaled = weight.clone()
    project(scaled, 2, scale=scale)
    assert torch.linalg.matrix_rank(scaled * scale, rtol=1e-5) == 2


def test_projection_goes_on_with_a_checkpoint(tmp_path: Path):
    """The steps to the next projection were counted from the process's start."""

    def job() -> Any:
        return auto_parallel(
            model(), example=data[0], hardware="a100-80gb", device="cpu", optimizer=lambda p: torch.optim.SGD(p, 0.1),
            methods=[LowRank(3, 3, "[02]")],
        )  # fmt: skip

    data = batches(6, 32)
    through, again = job(), job()
    for number, batch in enumerate(data[:4]):
        if number == 2:
            through.save(tmp_path)
        through.step(batch)
    again.load(tmp_path)
    for batch in data[2:4]:
        again.step(batch)
    expected, found = through.full_state_dict(), again.full_state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    through.close()
    again.close()


def test_training_ends_in_low_rank_and_as_two_linears():
    data, trained = batches(6, 32), model()
    engine = auto_parallel(
        trained, example=data[0], hardware="a100-80gb", device="cpu", optimizer=lambda p: torch.optim.SGD(p, 0.1),
        methods=[LowRank(5, 3, "[02]")],
    )  # fmt: skip
    for batch in data:
        engine.step(batch)
    engine.close()
    weights = [trained.get_parameter(f"{i}.weight") for i in (0, 2, 4)]
    assert [int(torch.linalg.matrix_rank(w, rtol=1e-4)) for w in weights] == [5, 5, 10]
    exported = two_linears(trained, 5, "[02]")
    assert exported(**data[0]).item() == pytest.approx(trained(**data[0]).item(), abs=1e-5)
    assert sum(p.numel() for p in exported.get_submodule("2").parameters()) == 5 * (256 + 256) + 256


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(self.conv(x.view(-1, 1, 8, 8))).relu().mean()


def test_a_convolution_is_projected_together_with_its_norm():
    data, trained = batches(1, 16), Normed()
    engine = auto_parallel(
        trained, example=data[0], hardware="a100-80gb", device="cpu", optimizer=lambda p: torch.optim.SGD(p, 0.1),
        methods=[LowRank(2, 1, "conv", norms={"conv": "norm"})],
    )  # fmt: skip
    engine.step(data[0])
    engine.close()
    factor = trained.norm.weight / (trained.norm.running_var + trained.norm.eps).sqrt()  # type: ignore[operator]
    assert torch.linalg.matrix_rank(trained.conv.weight.flatten(1) * factor[:, None], rtol=1e-4) == 2


def test_low_rank_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="use zero=0, tp=1 and float32, found tp=2"):
        Methods([LowRank(2, 1)], Job("1f1b", 2, 1, 0))
    with pytest.raises(ValueError, match="matches 'nothing'"):
        two_linears(model(), 2, "nothing")
    with pytest.raises(ValueError, match="is a convolution"):
        two_linears(Normed(), 2)


def test_powers_of_two_are_read_exactly_and_small(tmp_path: Path):
    torch.manual_seed(0)
    state = {"w": torch.randn(256, 128), "bias": torch.randn(7), "odd": torch.randn(37, 11), "n": torch.arange(3)}
    powers.save(state, tmp_path / "half.safetensors")
    found = powers.load(tmp_path / "half.safetensors")
    assert found.keys() == state.keys()
    for name in ("w", "odd"):
        assert torch.equal(found[name], powers.decompose(state[name]).tensor())
        assert (found[name] - state[name]).norm() < 0.25 * state[name].norm()
    assert torch.equal(found["bias"], state["bias"])
    assert torch.equal(found["n"], state["n"])
    size, before = (tmp_path / "half.safetensors").stat().st_size, sum(t.nbytes for t in state.values())
    assert before > 6 * size, before / size
