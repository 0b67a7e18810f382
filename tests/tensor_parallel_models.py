"""Tiny models for tensor parallelism: what is derived for them, how it probes, and what transformers shards by hand."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from merak_like.partitioner.tensor_parallel import Derived, DerivedBlock, derive
from merak_like.partitioner.tensor_parallel.layout import is_sharded
from merak_like.partitioner.tensor_parallel.probe import Difference, probe
from merak_like.partitioner.tracer import LossFn, Trace
from merak_like.partitioner.tracer.fine import fine_trace, steps
from tests.zoo import sweep
from tests.zoo.case import mean_square
from tests.zoo.hugging_face import CASES
from tests.zoo.shrink import shrink

BODY = "body"
"""In place of a task: the family has a plan but none of the sweep's tasks, so its bare body is built."""


@dataclass(frozen=True)
class Subject:
    """A model with its batch, fine trace and derivation."""

    model: nn.Module
    batch: Any
    trace: Trace
    derived: Derived

    def probe(self) -> Difference:
        """Sharded against whole."""
        return probe(self.model, self.trace, self.derived, self.batch)


def subject(model: nn.Module, batch: Any, tp: int = 2, loss_fn: LossFn | None = None) -> Subject:
    """Trace and derive."""
    traced = fine_trace(model, batch, loss_fn)
    return Subject(model, batch, traced, derive(traced.graph, steps(traced), tp, constants=traced.constants))


def named_case(name: str, tp: int = 2) -> Subject:
    """One of the zoo's named cases."""
    torch.manual_seed(0)
    return subject(CASES[name].build(), CASES[name].batch(), tp)


def pair(model_type: str, task: str, tp: int = 2) -> Subject:
    """A (model type, task) pair of the sweep, or the body of a model type."""
    torch.manual_seed(0)
    if task == BODY:
        return subject(*_body(model_type), tp, _mean_square)
    model, batch = sweep.build(model_type, task)
    computes = "computes no loss" not in sweep.read()["notes"].get(f"{model_type}/{task}", "")
    return subject(model, batch, tp, None if computes else _loss_of)


def _loss_of(output: Any, batch: Any) -> torch.Tensor:
    return sweep.loss_of(output)


def _mean_square(output: Any, batch: Any) -> torch.Tensor:
    return mean_square(output[0])


def _body(model_type: str) -> tuple[nn.Module, Any]:
    """The last model class of the family's file that is built from its config, and text for it."""
    config: Any = shrink(model_type)
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    classes = [
        c for _, c in inspect.getmembers(module, inspect.isclass) if getattr(c, "config_class", None) is type(config)
    ]
    classes = [c for c in classes if c.__module__ == module.__name__ and not re.search("PreTrained|For", c.__name__)]
    if "mrope_section" in inspect.getsource(module):
        half = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
        config.rope_parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    build: Any = classes[-1]
    model = build(config).train()
    batch = sweep.batch_for(model, "causal-lm")
    batch.pop("labels", None)
    return model, batch


def families_with_a_plan() -> Iterator[tuple[str, str]]:
    """Every model type that transformers shards by hand, with a task it is built for."""
    tasks = dict(reversed([name.split("/") for name in sweep.read()["trains"]]))
    for model_type in CONFIG_MAPPING:
        if getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None):
            yield model_type, tasks.get(model_type, BODY)


DIMENSION = {
    "colwise": 0, "colwise_gather_output": 0, "colwise_rep": 0, "rowwise": 1, "rowwise_split_input": 1,
    "rowwise_rep": 1, "packed_colwise": -2, "packed_rowwise": -1, "embedding_rowwise": 0, "embedding_colwise": 1,
}  # fmt: skip
"""The dimension of a weight that each hand-written style shards; experts have one more in front."""


def hand_plan(model: nn.Module) -> dict[str, tuple[int, str]]:
    """The dimension of every weight that transformers' plan shards, and the style."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    found: dict[str, tuple[int, str]] = {}
    for prefix, module in model.named_modules():
        plan: Mapping[str, str] = getattr(module, "_tp_plan", None) or {}
        for pattern, style in plan.items():
            if style not in DIMENSION:
                continue
            full = f"{prefix}.{pattern}" if prefix else pattern
            matches = re.compile(re.escape(full).replace(r"\*", r"\d+") + r"(\.weight)?")
            for name in filter(matches.fullmatch, weights):
                rank = weights[name].dim()
                at = DIMENSION[style] + (rank - 2 if DIMENSION[style] >= 0 else 0)
                found.setdefault(name, (at % rank, style))
    return found


def differences(made: Subject) -> tuple[int, dict[str, str]]:
    """How many weights the hand-written plan shards, and those that we do not in the same dimension, with our reason.

    Numbers in names are stars: the same weight of all blocks is one.
    """
    plan, ours = hand_plan(made.model), made.derived.weights
    whole = {name: why for block in made.derived.blocks for name, why in block.whole.items()}
    found: dict[str, str] = {}
    for name, (dim, style) in plan.items():
        first = made.trace.graph.canonical.get(name, name)
        layout = ours.get(first)
        if layout is None or not is_sharded(layout[dim]):
            at = [i for i, factors in enumerate(layout or ()) if is_sharded(factors)]
            why = f"sharded in dimension {at[0]}" if at else whole.get(first, "no step reads it")
            found.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), f"{style}; {why}")
    return len(plan), found


def sharded(block: DerivedBlock) -> dict[str, int]:
    """The dimension of every sharded weight of a block, by its name in the block."""
    return {
        name.removeprefix(f"{block.name}."): next(i for i, factors in enumerate(layout) if is_sharded(factors))
        for name, layout in block.weights.items()
    }
