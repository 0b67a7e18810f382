"""The report finds what is there to be found: a strong attacker on a wide cut, a weaker one on a narrow cut."""

from __future__ import annotations

import copy

import pytest
import torch

from merak_like.split.half import Source
from merak_like.split.leakage import distance_correlation, leakage
from merak_like.split.messages import Task
from tests import split_models

MODEL, _ = split_models.calm()
SOURCE = Source(lambda: copy.deepcopy(MODEL))
BATCHES = [(split_models.tiny_batch(step), None) for step in range(24)]


def test_a_wide_cut_leaks_nearly_all_and_a_narrow_one_less():
    cuts = ("layers.0:layers.3", "layers.0@4:layers.3", "layers.0@1:layers.3")
    found = [leakage(SOURCE, Task(cut=cut), BATCHES, steps=300) for cut in cuts]
    full, four, one = (each.recovered for each in found)
    assert full > 0.9
    assert full > four > one
    assert [each.numbers for each in found] == [16, 4, 1]
    assert found[0].majority < 0.1
    assert found[0].correlation > found[2].correlation
    assert not any("private" in str(each).lower() or "safe" in str(each).lower() for each in found)
    assert "can read nearly all of the text" in str(found[0])


@pytest.mark.slow
def test_what_a_codec_takes_away_counts():
    bare = leakage(SOURCE, Task(cut="layers.0:layers.3"), BATCHES, steps=200)
    coarse = leakage(SOURCE, Task(cut="layers.0:layers.3", codec="sign"), BATCHES, steps=200)
    assert coarse.recovered < bare.recovered


def test_without_tokens_or_with_too_few_batches_it_says_so():
    with pytest.raises(ValueError, match="four or more batches"):
        leakage(SOURCE, Task(cut="layers.0:layers.3"), BATCHES[:2])


def test_distance_correlation_is_one_for_equals_and_small_for_strangers():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    assert distance_correlation(x, 2 * x) == pytest.approx(1.0)
    assert distance_correlation(x, y) < 0.25


def test_the_gradients_of_a_short_tail_tell_the_labels():
    """A head of one layer sends W'(p - y): a classifier finds y. The most frequent label is no such find."""
    found = leakage(SOURCE, Task(cut="layers.0:head"), BATCHES, steps=150)
    assert found.labels is not None
    assert found.labels.found > 0.9
    assert found.labels.majority < 0.6
    assert "of the labels are found" in str(found)
    assert leakage(SOURCE, Task(cut="layers.0"), BATCHES[:4], steps=1).labels is None  # the host is given them anyway


def test_codecs_that_remember_samples_hide_little_on_either_link():
    both = "aqsgd(4)|int4"
    found = leakage(SOURCE, Task(cut="layers.0:head", codec=both, back_codec=both), BATCHES, steps=150)
    assert found.labels is not None
    assert found.labels.found > 0.9
    assert found.recovered > 5 * found.majority
