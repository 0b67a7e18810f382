"""Put a table into the README, between its marks, or only say whether it is there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")


def fill(name: str, table: str, check: bool) -> int:
    """Write the table between ``<!-- table: NAME -->`` and ``<!-- end -->``; ``check`` only tells: 0 if it stands."""
    old = PAGE.read_text(encoding="utf-8")
    marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    new = re.sub(marks, lambda m: f"{m[1]}{table}\n{m[2]}", old, flags=re.DOTALL)
    if check:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0
