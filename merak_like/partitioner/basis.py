"""What a plan was made from: the traced graph and the arguments, kept beside the decisions so that others can be tried.

With it a plan file explains itself, and is planned again under other conditions, without the model, torch or a trace.
It is no part of the plan's digest: it decides nothing.

The graph is packed: JSON rows of the fields that are not at their defaults, compressed, some 20 to 40 bytes an op.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, cast

if TYPE_CHECKING:
    from merak_like.partitioner.graph import ProxyGraph
    from merak_like.partitioner.hardware import Hardware
    from merak_like.partitioner.plan import Plan

PACKAGE = "merak_like.partitioner."
"""Data of these modules only is made from a file."""
KIND = "kind of"
"""The key that names the class of an object in JSON."""
P = ParamSpec("P")


class Basis:
    """The graph and the arguments of ``make_plan``, either of them as objects or as a file has them.

    ``source`` says how the model was named on the command line, so that it can be named again: ``{"model": "gpt2"}``.
    """

    def __init__(
        self, options: Mapping[str, Any], graph: ProxyGraph | str, source: Mapping[str, Any] | None = None
    ) -> None:
        self._options, self._given = options, graph
        self.source: Mapping[str, Any] = source or {}

    @cached_property
    def graph(self) -> ProxyGraph:
        """The traced graph. Raises ValueError where the file's is damaged or of another version."""
        return cast("ProxyGraph", unpacked(self._given)) if isinstance(self._given, str) else self._given

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """The arguments that ``make_plan`` got beside the graph."""
        return cast(Mapping[str, Any], _object(self._options))

    @property
    def hardware(self) -> Hardware:
        """What the costs are for."""
        from merak_like.partitioner.hardware import hardware_named

        asked = self.options["hardware"]
        return hardware_named(asked) if isinstance(asked, str) else asked

    def remembering(self, source: Mapping[str, Any], **options: Any) -> Basis:
        """The same with other options, and the words that named the model."""
        return Basis({**self.options, **options}, self._given, source)

    def data(self) -> dict[str, Any]:
        """For a JSON file."""
        packs = self._given if isinstance(self._given, str) else packed(self._given)
        return {"options": _data(self._options), "source": dict(self.source), "graph": packs}

    @classmethod
    def of_data(cls, data: Any) -> Basis:
        """Read ``data``; what is wrong inside is told when it is asked for."""
        if not isinstance(data, dict) or set(cast(dict[str, Any], data)) != {"options", "source", "graph"}:
            raise ValueError("a plan's basis has options, source and graph, or is null")
        found = cast(dict[str, Any], data)
        return cls(found["options"], str(found["graph"]), found["source"])


def remembered(make: Callable[P, Plan]) -> Callable[P, Plan]:
    """Let a planner keep, in the plan it makes, what it made it from."""
    from dataclasses import replace
    from inspect import signature  # here: who only reads plans need not wait for it

    names = signature(make)

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Plan:
        options = dict(names.bind(*args, **kwargs).arguments)
        graph, sources = options.pop("graph"), options.pop("sources", None)
        options.pop("thorough", None)
        if sources is not None:  # what one rank runs is enough to plan the same degree of tensor parallelism again
            from merak_like.partitioner.software import TORCH

            together = options.get("sequence_parallel", False)
            software = options.get("software") or TORCH
            graph = sources.rank(options["mesh"].tp, software, sequence_parallel=together)
        return replace(make(*args, **kwargs), basis=Basis(options, graph))

    return made


def packed(item: Any) -> str:
    """Frozen data as compressed text."""
    kinds: dict[str, list[str]] = {}
    rows = _rows(item, kinds)
    text = json.dumps({"kinds": kinds, "data": rows}, separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(text: str) -> Any:
    """What ``packed`` packed. Raises ValueError where that is not possible."""
    try:
        data = json.loads(zlib.decompress(base64.b85decode(text)))
        kinds = {name: (_kind(name), held) for name, held in data["kinds"].items()}
        return _unrow(data["data"], kinds)
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise ValueError(f"what the plan was made from cannot be read ({error}): make the plan again") from None


def _rows(item: Any, kinds: dict[str, list[str]]) -> Any:
    """A dataclass becomes ``[["Op"], values without the defaults at the end]``; all other data stays as it is."""
    if is_dataclass(item) and not isinstance(item, type):
        name = _name(type(item))
        held = kinds.setdefault(name, [f.name for f in fields(item) if f.init])
        values = [getattr(item, one) for one in held]
        defaults = [f.default for f in fields(item) if f.init]
        while values and defaults[len(values) - 1] is not MISSING and values[-1] == defaults[len(values) - 1]:
            values.pop()
        return {name: [_rows(value, kinds) for value in values]}
    if isinstance(item, tuple | list):
        return [_rows(one, kinds) for one in cast(tuple[Any, ...], item)]
    if isinstance(item, Mapping):
        return {"": [[key, _rows(one, kinds)] for key, one in cast(Mapping[str, Any], item).items()]}
    return item


def _unrow(item: Any, kinds: Mapping[str, tuple[Any, list[str]]]) -> Any:
    if isinstance(item, list):
        return tuple(_unrow(one, kinds) for one in cast(list[Any], item))
    if isinstance(item, dict):
        ((name, values),) = cast(dict[str, list[Any]], item).items()
        if name == "":
            return {key: _unrow(one, kinds) for key, one in values}
        kind, held = kinds[name]
        return kind(**{one: _unrow(value, kinds) for one, value in zip(held, values, strict=False)})
    return item


def _data(item: Any) -> Any:
    """The same for few objects, to be read by people: ``{"kind of": "hardware.Link", "bandwidth": 1e9, ..}``."""
    if is_dataclass(item) and not isinstance(item, type):
        return {KIND: _name(type(item)), **{f.name: _data(getattr(item, f.name)) for f in fields(item) if f.init}}
    if isinstance(item, Mapping):
        return {key: _data(one) for key, one in cast(Mapping[str, Any], item).items()}
    if isinstance(item, tuple | list):
        return [_data(one) for one in cast(list[Any], item)]
    return item


def _object(item: Any) -> Any:
    if isinstance(item, list):
        return tuple(_object(one) for one in cast(list[Any], item))
    if isinstance(item, Mapping):
        made = {key: _object(one) for key, one in cast(Mapping[str, Any], item).items()}
        return _kind(made.pop(KIND))(**made) if KIND in made else made
    return item


def _name(kind: type) -> str:
    assert kind.__module__.startswith(PACKAGE), f"{kind} is not data of a plan"
    return f"{kind.__module__.removeprefix(PACKAGE)}.{kind.__qualname__}"


def _kind(name: str) -> Any:
    """The dataclass of that name, if it is one of the package's."""
    module, _, word = name.rpartition(".")
    found = getattr(import_module(PACKAGE + module), word, None) if module.replace(".", "").isidentifier() else None
    if not isinstance(found, type) or not is_dataclass(found):
        raise ValueError(f"{name!r} is no data of a plan")
    return found
