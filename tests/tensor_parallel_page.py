"""The table of docs/tensor-parallel.md: where we shard in another way than transformers, why, and with what error.

`python -m tests.tensor_parallel_page` writes it anew from what the sweep found.
"""

from __future__ import annotations

from pathlib import Path

from tests import tensor_parallel_sweep as sharding
from tests.tensor_parallel_reasons import REASONS, matches

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tensor-parallel.md"
BEGIN, END = "<!-- differences -->\n", "<!-- end of differences -->"


def table() -> str:
    """A row for each reason: the pairs and weights it is for, the plan's style and ours, the largest error."""
    found = {name: item for name, item in sharding.read()["found"].items() if item.get("differs")}
    rows = ["| families | weights | theirs; ours | why | error |", "| --- | --- | --- | --- | --- |"]
    for key, why in REASONS.items():
        names = [n for n, item in found.items() if any(matches(key, n.split("/")[0], w) for w in item["differs"])]
        told = [t for n in names for w, t in found[n]["differs"].items() if matches(key, n.split("/")[0], w)]
        families = ", ".join(dict.fromkeys(name.split("/")[0] for name in names))
        error = max(found[name]["worst"] for name in names)
        ways = "<br>".join(sorted({way.replace("|", "\\|") for way in told}))
        rows.append(f"| {families} | `{key[1].strip('.')}` | {ways} | {why} | {error:.0e} |")
    return "\n".join(rows) + "\n"


def written(page: str) -> str:
    """The page with this table."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
