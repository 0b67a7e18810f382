"""The engine in one process, without torchrun: the same calls and the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import scenarios
from tests.scenarios import PARTS, SAMPLES, patchy
from tests.training import DENSE, MODELS, by_engine, engine, plainly, same, subject


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("name", MODELS)
def test_one_process_trains_bitwise_as_plain_pytorch(name: str, schedule: str) -> None:
    assert scenarios.train(name, 1, 1, schedule, True, steps=2, fuse=False) <= (1e-13 if name == "t5" else 0.0)


@pytest.mark.parametrize(
    "scenario", ["partly_trained", "leaves_random_numbers_alone", "readable_gradients", "own_code_runs"]
)
def test_scenario_in_one_process(scenario: str) -> None:
    getattr(scenarios, scenario)(1, 1)


def test_evaluation_and_other_shapes_in_one_process() -> None:
    scenarios.evaluated("gpt2", 1, 1, "1f1b")
    scenarios.other_shapes("gpt2", 1, 1)
    scenarios.under_autocast("llama", 1, 1)


def test_closed_engine_says_so_and_the_next_one_works() -> None:
    one = patchy()
    first = engine(one, one.batch(SAMPLES), 1, 1, PARTS)
    first.step(one.batch(SAMPLES))
    first.close()
    first.close()
    for use in (first.step, first.evaluate):
        with pytest.raises(ValueError, match="this engine was closed: build another with auto_parallel"):
            use(one.batch(SAMPLES))
    with pytest.raises(ValueError, match="closed"):
        first.full_state_dict()
    assert by_engine(one, [one.batch(SAMPLES)], 1, 1, PARTS).steps[0].loss > 0


def test_plain_module_is_saved_as_safetensors_and_read_again(tmp_path: Path) -> None:
    one = patchy()
    scenarios.write("patchy", 1, 1, str(tmp_path))
    trained = plainly(one, [one.batch(SAMPLES)] * 2, PARTS).weights
    empty = scenarios.Subject(patchy().model.to("meta"), one.batch, one.loss_fn, one.weight)
    ours = engine(empty, one.batch(SAMPLES), 1, 1, PARTS, weights=tmp_path / "model.safetensors")
    assert scenarios.training.worst(ours.full_state_dict(), trained)[0] == 0.0
    ours.close()


def test_the_comparison_can_fail() -> None:
    one = patchy()
    batches = [one.batch(SAMPLES)] * 2
    ours, theirs = by_engine(one, batches, 1, 1, PARTS), plainly(one, batches, PARTS, 0.49)
    with pytest.raises(AssertionError, match="gradient of"):
        same(ours, theirs, 1e-10)
    other = by_engine(one, batches, 1, 1, PARTS, optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.11))
    with pytest.raises(AssertionError, match="loss of step 1"):
        same(other, plainly(one, batches, PARTS), 1e-10)


@pytest.mark.parametrize("name", DENSE)
def test_dropout_is_at_work_where_the_tests_say_so(name: str) -> None:
    def twice(dropout: bool) -> list[float]:
        one = subject(name, dropout=dropout)
        return [one.loss(one.model, one.batch(3)).item() for _ in range(2)]

    a, b = twice(True)
    assert a != b
    a, b = twice(False)
    assert a == b
