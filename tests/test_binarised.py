"""An edge half of signs: what is sent, what passes back, and the loss that counts dependence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from merak_like.runtime.codecs import Context, codec
from merak_like.split.binarised import Binary, BinaryLinear, ClipNoise, leak_loss, sign
from merak_like.split.leakage import distance_correlation


def test_gradients_pass_within_one():
    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 2.0], requires_grad=True)
    y = sign(x)
    assert y.tolist() == [-1, -1, 1, 1, 1]
    y.backward(torch.arange(1.0, 6.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_a_weight_is_a_sign_and_a_magnitude():
    torch.manual_seed(0)
    layer = BinaryLinear(6, 3)
    made = layer(torch.eye(6)) - layer.bias
    for out in range(3):
        magnitude = layer.weight[out].abs().mean()
        assert torch.allclose(made[:, out].abs(), magnitude.expand(6))
        assert torch.equal(made[:, out].sign(), layer.weight[out].sign())


def test_a_bit_an_element_crosses_and_arrives():
    torch.manual_seed(0)
    edge = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), Binary())
    z = edge(torch.randn(64, 64)).detach()
    near, far = codec("sign"), codec("sign")
    frame = near.encode(z, Context(step=0))
    assert z.nbytes >= 31 * frame.numel()
    assert torch.equal(far.decode(frame, Context(step=0)), z)


def test_the_leak_loss_is_the_distance_correlation_and_falls():
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    z = (x @ torch.randn(5, 8)).requires_grad_()
    assert leak_loss(x, z).item() == pytest.approx(distance_correlation(x, z.detach()), abs=1e-3)
    (gradient,) = torch.autograd.grad(leak_loss(x, z), z)
    assert leak_loss(x, z - 50 * gradient) < leak_loss(x, z)
    assert leak_loss(x, torch.randn(60, 8)) < 0.6 < leak_loss(x, z)


def test_noise_is_relative_to_the_norm_that_is_left():
    torch.manual_seed(0)
    x = torch.randn(4, 1000) * torch.tensor([0.001, 0.1, 1.0, 100.0]).unsqueeze(1)
    assert torch.allclose(ClipNoise(1.0, 0.0)(x).norm(dim=1), x.norm(dim=1).clamp(max=1.0))
    assert (ClipNoise(1.0, 0.5)(x) - ClipNoise(1.0, 0.0)(x)).norm(dim=1).mean() == pytest.approx(0.5, rel=0.05)
    with pytest.raises(ValueError, match="above 0"):
        ClipNoise(0.0, 1.0)
