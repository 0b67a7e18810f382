"""A run as one file: YAML, checked field by field, every key of which the command line can override.

model: {path: gpt2}
data: {train: corpus.jsonl, seq: 512}
training: {steps: 1000, batch: 64}
parallelism: {dp: 2, pp: 2}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from merak_like.trainer.settings import Count, Section, Settings, Share


class Model(Section):
    """What is trained. Code that comes with a checkpoint is never run, and nothing is downloaded."""

    path: Path | None = None
    """A folder with a ``config.json``; where it has weights, training starts from them."""
    function: str | None = None
    """``module:function`` returning ``(model, example)`` or ``(model, example, loss_fn)``."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of ``config.json``: changes to those of ``path``, or all of them."""
    task: str | None = None
    """``causal-lm``, ``sequence-classification``, ...; None: that of the config."""
    dtype: str | None = None
    pretrained: bool | None = None
    """Whether to start from the weights in ``path``; None: if there are any."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.function and (self.path or self.config):
            raise ValueError("model.function makes the model itself: leave out model.path and model.config")
        if not (self.function or self.path or self.config):
            raise ValueError("say model.path (a folder with a config.json), model.config or model.function")
        return self


class Data(Section):
    """What it is trained on."""

    train: str | None = None
    """A file, a folder, or a pattern such as ``docs/*.jsonl``; ``synthetic`` makes samples up."""
    eval: str | None = None
    eval_share: Share = 0.0
    """The share of ``train`` that is kept for evaluation; it is the same in every run with this seed."""
    function: str | None = None
    """``module:function`` returning a dataset, or ``(train, eval)``; samples as the model's batch has them."""
    format: Literal["auto", "jsonl", "parquet", "text", "tokens", "datasets"] = "auto"
    """``auto``: what the name says. ``text``: each file is one document. ``tokens``: an ``.npy`` array."""
    text: str = "text"
    """The field of a record that holds the text."""
    label: str | None = None
    """The field that holds the class, for classifiers: a number or a name."""
    tokenizer: Path | None = None
    """A folder; None: ``model.path``."""
    seq: Count = 512
    """Tokens of a row; a longer text is cut."""
    packing: Literal["documents", "stream", "off"] = "documents"
    """``documents``: several to a row, none sees another. ``stream``: one text without borders, read from a token
    file. ``off``: one to a row, padded. Classifiers are never packed."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.train is None) == (self.function is None):
            raise ValueError("say either data.train (a file, a folder, a pattern, or synthetic) or data.function")
        return self


class Lora(Section):
    """Train small additions instead of the weights (Hu et al., ICLR 2022), through PEFT."""

    r: Count = 8
    alpha: float = 16.0
    dropout: Share = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    base: Literal["full", "nf4", "fp4"] = "full"
    """How the frozen weights are kept: in four bits a number, by bitsandbytes."""


class Run(Settings):
    """A whole run."""

    model: Model
    data: Data
    lora: Lora | None = None


def load(path: Path | None, changes: Sequence[str] = ()) -> Run:
    """Read a run's file and apply ``key.key=value`` changes, whose values are YAML.

    Raises ValueError naming every wrong key, with the nearest one, and every wrong value.
    """
    data = {} if path is None else _read(path)
    for change in changes:
        keys, sign, text = change.partition("=")
        if not sign:
            raise ValueError(f"{change!r} is not key=value: write for example optimizer.lr=1e-4")
        _set(data, keys.split("."), yaml.load(text, _Loader) if text else None, change)
    try:
        return Run.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(_problem(one, data) for one in error.errors()))
        raise ValueError(f"{path or 'the run'}: {problems}") from None


def to_yaml(run: Settings) -> str:
    """Every field as it was understood; ``load`` reads it back to the same run."""
    return yaml.safe_dump(run.model_dump(mode="json", by_alias=True), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for a word; here it is the number it looks like."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = (
            get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
            if path.parent.is_dir()
            else []
        )
        raise ValueError(f"there is no file {str(path)!r}{f', perhaps {near[0]!r}' if near else ''}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold sections such as model: and data:, but a {type(data).__name__}")
    return cast(dict[str, Any], data)


def _set(data: dict[str, Any], keys: Sequence[str], value: Any, change: str) -> None:
    *outer, last = keys
    for key in outer:
        if not isinstance(data.setdefault(key, {}), dict):
            raise ValueError(f"{change!r}: {key} is not a section but {data[key]!r}")
        data = data[key]
    data[last] = value


def _problem(error: Any, data: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"no key {where!r}{nearest(where)}"
    told = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], Mapping) or error["type"] == "missing" else f", not {error['input']!r}"
    return f"{where}: {told}{given}" if where and where.split(".")[-1] not in told else f"{told}{given}"


def nearest(wrong: str) -> str:
    """The key that was probably meant: the nearest one, or the one of that name in another section."""
    keys = list(every_key(Run))
    same = [key for key in keys if key.rpartition(".")[2] == wrong.rpartition(".")[2]]
    near = same or get_close_matches(wrong, keys, 1)
    return f", perhaps {near[0]!r}" if near else ""


def every_key(section: type[BaseModel], before: str = "") -> list[str]:
    """All keys of a section and the sections in it, with dots."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        found.append(f"{before}{field.alias or name}")
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += every_key(kind, f"{before}{name}.")
    return found
