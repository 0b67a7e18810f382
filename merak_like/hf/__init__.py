"""The one door to transformers: models without weights from a ``config.json``, and example batches with labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import transformers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Hugging Face models need transformers, but {error}: pip install 'merak-like[hf]'", name=error.name
    ) from None
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Batch = dict[str, Tensor]

SEQ = 1024
"""Tokens of a sample when nobody says, or as many as the model has positions."""


def from_config(
    folder: str | Path | Mapping[str, Any], *, batch: int, seq: int | None = None, task: str | None = None,
    dtype: str | None = None,
) -> tuple[transformers.PreTrainedModel, Batch]:  # fmt: skip
    """Build the model of a ``config.json`` without weights (on the meta device), and an example batch with labels.

    ``folder`` is a file or the folder of ``config.json``, or what stands in it. The task is that of the config's
    ``architectures`` unless given (see ``TASKS``), the dtype of its weights that of the config. Code that comes with a
    model is never run.

    Raises ValueError, with the nearest thing that works, for a config that is not there, not known or not valid.
    """
    config, chosen = configured(folder, task)
    with torch.device("meta"):
        made = {} if dtype is None else {"dtype": _dtype(dtype)}
        model = getattr(transformers, chosen.auto).from_config(config, **made).train()
    return model, example_for(model, batch, seq)


def configured(folder: str | Path | Mapping[str, Any], task: str | None) -> tuple[Any, Task]:
    """The config, ready to be trained with, and the task of its model. Raises ValueError as ``from_config`` does."""
    data = dict(folder) if isinstance(folder, Mapping) else read_config(folder)
    config = _config(data)
    chosen = _task_named(task) if task else _task_of(config, data)
    if config.model_type not in chosen.types:
        fitting = [name for name, other in TASKS.items() if config.model_type in other.types]
        raise ValueError(
            f"transformers has no {chosen.name} model of type {config.model_type!r}: "
            + (f"use task {' or '.join(fitting)}" if fitting else "write a function that returns (model, example)")
        )
    for part in (config, config.get_text_config()):
        part.use_cache = False
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0  # classifiers of decoders refuse batches without one
    return config, chosen


def example_for(model: nn.Module, batch: int, seq: int | None = None) -> Batch:
    """A small batch that the model can be trained on, labels included: real shapes, meaningless content.

    ``seq`` is the number of tokens of a sample; leave it out for images. Raises ValueError for a model whose task is
    not in ``TASKS`` and for more tokens than it has positions.
    """
    if batch < 1:
        raise ValueError(f"batch = {batch} is not a number of samples: give a whole number of at least 1")
    name = type(model).__name__
    task = next((t for t in TASKS.values() if any(c.__name__ in t.models for c in type(model).__mro__)), None)
    if task is None or not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"no example batch is known for {name}: known are {', '.join(TASKS)} models of transformers; "
            "write a function that returns (model, example)"
        )
    config = model.config
    if task.of_images:
        if seq is not None:
            raise ValueError(f"seq = {seq}, but {name} takes images, not tokens: leave seq out")
        return _images(config, batch, model.dtype)
    most = _positions(model)
    seq = min(SEQ, most or SEQ) if seq is None else seq
    if seq < 1 or (most is not None and seq > most):
        raise ValueError(f"seq = {seq} tokens, but {name} has positions for 1 to {most or 'any number of'} tokens")
    text = config.get_text_config()
    ids = torch.randint(min(10, text.vocab_size // 2), text.vocab_size, (batch, seq), generator=_generator())
    end = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    if end is not None and 0 <= end < text.vocab_size:
        ids[:, -1] = end  # some classifiers read the state of the last token of a text
    return {"input_ids": ids, "labels": task.labels(ids, config)}


def _images(config: Any, batch: int, dtype: torch.dtype) -> Batch:
    side = getattr(config, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else side
    pixels = torch.zeros((batch, getattr(config, "num_channels", 3), height, width), dtype=dtype)
    return {"pixel_values": pixels, "labels": _class_labels(pixels, config)}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _next_tokens(ids: Tensor, config: Any) -> Tensor:
    return ids.clone()


def _some_tokens(ids: Tensor, config: Any) -> Tensor:
    """Every seventh token is asked for, about the usual 15 %."""
    return ids.masked_fill(torch.arange(ids.shape[1]) % 7 != 0, -100)


def _class_labels(inputs: Tensor, config: Any) -> Tensor:
    if config.problem_type == "multi_label_classification":
        return torch.zeros(len(inputs), config.num_labels)
    if config.num_labels == 1 or config.problem_type == "regression":
        return torch.zeros(len(inputs), *[config.num_labels] * (config.num_labels > 1))
    return torch.arange(len(inputs)) % config.num_labels


def _token_classes(ids: Tensor, config: Any) -> Tensor:
    return ids % config.num_labels


@dataclass(frozen=True)
class Task:
    """What a model is trained for: transformers' auto class, and how the labels of its inputs look."""

    name: str
    auto: str
    mapping: str
    labels: Callable[[Tensor, Any], Tensor]
    of_images: bool = False

    @property
    def models(self) -> frozenset[str]:
        """Names of the model classes of this task."""
        names = self._names.values()
        return frozenset(one for name in names for one in ([name] if isinstance(name, str) else name))

    @property
    def types(self) -> frozenset[str]:
        """The ``model_type`` of every config that has a model of this task."""
        return frozenset(self._names)

    @property
    def _names(self) -> Mapping[str, Any]:
        return getattr(modeling_auto, f"MODEL_FOR_{self.mapping}_MAPPING_NAMES")


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("seq2seq-lm", "AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", _next_tokens),
        Task("masked-lm", "AutoModelForMaskedLM", "MASKED_LM", _some_tokens),
        Task("causal-lm", "AutoModelForCausalLM", "CAUSAL_LM", _next_tokens),
        Task("image-classification", "AutoModelForImageClassification", "IMAGE_CLASSIFICATION", _class_labels, True),
        Task("sequence-classification", "AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", _class_labels),
        Task("token-classification", "AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", _token_classes),
    )
}
"""Tasks by name. A config without ``architectures`` gets the first that transformers knows for its type."""


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r} is not a dtype of weights: use float32, bfloat16, float16 or float64")
    return dtype


def _task_named(name: str) -> Task:
    if name not in TASKS:
        near = get_close_matches(name, TASKS, 1)
        raise ValueError(f"no task {name!r}{f', perhaps {near[0]!r}' if near else ''}: there are {', '.join(TASKS)}")
    return TASKS[name]


def _task_of(config: Any, data: Mapping[str, Any]) -> Task:
    """The task that the architecture is for; for a bare body (``GPT2Model``) the first task of its type."""
    architecture = next(iter(data.get("architectures") or ()), "")
    for task in TASKS.values():
        if architecture in task.models:
            return task
    # A composite (CLIP: a text and an image model) has no task of its own, though parts of it do.
    bare = not architecture or (architecture.endswith(("Model", "ForPreTraining")) and not config.sub_configs)
    known = [task for task in TASKS.values() if config.model_type in task.types]
    if getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False):
        known.sort(key=lambda task: task.name != "causal-lm")
    if bare and known:
        return known[0]
    raise ValueError(
        f"no example batch is known for {architecture or config.model_type}: known are {', '.join(TASKS)} models"
        + (f"; for this type choose task {' or '.join(t.name for t in known)}," if known else ",")
        + " or write a function that returns (model, example)"
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """What stands in a ``config.json``; ``folder`` is the file or its folder."""
    path = Path(folder).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        beside = sorted(p.parent.name for p in path.glob("*/config.json")) if path.is_dir() else []
        below = f", but in its folders {', '.join(beside[:5])}" if beside else ""
        raise ValueError(
            f"no config.json in {str(path)!r}{below}" if path.is_dir() else f"there is no file or folder {str(path)!r}"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ValueError(f"{file} has no model_type: it is not the config of a transformers model")
    return data


def _config(data: dict[str, Any]) -> Any:
    kind = data["model_type"]
    if kind not in CONFIG_MAPPING:
        near = get_close_matches(kind, list(CONFIG_MAPPING.keys()), 3, 0.5)
        own = (
            "it comes with its own code, which is never run here" if "auto_map" in data else "it may be newer or older"
        )
        raise ValueError(
            f"transformers {transformers.__version__} has no model_type {kind!r} ({own})"
            + (f"; the nearest names are {', '.join(near)}" if near else "")
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:  # each config validates in its own way
        raise ValueError(f"the config of this {kind} is not valid: {' '.join(str(error).split())}") from error


def _positions(model: nn.Module) -> int | None:
    """How many tokens the model has positions for; None where the config sets no limit."""
    for name, module in model.named_modules():
        # RoBERTa counts positions from the padding index on, so that its table is longer than its texts.
        if (
            name.endswith(".position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def initialiser(model: nn.Module) -> Callable[[nn.Module], None]:
    """How this model initialises one of its modules, its non-persistent buffers included.

    Of models in models (a vision encoder with a text decoder) the innermost one says how, as in transformers itself.
    """
    outers = [outer for outer in model.modules() if isinstance(outer, transformers.PreTrainedModel)]
    of = {inner: outer for outer in outers for inner in outer.modules()}

    def initialise(module: nn.Module) -> None:
        of[module]._init_weights(module)

    return initialise


TOKEN_LOSSES = frozenset({"ForCausalLM", "ForMaskedLM", "ForTokenClassification", "ForConditionalGeneration"})
"""transformers' names of losses that are means over tokens."""


def loss_weight(model: nn.Module) -> Callable[[Mapping[str, Any]], int] | None:
    """How many items this model's own mean loss is the mean of, for a batch with ``labels``.

    Language models average over target tokens, -100 excluded (a causal one over ``labels[:, 1:]``); classifiers over
    samples. None where the model does not say.
    """
    model = getattr(model, "get_base_model", lambda: model)()  # a model that PEFT added to counts as it did before
    kind = getattr(model, "loss_type", None)
    if kind is None and type(model).__name__ in TASKS["causal-lm"].models:
        kind = "ForCausalLM"  # what transformers falls back to
    if kind not in TOKEN_LOSSES:
        return None
    shifted = kind == "ForCausalLM" or (kind == "ForConditionalGeneration" and not model.config.is_encoder_decoder)  # type: ignore[union-attr]

    def count(batch: Mapping[str, Any]) -> int:
        labels = batch["labels"]
        return int(((labels[:, 1:] if shifted else labels) != -100).sum())

    return count


def save_pretrained(model: nn.Module, path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write config and weights so that ``from_pretrained`` loads them."""
    model.save_pretrained(path, state_dict=dict(state))  # type: ignore[operator]
