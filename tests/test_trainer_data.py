"""Data: the order is a function of one integer, documents do not see each other, batches are what they should be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from merak_like import auto_parallel
from merak_like.trainer.data.collate import IGNORED, Pad, stack
from merak_like.trainer.data.documents import PaddingFree, documents_of, fill_rows, separated
from merak_like.trainer.data.loader import Loader, Share
from merak_like.trainer.data.order import Order
from merak_like.trainer.data.tokens import Packed

# --- order -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(samples=st.integers(1, 300), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_epoch_has_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    assert sorted(Order(samples, seed).at(epoch * samples, samples)) == list(range(samples))


@settings(max_examples=60)
@given(samples=st.integers(1, 50), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 3))
def test_batches_of_any_sizes_are_runs_of_one_sequence(samples: int, cuts: list[int], seed: int) -> None:
    """A job that goes on with another batch size, or another number of replicas, replays nothing and skips nothing."""
    order, at, found = Order(samples, seed), 0, list[int]()
    for count in cuts:
        found += order.at(at, count)
        at += count
    assert found == order.at(0, at)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_another_number_of_replicas_goes_on_where_the_job_stopped(before: int, after: int) -> None:
    data = list(range(37))

    def steps(replicas: int, first: int, count: int) -> list[int]:
        loaders = [Loader(data, list, Order(37, 5), 8, Share(r, replicas)) for r in range(replicas)]
        return [i for step in range(first, first + count) for loader in loaders for i in loader.at(8 * step)]

    whole = steps(1, 0, 9)
    assert steps(before, 0, 4) + steps(after, 4, 5) == whole  # nearly two epochs, the change within the first


def test_epochs_and_seeds_differ_and_orders_are_shuffled() -> None:
    first, second = (Order(1000).at(e * 1000, 1000) for e in (0, 1))
    assert first != second
    assert Order(1000, 1).at(0, 1000) not in (first, second)
    assert Order(7, shuffle=False).at(5, 5) == [5, 6, 0, 1, 2]
    # of 1000 places, neighbours in the data should hardly ever be neighbours in the order
    assert sum(b == a + 1 for a, b in pairwise(first)) < 10


def test_an_order_of_a_trillion_samples_costs_nothing() -> None:
    assert len(set(Order(10**12).at(3 * 10**11, 1000))) == 1000


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="the data has no samples"):
        Order(0)


# --- batches made ahead ----------------------------------------------------------------------------------------------


def test_batches_made_ahead_are_the_same_and_the_thread_ends() -> None:
    loader = Loader(list(range(20)), list, Order(20, 1), 3)
    before = threading.active_count()
    assert list(loader.ahead(6, 27)) == [loader.at(p) for p in range(6, 27, 3)]
    early = loader.ahead(0, 3000)
    next(early)
    assert threading.active_count() == before + 1
    early.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_step_is_told_which_samples_its_rows_are() -> None:
    data = [torch.tensor(10 * i) for i in range(13)]
    for number in range(2):
        loader = Loader(data, stack, Order(13, 5), 4, Share(number, 2, None, numbered=True))
        for position in range(0, 40, 4):
            about = loader.about(position)
            assert (loader.at(position) / 10).tolist() == about["samples"]
            assert about["batch_is_global"] is False
    assert Loader(data, stack, Order(13, 5), 4).about(4) == {"batch_is_global": True, "samples": None}


def test_an_error_in_the_data_reaches_the_step_that_wants_it() -> None:
    def collate(samples: list[int]) -> list[int]:
        if 7 in samples:
            raise KeyError("sample 7 is broken")
        return samples

    batches = Loader(list(range(20)), collate, Order(20, shuffle=False), 2).ahead(0, 20)
    assert [next(batches) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(KeyError, match="sample 7"):
        next(batches)


def test_samples_that_do_not_stack_are_named() -> None:
    assert stack([(torch.zeros(2), 1), (torch.ones(2), 2)])[0].shape == (2, 2)
    with pytest.raises(ValueError, match=r"sample\['x'\] has the shapes \(2,\) and \(3,\)"):
        stack([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}])


def test_padding_is_not_looked_at_and_not_learned() -> None:
    batch = Pad(9, 4)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3, IGNORED], [4, IGNORED, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert Pad()([{"input_ids": [1], "labels": 2}])["labels"].tolist() == [2]


# --- documents -------------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **small))


def gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))


def eager() -> nn.Module:
    model = llama()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed))


def row(*documents: Tensor) -> dict[str, Tensor]:
    """One row, filled up with two more tokens."""
    ids = torch.cat([*documents, torch.zeros(2, dtype=torch.long)])[None]
    numbers = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)] + [torch.full((2,), -1)])[None]
    return separated(ids, numbers)


@pytest.mark.parametrize("build", [llama, gpt2, eager])
def test_a_document_has_the_loss_and_gradients_it_has_alone(build: Callable[[], nn.Module]) -> None:
    """Whatever stands before and behind it: new positions alone would not do (see the next test)."""
    torch.manual_seed(0)
    model = build().double()
    document = tokens(9, 1)
    alone = model(input_ids=document[None], labels=document[None])
    alone.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for before, behind in ((tokens(5, 2), tokens(7, 3)), (tokens(11, 4), tokens(1, 5))):
        batch = row(before, document, behind)
        inside = torch.zeros_like(batch["labels"], dtype=torch.bool)
        inside[:, len(before) : len(before) + len(document)] = True
        batch["labels"] = batch["labels"].masked_fill(~inside, IGNORED)
        model.zero_grad()
        packed = model(**{**batch, "attention_mask": batch["attention_mask"].double()})
        packed.loss.backward()
        torch.testing.assert_close(packed.loss, alone.loss, rtol=1e-6, atol=1e-6)  # transformers' losses are float32
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-7)
        inside = slice(len(before), len(before) + len(document))
        # eager attention takes its softmax in float32
        torch.testing.assert_close(packed.logits[:, inside], alone.logits, rtol=0, atol=1e-7)


def test_new_positions_alone_would_leak() -> None:
    """What the mask is for: without it the same row gives the document other numbers."""
    torch.manual_seed(0)
    model = llama()
    before, document = tokens(5, 2), tokens(9, 1)
    batch = row(before, document)
    leaky = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=torch.ones(1, 16))
    alone = model(input_ids=document[None])
    assert (leaky.logits[:, 5:14] - alone.logits).abs().max() > 1e-3


def test_packed_rows_train_in_the_engine_like_documents_by_themselves() -> None:
    """The whole way: packed rows, cut into micro-batches, against each document alone in plain PyTorch."""
    torch.manual_seed(0)
    model = llama()
    documents = [tokens(n, n).tolist() for n in (9, 4, 12, 3, 7, 5, 16, 2)]
    packed = Packed(documents, 16)
    batch = packed.collate([packed[i] for i in range(len(packed))])
    items = sum(len(d) - 1 for d in documents)
    losses = [model(input_ids=torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in documents]
    plain = torch.stack(losses).sum() / items
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    engine = auto_parallel(model, example=batch, micro_batches=2, hardware="a100-80gb", device="cpu")
    result = engine.step(batch)
    assert result.tokens == items
    assert result.loss == pytest.approx(plain.item(), abs=1e-6)
    for name, gradient in engine.full_gradients().items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_drawing_of_documents() -> None:
    batch = separated(torch.tensor([[5, 6, 7, 8, 9, 1, 2, 3]]), torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, 2, 3]]
    seen = (batch["attention_mask"][0, 0] == 0).int().tolist()
    assert seen[4] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert seen[5] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert documents_of(torch.tensor([[4, 0, 4, 4, 0, 0, 4]]), 0).tolist() == [[0, 0, 1, 1, 1, 2, 3]]


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 40), max_size=40), width=st.integers(1, 16))
def test_packing_loses_no_token_and_overfills_no_row(lengths: list[int], width: int) -> None:
    rows = fill_rows(lengths, width)
    assert all(0 < sum(stop - start for _, start, stop in pieces) <= width for pieces in rows)
    seen = sorted((number, at) for pieces in rows for number, start, stop in pieces for at in range(start, stop))
    assert seen == [(number, at) for number, length in enumerate(lengths) for at in range(length)]


def test_padding_free_rows_hold_every_sample_with_its_labels() -> None:
    samples = [{"input_ids": list(range(n)), "labels": [IGNORED, *range(1, n)]} for n in (9, 2, 5, 4, 7, 3)]
    batch = PaddingFree(rows=2)(samples)
    assert batch["input_ids"].shape == (2, 15)
    assert int((batch["labels"] != IGNORED).sum()) == sum(n - 1 for n in (9, 2, 5, 4, 7, 3))
    with pytest.raises(ValueError, match="1 samples do not fill 2 rows"):
        PaddingFree(rows=2)(samples[:1])
