"""Activations: the plan predicts their peak on each rank, and a meter counts what autograd and the engine keep."""

from __future__ import annotations

import pytest
import torch

from tests.saved import Meter
from tests.scenarios import PARTS
from tests.training import engine, subject

CHOICES = [
    ("1f1b", "none"), ("1f1b", "full"), ("gpipe", "full"), ("zb-v", "none"), ("zb-v", "full"), ("interleaved", "full"),
    ("dualpipe-v", "none"), ("auto-v", "none"),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "recompute"), CHOICES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "unet"])
def test_peak_of_activations_is_the_predicted_one(name: str, schedule: str, recompute: str) -> None:
    """Within 5%, several stages on the rank, some micro-batches alive, inputs and weight gradients waiting for a W."""
    one = subject(name, dropout=False, dtype=torch.float32)
    batch = one.batch(2 * PARTS)
    ours = engine(one, batch, 1, 1, PARTS, schedule=schedule, recompute=recompute)
    meter = Meter(ours, batch)
    ours.step(batch)
    with meter.counting():
        ours.step(batch)
    predicted = ours.plan.rank_activation_bytes[0]
    ours.close()
    assert meter.peak == pytest.approx(predicted, rel=0.05)
