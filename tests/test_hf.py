"""Models from a config.json without weights, and example batches that their own loss accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

from merak_like import hf
from merak_like.partitioner.tracer import trace
from tests.zoo.hugging_face import CASES

TEXT = ["gpt2", "llama", "mixtral", "bert", "roberta", "distilbert", "t5", "bart", "llama_classification",
        "bert_classification"]  # fmt: skip
IMAGES = ["vit", "swin", "resnet", "convnext"]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100}
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def written(folder: Path, data: Any) -> Path:
    (folder / "config.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def of_zoo(name: str, folder: Path) -> torch.nn.Module:
    """A zoo model with real weights; its config is written into the folder."""
    model = CASES[name].build()
    config = model.config
    assert not isinstance(config, torch.Tensor | torch.nn.Module)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", TEXT + IMAGES)
def test_the_example_trains_the_real_model_and_traces_the_empty_one(name: str, tmp_path: Path):
    real = of_zoo(name, tmp_path)
    model, example = hf.from_config(tmp_path, batch=3, seq=None if name in IMAGES else 12)
    assert type(model) is type(real)
    assert model.training
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {len(tensor) for tensor in example.values()} == {3}
    assert not any(tensor.is_meta for tensor in example.values())
    loss = real(**example).loss
    assert loss.dim() == 0
    assert loss.isfinite()
    loss.backward()
    assert trace(model, example).graph.outputs["loss"]


@pytest.mark.parametrize("name", [*TEXT, *IMAGES])
def test_an_example_is_made_for_a_model_in_hand(name: str):
    model = CASES[name].build()
    example = hf.example_for(model, 2) if name in IMAGES else hf.example_for(model, 2, 9)
    assert model(**example).loss.isfinite()


def test_the_cache_is_off_and_the_config_names_the_dtype(tmp_path: Path):
    model, _ = hf.from_config(written(tmp_path, GPT2 | {"dtype": "bfloat16"}), batch=1)
    assert model.config.use_cache is False
    assert model.dtype == torch.bfloat16
    model, _ = hf.from_config(tmp_path, batch=1, dtype="float32")
    assert model.dtype == torch.float32


def test_a_file_is_as_good_as_its_folder(tmp_path: Path):
    model, example = hf.from_config(str(written(tmp_path, GPT2) / "config.json"), batch=2)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert example["input_ids"].shape == (2, 64)  # as long as it can be


@pytest.mark.parametrize(
    ("more", "task", "made"),
    [
        (GPT2, None, "GPT2LMHeadModel"),
        (GPT2 | {"architectures": ["GPT2Model"]}, None, "GPT2LMHeadModel"),
        (GPT2 | {"architectures": ["GPT2ForSequenceClassification"]}, None, "GPT2ForSequenceClassification"),
        (GPT2 | {"architectures": ["GPT2LMHeadModel"]}, "token-classification", "GPT2ForTokenClassification"),
        (BERT, None, "BertForMaskedLM"),
        (BERT | {"is_decoder": True}, None, "BertLMHeadModel"),
        (BERT | {"architectures": ["BertForPreTraining"]}, None, "BertForMaskedLM"),
        (BERT | {"architectures": ["BertLMHeadModel"]}, None, "BertLMHeadModel"),
    ],
)
def test_the_task_is_the_architectures_or_the_one_asked_for(
    more: dict[str, Any], task: str | None, made: str, tmp_path: Path
):
    model, example = hf.from_config(written(tmp_path, more), batch=2, seq=8, task=task)
    assert type(model).__name__ == made
    assert trace(model, example).graph.ops


@pytest.mark.parametrize(
    "more", [{"num_labels": 1}, {"num_labels": 5}, {"problem_type": "multi_label_classification", "num_labels": 4},
             {"problem_type": "regression", "num_labels": 3}],
)  # fmt: skip
def test_labels_are_of_the_kind_the_loss_wants(more: dict[str, Any], tmp_path: Path):
    config = BERT | {"architectures": ["BertForSequenceClassification"]} | more
    model, example = hf.from_config(written(tmp_path, config), batch=2, seq=8)
    real = type(model)(model.config)
    assert real(**example).loss.isfinite()


def test_masked_labels_ask_for_a_part_and_text_ends_in_its_end(tmp_path: Path):
    _, example = hf.from_config(written(tmp_path, BERT), batch=2, seq=70)
    assert 0.1 < (example["labels"] != -100).float().mean() < 0.2
    _, example = hf.from_config(written(tmp_path, GPT2 | {"eos_token_id": 7}), batch=2)
    assert example["input_ids"][:, -1].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "is not JSON"),
        ({"hidden": 3}, "no model_type"),
        ("[1]", "no model_type"),
        (GPT2 | {"model_type": "gtp2"}, "nearest names are gpt2"),
        ({"model_type": "nothing_like_it", "auto_map": {}}, "its own code, which is never run"),
        (GPT2 | {"n_embd": "wide"}, "config of this gpt2 is not valid"),
        (GPT2 | {"architectures": ["GPT2DoubleHeadsModelX"]}, "choose task causal-lm or"),
        (
            {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]},
            "no example batch is known for Wav2Vec2ForCTC",
        ),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "no example batch is known for CLIPModel"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(data: Any, said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        hf.from_config(written(tmp_path, data), batch=1)


def test_what_was_asked_is_refused_with_what_there_is(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no config\.json in"):
        hf.from_config(tmp_path, batch=1)
    with pytest.raises(ValueError, match="there is no file or folder"):
        hf.from_config(tmp_path / "nowhere", batch=1)
    written(tmp_path, GPT2)
    with pytest.raises(ValueError, match="in its folders"):
        hf.from_config(tmp_path.parent, batch=1)
    with pytest.raises(ValueError, match="positions for 1 to 64 tokens"):
        hf.from_config(tmp_path, batch=1, seq=65)
    with pytest.raises(ValueError, match="positions for 1 to 64 tokens"):
        hf.from_config(tmp_path, batch=1, seq=0)
    with pytest.raises(ValueError, match="batch = 0"):
        hf.from_config(tmp_path, batch=0)
    with pytest.raises(ValueError, match="no task 'causal', perhaps 'causal-lm'"):
        hf.from_config(tmp_path, batch=1, task="causal")
    with pytest.raises(ValueError, match="no masked-lm model of type 'gpt2': use task causal-lm or"):
        hf.from_config(tmp_path, batch=1, task="masked-lm")
    with pytest.raises(ValueError, match="'int8' is not a dtype of weights"):
        hf.from_config(tmp_path, batch=1, dtype="int8")


def test_positions_count_from_the_padding_on(tmp_path: Path):
    config = BERT | {"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}
    model, example = hf.from_config(written(tmp_path, config), batch=1)
    assert example["input_ids"].shape == (1, 64)
    assert type(model)(model.config)(**example).loss.isfinite()
    with pytest.raises(ValueError, match="positions for 1 to 64 tokens"):
        hf.example_for(model, 1, 65)


def test_images_take_no_tokens_and_strangers_no_example(tmp_path: Path):
    with pytest.raises(ValueError, match="takes images, not tokens"):
        hf.example_for(CASES["vit"].build(), 1, 8)
    with pytest.raises(ValueError, match="no example batch is known for Linear"):
        hf.example_for(torch.nn.Linear(2, 2), 1)
