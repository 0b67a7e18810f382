"""What there is for a split training: the edge's machine, the host's, and the line between them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from merak_like.partitioner.hardware import Hardware, Link

_SIZES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PLAIN = Link(1e9, 1e-4)


@dataclass(frozen=True)
class Means:
    """Two machines and a line; bytes and seconds."""

    edge: Hardware
    host: Hardware
    uplink: Link
    """From the edge to the host."""
    downlink: Link


def line(rate: str, seconds: float = 0.0) -> Link:
    """A link of so many bits a second, with a latency. Raises ValueError for a rate that is none."""
    return Link(amount(rate, "bit") / 8, seconds)


def amount(text: str, unit: str) -> float:
    """Read ``20 Mbit`` or ``4 GB``: a number, a power of 1000 and the unit, which may be missing.

    Raises ValueError for anything else, and for 0.
    """
    found = re.fullmatch(rf"\s*([0-9.]+(?:e\d+)?)\s*([kmgt]?)(?:{unit}(?:/s|ps)?)?\s*", text, re.IGNORECASE)
    try:
        value = float(found[1]) * _SIZES[found[2].lower()] if found else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{text!r} is no amount: write a number above 0 with its unit, such as 20 M{unit}")
    return value


def machine(name: str, flops: float, memory: float, *, bandwidth: float = 10e9, launch: float = 1e-5) -> Hardware:
    """A machine by the figures people know: flops that matmuls reach, bytes of memory, and their bandwidth."""
    return Hardware(
        name, {"float32": flops}, int(memory), bandwidth, _PLAIN, _PLAIN, 1, efficiency=1.0, half_flops=0.0,
        launch_seconds=launch, source="given",
    )  # fmt: skip
