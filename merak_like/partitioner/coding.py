"""What a codec between stages changes in the seconds of a transfer: fewer bytes, and time to code them.

raw bytes --encode--> raw * share --link--> --decode--> raw bytes
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from merak_like.partitioner.hardware import Hardware, Link

PASSES = 6.0
"""How often a value is read and written by encoding and decoding together, by the time it takes: of ``int8`` on this
project's machine, 1.1 ns a byte of float32 (benchmarks/codecs) at 10 GB/s. Devices are taken to be alike in it."""


@dataclass(frozen=True, slots=True)
class Coding:
    """A codec as a planner sees it."""

    text: str
    share: float
    """Of a value's bytes, those that travel; the mean of both directions."""
    later: bool = False
    """Whether so few only from a sample's second visit on, as in all epochs but the first."""

    def over(self, link: Link, hardware: Hardware) -> Link:
        """The link as if it carried whole values: what coding takes is counted to the transfer."""
        each = self.share / link.bandwidth + 2 * PASSES / (hardware.memory_bandwidth * hardware.memory_efficiency)
        return replace(link, bandwidth=1 / each)


def coded(link: Link, coding: Coding | None, hardware: Hardware) -> Link:
    """A link between stages with what they code by, if they do."""
    return link if coding is None else coding.over(link, hardware)
