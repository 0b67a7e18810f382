"""Small things of a checkpoint as bytes: only what can be read back without running anybody's code."""

from __future__ import annotations

import io
import pickle
import random
import re
from collections.abc import Mapping
from typing import Any

import numpy
import torch

Pack = bytes
REFUSALS = (pickle.PickleError, AttributeError, TypeError, RuntimeError)
"""How pickle and torch say that a value cannot be written, or not be read back."""


def pack(what: str, value: Any) -> Pack:
    """Numbers, text, tensors and containers of them as bytes. Raises ValueError for anything else."""
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        unpack(stream.getvalue())
    except REFUSALS as error:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = f"it has a {found[1]}" if found else str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"{what} cannot be kept in a checkpoint ({reason}): give numbers, text, tensors and containers of them, or "
            "an object whose state_dict() has only those"
        ) from None
    return stream.getvalue()


def pack_once(what: str, value: Any, seen: dict[bytes, Pack]) -> Pack:
    """The same, but what is like a value before is not packed and read back again: weights are many and much alike."""
    try:
        key = pickle.dumps(value)
    except REFUSALS:
        return pack(what, value)  # which tells what cannot be kept, and why
    if key not in seen:
        seen[key] = pack(what, value)
    return seen[key]


def unpack(data: Pack) -> Any:
    """What ``pack`` was given."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def pack_state(state: Mapping[str, Any]) -> dict[str, Pack]:
    """Each object by its ``state_dict()``, other values as they are."""
    return {
        key: pack(f"state[{key!r}]", value.state_dict() if hasattr(value, "state_dict") else value)
        for key, value in state.items()
        if value is not None
    }


def refuse_missing(saved: Mapping[str, Any], into: Mapping[str, Any]) -> None:
    """Raise ValueError for an object that the checkpoint knows nothing of."""
    missing = [key for key, value in into.items() if hasattr(value, "load_state_dict") and key not in saved]
    if missing:
        raise ValueError(f"the checkpoint has no state {missing[0]!r}, it has {sorted(saved)}: save it under that name")


def give_back(saved: Mapping[str, Any], into: Mapping[str, Any]) -> None:
    """Hand each object its state."""
    for key, value in into.items():
        if hasattr(value, "load_state_dict"):
            value.load_state_dict(saved[key])


def random_states() -> dict[str, Any]:
    """The generators of torch, Python and NumPy in this process."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numbers = torch.from_numpy(numpy.asarray(keys).astype(numpy.int64))
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": [kind, numbers, *rest]}


def set_random_states(saved: Mapping[str, Any]) -> None:
    """Go on where ``random_states`` was."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    random.setstate(saved["python"])
    kind, numbers, *rest = saved["numpy"]
    numpy.random.set_state((kind, numbers.numpy().astype(numpy.uint32), *rest))


def distinct(packs: Mapping[str, Pack]) -> tuple[list[Pack], dict[str, int]]:
    """Many equal things by name, each kept once."""
    index: dict[Pack, int] = {}
    of = {name: index.setdefault(data, len(index)) for name, data in packs.items()}
    return list(index), of
