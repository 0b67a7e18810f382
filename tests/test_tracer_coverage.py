"""The coverage bar of tracing: every named case of the zoo, unmodified, trains in stages as it does whole.

Each is in train mode with dropout on; it is traced once and cut into 2 and into 3 stages at legal positions. Loss,
every gradient (None counts as zeros) and every buffer are compared with the plain model's after one step from the same
seed. Bitwise equality is asserted, but for the models in ADDED: there a weight, or a value that crosses a cut, collects
its gradient from several places, and cutting changes the order of the sum. Those are held to staged.TOLERANCE.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from merak_like.partitioner.tracer import TraceError, trace
from tests.zoo.case import Case, Toy
from tests.zoo.hugging_face import CASES, cases
from tests.zoo.plain import TOYS
from tests.zoo.staged import TOLERANCE, compare

DEFAULTS = list(CASES.values())
VARIANTS = list(cases(attentions=True))

ADDED = frozenset(
    "albert bart deberta_v2 gemma3 m2m_100 marian mbart mpnet mt5 pegasus qwen3_moe shared_module t5 "
    "used_in_three_places".split()
)
"""Equal within rounding; every other case is bitwise equal."""


def check(entry: Case | Toy) -> None:
    torch.manual_seed(0)
    model, batch = entry.build(), entry.batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = compare(model, batch, entry.loss_fn if isinstance(entry, Toy) else None)
    assert found.worst < TOLERANCE, found.where
    if entry.name.split("[")[0] not in ADDED:
        assert found.worst == 0.0, f"equal, but no longer bitwise: {found.where}"


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_a_case_in_stages_equals_the_case_whole(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_so_it_does_with_each_attention_kernel(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("toy", [toy for toy in TOYS.values() if not toy.refused], ids=lambda toy: toy.name)
def test_a_toy_in_stages_equals_the_toy_whole(toy: Toy) -> None:
    check(toy)


REFUSALS = {
    "saved_apply": r"uses the autograd function Staircase through a saved 'Staircase.apply': .*Call Staircase.apply\(",
    "branch_on_activation": r"__bool__\(\) in the model's own forward asks for the data of a tensor, .*torch.where",
    "item_of_activation": r"item\(\) in the model's own forward asks for the data of a tensor, .* depends on",
    "numpy_of_activation": r"numpy\(\) inside the forward of the model's own forward cannot be part of a recorded",
    "size_of_activation": r"__getitem__\(\) in the model's own forward asks for the data of a tensor, .* depends on",
}


@pytest.mark.parametrize("toy", [toy for toy in TOYS.values() if toy.refused], ids=lambda toy: toy.name)
def test_a_toy_that_cannot_be_recorded_is_refused_with_its_reason(toy: Toy) -> None:
    with pytest.raises(TraceError, match=REFUSALS[toy.name]):
        trace(toy.build(), toy.batch(), toy.loss_fn)


def test_every_refused_toy_has_its_message_here() -> None:
    assert REFUSALS.keys() == {toy.name for toy in TOYS.values() if toy.refused}
