"""AdamW in one piece: bit for bit torch's, whatever comes between two steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import Engine, auto_parallel
from merak_like.runtime.methods.flat_adamw import FlatAdamW

SIZES = [(7, 5), (3,), (16, 16), (1,), (33, 2), (5, 4, 3), (11,)]


def models() -> tuple[nn.ParameterList, nn.ParameterList]:
    torch.manual_seed(0)
    ours = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in SIZES])
    return ours, copy.deepcopy(ours)


def groups(parameters: nn.ParameterList) -> list[dict[str, Any]]:
    own = list(parameters)
    return [{"params": own[::2], "weight_decay": 0.1}, {"params": own[1::2], "weight_decay": 0.0}]


def train(optimizer: torch.optim.Optimizer, parameters: nn.ParameterList, steps: range, without: int = -1) -> None:
    for step in steps:
        noise = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=noise)
            parameter.grad = None if number == without and step % 2 else gradient
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()


def equal(ours: nn.ParameterList, theirs: nn.ParameterList) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("more", [{}, {"amsgrad": True}, {"fused": True}, {"maximize": True}, {"foreach": True}])
def test_it_is_adamw_bit_for_bit(more: dict[str, Any]):
    ours, theirs = models()
    train(FlatAdamW(groups(ours), 1e-2, **more), ours, range(6))
    train(torch.optim.AdamW(groups(theirs), 1e-2, **more), theirs, range(6))
    assert equal(ours, theirs)


def test_a_group_is_one_run():
    ours, _ = models()
    optimizer = FlatAdamW(ours.parameters())
    train(optimizer, ours, range(1))
    assert [len(run.parameters) for run in optimizer._runs[0]] == [len(SIZES)]


def test_a_weight_without_a_gradient_is_left_alone():
    ours, theirs = models()
    train(FlatAdamW(groups(ours), 1e-2), ours, range(7), without=2)
    train(torch.optim.AdamW(groups(theirs), 1e-2), theirs, range(7), without=2)
    assert equal(ours, theirs)


def test_state_goes_over_to_torch_and_back():
    ours, theirs = models()
    mine, its = FlatAdamW(groups(ours), 1e-2), torch.optim.AdamW(groups(theirs), 1e-2)
    train(mine, ours, range(3))
    its.load_state_dict(copy.deepcopy(mine.state_dict()))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(ours.parameters()), theirs.parameters())
    train(its, theirs, range(3, 6))
    again = FlatAdamW(groups(ours), 1e-2)
    again.load_state_dict(copy.deepcopy(mine.state_dict()))
    train(again, ours, range(3, 6))
    assert equal(ours, theirs)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path):
    def engine() -> Engine:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        return auto_parallel(
            model, example=batch, loss_fn=lambda out, b: out.square().mean(), optimizer=FlatAdamW, device="cpu",
            hardware="a100-80gb",
        )  # fmt: skip

    batch = {"input": torch.randn(4, 6)}
    through = engine()
    for step in range(4):
        if step == 2:
            through.save(tmp_path)
        through.step(batch)
    again = engine()
    assert again.resume(tmp_path) is not None
    for _ in range(2):
        again.step(batch)
    for name, weight in through.full_state_dict().items():
        assert torch.equal(again.full_state_dict()[name], weight)
    through.close()
    again.close()


def test_weights_that_are_views_stay_where_they_are():
    memory = torch.zeros(6)
    parameter = nn.Parameter(torch.empty(0))
    parameter.data = memory[:4]
    optimizer = FlatAdamW([parameter], 0.1)
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert memory.tolist() == pytest.approx([-0.1] * 4 + [0, 0])


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="capturable"):
        FlatAdamW([nn.Parameter(torch.zeros(2))], capturable=True)
    with pytest.raises(ValueError, match="dense real"):
        FlatAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
