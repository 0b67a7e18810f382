"""What a host counts, as Prometheus text; and what it writes down of who did what, without a tensor's content."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HELP = {
    "merak_sessions": "Sessions in memory.",
    "merak_connections": "Connections now open.",
    "merak_reserved_bytes": "Memory reserved for sessions.",
    "merak_steps_total": "Training steps done.",
    "merak_replays_total": "Steps whose answer was said again.",
    "merak_tokens_total": "Tokens that went through this host's blocks, of all samples.",
    "merak_bytes_total": "Bytes on the wire, headers included.",
    "merak_refused_total": "Connections and sessions refused.",
    "merak_queue_seconds": "Seconds a computation waited for its turn.",
}


class Metrics:
    """Counters by name and label."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Count something; ``label`` is ``key="value"``."""
        with self._lock:
            self._counts[name, label] += amount

    def set(self, name: str, value: float) -> None:
        """A number that goes up and down."""
        with self._lock:
            self._counts[name, ""] = value

    def text(self, waits: Iterable[float] = (), turns: int = 0, seconds: float = 0.0) -> str:
        """All of it in the text format of Prometheus. ``waits`` are the last of ``turns``, which took ``seconds``."""
        with self._lock:
            counts = dict(self._counts)
        sorted_waits = sorted(waits)
        lines: list[str] = []
        for name, told in HELP.items():
            lines.append(f"# HELP {name} {told}")
            if name == "merak_queue_seconds":
                lines.append(f"# TYPE {name} summary")
                for q in (0.5, 0.99):
                    at = min(len(sorted_waits) - 1, int(q * len(sorted_waits)))
                    lines.append(f'{name}{{quantile="{q}"}} {sorted_waits[at] if sorted_waits else 0.0:.6f}')
                lines += [f"{name}_sum {seconds:g}", f"{name}_count {turns}"]
                continue
            lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
            found = {label: value for (each, label), value in counts.items() if each == name} or {"": 0}
            lines += [
                f"{name}{{{label}}} {value:g}" if label else f"{name} {value:g}" for label, value in found.items()
            ]
        return "\n".join(lines) + "\n"


class Audit:
    """One JSON line for each event: who, what, which session, how many bytes, how it ended."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def note(self, event: str, **facts: Any) -> None:
        """Write one line."""
        if self._file is not None:
            line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, sort_keys=True)
            with self._lock:
                self._file.write(line + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
