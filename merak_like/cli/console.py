"""Where tables are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """As wide as the terminal; 120 columns into a file or a pipe."""
    from rich.console import Console  # 40 ms, which `--json` need not wait for

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=120)
