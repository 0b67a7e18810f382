"""What a command says, compared with a file in tests/golden/ that a person has read.

``MERAK_GOLDEN=write pytest ...`` writes the files anew: read the difference before it is committed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden"
DIGITS = 6
"""Numbers that agree to so many digits are equal: sums may be taken in another order elsewhere."""


def same_as(name: str, text: str) -> None:
    """Raise AssertionError where a text is not what the file says; trailing blanks do not count."""
    said = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    path = FOLDER / name
    if os.environ.get("MERAK_GOLDEN") == "write":
        path.write_text(said, encoding="utf-8")
    assert path.is_file(), f"there is no {path}: write it with MERAK_GOLDEN=write"
    assert said == path.read_text(encoding="utf-8"), f"{name} is not what it was"


def same_numbers(name: str, data: Any) -> None:
    """The same for what a command says as JSON."""
    same_as(name, json.dumps(rounded(data), indent=1))


def rounded(item: Any) -> Any:
    """Floats to DIGITS digits; what is as small as an error of rounding is nothing."""
    if isinstance(item, float):
        return 0.0 if abs(item) < 1e-15 else float(f"{item:.{DIGITS}g}")
    if isinstance(item, dict):
        return {key: rounded(value) for key, value in item.items()}
    return [rounded(value) for value in item] if isinstance(item, list) else item
