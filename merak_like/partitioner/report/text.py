"""Numbers and names as people read and write them: ``12.9 GB``, ``40GB``, ``h.0-11``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from math import isfinite

_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_FLOPS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3))
_COUNT = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))

_SIZES = {
    "": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4,
    "ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmgt]i?)?\s*b?\s*", re.IGNORECASE)
_BITS = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kMGT])(?:b|[Bb]it)(?:/s|ps)\s*")

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def _scaled(amount: float, scales: Sequence[tuple[str, float]], unit: str) -> str:
    """Three digits and the largest unit that leaves at least one before the point."""
    for name, scale in scales:
        if abs(amount) >= scale * 0.9995:
            return f"{_three(amount / scale)} {name}"
    return f"{amount:.0f} {unit}".rstrip()


def _three(number: float) -> str:
    if abs(number) >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if abs(number) >= 9.995 else f"{number:.2f}"


def bytes_text(nbytes: float) -> str:
    """Bytes in decimal units, as drives and links are sold: 1 GB is 10^9 bytes."""
    return _scaled(nbytes, _BYTES, "B")


def bytes_unit(nbytes: float) -> tuple[str, float]:
    """One unit for a whole column that holds up to ``nbytes``: its name and its bytes."""
    return next(((name, scale) for name, scale in _BYTES if nbytes >= scale), ("B", 1.0))


def flops_text(flops: float) -> str:
    """Floating-point operations (an amount, not a rate)."""
    return _scaled(flops, _FLOPS, "FLOP")


def count_text(count: float) -> str:
    """A count such as a number of parameters: ``124 M``."""
    return _scaled(count, _COUNT, "")


def seconds_text(seconds: float) -> str:
    """Seconds: ``1.25 s``, ``310 ms``, ``42.0 µs``."""
    if not isfinite(seconds) or seconds == 0:
        return "0 s" if seconds == 0 else "unknown"
    return _scaled(seconds, _SECONDS, "s") if abs(seconds) >= 1e-9 else "<1 ns"


def percent_text(fraction: float) -> str:
    """A fraction as a percentage; tiny but not zero stays visible."""
    percent = 100 * fraction
    if percent and abs(percent) < 0.05:
        return "<0.1 %"
    return f"{percent:.1f} %" if abs(percent) < 99.95 else f"{percent:.0f} %"


def change_text(after: float, before: float) -> str:
    """How much more or less: ``+3.1 %``, ``-12 %``, ``2.4 times``."""
    share = after / before - 1 if before else float("inf")
    if share >= 1:
        return f"{after / before:.2g} times" if before else "from nothing"
    return f"{'+' if share > 0 else '-' if share < 0 else ''}{percent_text(abs(share))}"


def dtype_text(dtype: str) -> str:
    """A dtype in two or three letters: ``bf16``, ``i64``; a name without a short form stays itself."""
    match = re.fullmatch(r"([a-z]+)(\d+)", dtype)
    return f"{_SHORT[match[1]]}{match[2]}" if match and match[1] in _SHORT else dtype


def shape_text(shape: Sequence[int], dtype: str) -> str:
    """``8 x 512 x 768 bf16``; a scalar is ``scalar f32``."""
    return f"{' x '.join(map(str, shape)) or 'scalar'} {dtype_text(dtype)}"


def parse_bytes(text: str) -> int:
    """Read ``40GB``, ``40 gib``, ``1.5g`` or a plain number of bytes.

    Raises ValueError for anything else, and for zero.
    """
    match = _SIZE.fullmatch(text)
    nbytes = int(float(match[1].replace("_", "")) * _SIZES[(match[2] or "").lower()]) if match else 0
    if nbytes <= 0:
        raise ValueError(
            f"{text!r} is not an amount of memory: write a number and a unit, such as 40GB, 512MB or 16GiB"
        )
    return nbytes


def parse_rate(text: str) -> float:
    """Bytes per second: ``25GB/s``, ``25GB``, or in bits, with a small b: ``200Gb/s``, ``200Gbit/s``.

    Raises ValueError for anything else, and for zero.
    """
    bits = _BITS.fullmatch(text)
    try:
        return parse_bytes(f"{bits[1]}{bits[2]}") / 8 if bits else float(parse_bytes(re.sub(r"(/s|ps)\s*$", "", text)))
    except ValueError:
        raise ValueError(f"{text!r} is not a bandwidth: write bytes, as in 25GB/s, or bits, as in 200Gbit/s") from None


def bar(fraction: float, width: int) -> str:
    """A bar of eighths: ``bar(0.5, 4)`` is two full cells. Always ``width`` cells wide."""
    eighths = round(max(0.0, min(1.0, fraction)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width)


def ranges(names: Iterable[str]) -> tuple[str, ...]:
    """Join runs of numbered siblings: ``h.0 h.1 h.2 ln_f`` becomes ``h.0-2 ln_f``."""
    joined: list[tuple[str, int, int] | str] = []
    for name in dict.fromkeys(names):
        stem, _, tail = name.rpartition(".")
        if not tail.isdecimal():
            joined.append(name)
            continue
        number, last = int(tail), joined[-1] if joined else ""
        if not isinstance(last, str) and last[0] == stem and last[2] + 1 == number:
            joined[-1] = (stem, last[1], number)
        else:
            joined.append((stem, number, number))
    return tuple(_joined(item) for item in joined)


def common_prefix(names: Iterable[str]) -> str:
    """The first part of most dotted names, with its dot (``transformer.``), or nothing: it is noise in a table."""
    found = list(dict.fromkeys(names))
    heads = [head for head, dot, _ in (name.partition(".") for name in found) if dot]
    best = max(set(heads), key=heads.count, default="")
    return f"{best}." if best and heads.count(best) > 0.6 * len(found) and not best.isdecimal() else ""


def _joined(item: tuple[str, int, int] | str) -> str:
    if isinstance(item, str):
        return item
    stem, first, last = item
    dot = "." if stem else ""
    return f"{stem}{dot}{first}" if first == last else f"{stem}{dot}{first}-{last}"
