"""The table of rules: what an operation does to the axes of its tensors, by its word. One row per family."""

from __future__ import annotations

from collections.abc import Callable

from merak_like.partitioner.tensor_parallel.call import Call

Rule = Callable[[Call], None]
"""Unifies, pins and contracts axes of the operands and says what dimensions the results have."""

RULES: dict[str, Rule] = {}
"""By word (see ``Step.word``). Add rows with ``register``; an operation without a row pins all its axes."""


def register(*words: str) -> Callable[[Rule], Rule]:
    """A decorator that makes a function the rule for some words, replacing what was there::

    @register("my_scale")
    def scale(call: Call) -> None:
        call.linear = "product"
        call.out(call.first.dims)
    """

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(words, rule))
        return rule

    return add
