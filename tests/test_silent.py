"""What other trainers have got wrong without a word, each with the test here that would say so.

Every row was a bug in a widely used project. The tests are where they belong; this file keeps them from going away.
"""

from __future__ import annotations

from importlib import import_module

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from merak_like import Mesh, make_plan, trace
from merak_like.hf import example_for

ROWS = {
    "layers that do not divide evenly are dropped (torchtitan#963)": ("silent:test_no_layer_is_lost_or_doubled",),
    "gradients of earlier micro-batches are lost when the length changes (NeMo Automodel#3530)":
        ("transparency:test_scenario",),
    "the gradient norm is that of one stage (torchtitan#596)": ("transparency:test_training_equals_plain_training",),
    "accumulation doubles the loss (transformers#35438)":
        ("trainer_parity:test_hf_trainer_alone_is_transformers",),
    "a pipeline is asked for, and there is none (accelerate#2838)":
        ("faults:test_what_cannot_work_is_refused_on_every_rank", "trainer_cli:test_wrong_keys_and_values_are_named"),
    "a job that goes on in its second epoch has other data (accelerate#2016)":
        ("trainer_data:test_batches_of_any_sizes_are_runs_of_one_sequence",
         "trainer_parity:test_hf_trainer_goes_on_bit_for_bit"),
    "packed documents see each other though positions start anew (nanoVLM#204)":
        ("trainer_data:test_a_document_has_the_loss_and_gradients_it_has_alone",
         "trainer_data:test_new_positions_alone_would_leak"),
    "tied weights drift apart (Megatron-LM#656)":
        ("transparency:test_training_equals_plain_training",
         "transparency:test_saved_model_loads_as_the_one_that_was_trained"),
    "a loss that is not a number is left out of the log (transformers)":
        ("trainer_parity:test_step_that_is_left_out_is_told",
         "trainer:test_a_step_that_is_not_finite_names_its_samples_and_leaves_the_weights"),
    "an index names tensors that are not there (Relax#148)": ("trainer_cli:test_a_run_from_texts_to_a_model",),
}  # fmt: skip
"""From what went wrong to the tests that would fail."""


@pytest.mark.parametrize("row", ROWS)
def test_row_has_its_tests(row: str) -> None:
    for test in ROWS[row]:
        module, _, name = test.partition(":")
        assert hasattr(import_module(f"tests.test_{module}"), name), test


@pytest.mark.parametrize("pp", [2, 4])
def test_no_layer_is_lost_or_doubled(pp: int) -> None:
    """Five layers on two and four stages: every weight is on one stage, a tied one on those that read it."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=5, n_head=2))
    plan = make_plan(trace(model, example_for(model, batch=1, seq=8)).graph, Mesh(pp=pp), hardware="a100-80gb", batch=4)
    held = [name for stage in plan.stages for name in stage.params]
    assert set(held) == {name for name, _ in model.named_parameters()}
    assert {name for name in held if held.count(name) > 1} <= {name for tie in plan.ties for name in tie}
    ops = [op for start, stop in zip(plan.starts, plan.starts[1:], strict=False) for op in range(start, stop)]
    assert ops == list(range(plan.starts[-1]))
