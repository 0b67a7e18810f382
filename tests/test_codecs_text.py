"""Codecs by name: what text means, that it comes back, and what is said about mistakes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.runtime.codecs import CODECS, codec
from merak_like.runtime.codecs.chain import Chain, Duplex


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("int8", "int(8)"),
        ("int4", "int(4)"),
        ("int", "int(8)"),
        (" topk( 0.1 ) + int8 ", "topk(0.1)+int(8)"),
        ("topk(1)", "topk(1)"),
        ("c3sl8", "c3sl(8)"),
        ("c3sl(4, unitary=True)", "c3sl(4, True)"),
        ("c3sl(seed=3)", "c3sl(4, seed=3)"),
        ("aqsgd(4)|int8", "aqsgd(4)|int(8)"),
        ("topk(0.1)+int4+deflate|fp16", "topk(0.1)+int(4)+deflate(1)|fp16"),
        ("sign('channel')", "sign('channel')"),
    ],
)
def test_text_means(text: str, means: str):
    assert codec(text).text == str(codec(text)) == means
    assert codec(means).text == means


def test_arguments_may_be_given_beside_a_name():
    assert codec("aqsgd", bits=2).text == "aqsgd(2)"
    assert codec("topk", share=0.25).text == "topk(0.25)"


@given(st.recursive(st.sampled_from(list(CODECS)), lambda inner: st.lists(inner, min_size=2, max_size=3).map("+".join)))
@settings(max_examples=50)
def test_every_text_comes_back(text: str):
    made = codec(text)
    assert codec(made.text).text == made.text
    assert isinstance(made, Chain) == ("+" in text)


def test_each_call_makes_a_codec_of_its_own():
    assert codec("aqsgd") is not codec("aqsgd")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("topq(0.1)", r"no codec 'topq' .* did you mean 'topk'\? There are identity, fp16"),
        ("fp15", "did you mean 'fp16'"),
        ("zstd", "did you mean"),
        ("int9", "bits must be 1 to 8 here, the nearest is 8"),
        ("int0", "the nearest is 1"),
        ("int(1, stochastic=True)", "bits must be 2 to 8 here, the nearest is 2"),
        ("int(4, 'row')", "per must be one of channel, sample, tensor, found 'row'"),
        ("topk(0)", "above 0 and at most 1"),
        ("topk(10)", "above 0 and at most 1"),
        ("randtopk(0.1, 2)", "alpha is a probability"),
        ("c3sl(0)", "1 sample or more"),
        ("deflate(10)", "level must be 1"),
        ("aqsgd(4, 'fp8')", "store must be one of same, fp16, bf16"),
        ("int(bist=4)", "no argument 'bist': did you mean 'bits'"),
        ("int(4, bits=4)", "given bits twice"),
        ("int('four')", "bits is of the kind of 8, found 'four'"),
        ("int(True)", "found True"),
        ("fp16(3)", r"takes 0 arguments \(none\), found 1"),
        ("int(x)", "no number, word or truth value"),
        ("int8|int8|int8", "two directions"),
        ("topk(0.1)+(int8|int4)", "two or more single codecs"),
        ("int8*2", "cannot be read"),
        ("topk(", "cannot be read"),
        ("", "cannot be read"),
        ("__import__('os')", "no codec '__import__'"),
        ("int8" + "+int8" * 200, "at most 500 characters"),
        ("-" * 400 + "int8", "cannot be read"),
    ],
)
def test_mistakes_are_named_with_the_nearest_that_is_right(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        codec(text)


def test_arguments_beside_several_parts_are_refused():
    with pytest.raises(ValueError, match="write bits into the one it is for"):
        codec("topk(0.1)+int8", bits=4)


def test_both_directions_have_their_own_codec_and_state():
    link = codec("aqsgd(4)|topk(0.5)")
    assert isinstance(link, Duplex)
    assert sorted(link.state_dict()) == ["forward.order"]
