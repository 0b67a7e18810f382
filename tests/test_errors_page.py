"""docs/errors.md has a section for every error: where it is raised and what it is called lead there."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "merak_like"
PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
FOR_USERS = {"ValueError", "RuntimeError", "ConnectionError", "OutOfMemoryError"}
"""What errors of our own derive from; those that derive from Exception are signals inside."""


def sections() -> dict[str, str]:
    """Pattern of a file's path to the anchor of its section."""
    rows = re.findall(r"^\| (`.*`) \| \[.*\]\(#(.*)\) \|$", PAGE, re.MULTILINE)
    return {pattern: anchor for files, anchor in rows for pattern in re.findall(r"`([^`]+)`", files)}


def section_of(path: str, known: dict[str, str]) -> str | None:
    """The section of a file: of the longest pattern that fits."""
    fitting = [pattern for pattern in known if fnmatch(path, pattern)]
    return known[max(fitting, key=len)] if fitting else None


@cache
def raising() -> dict[str, str]:
    """Files that raise an error of their own making."""
    texts = {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    return {path: text for path, text in texts.items() if re.search(r"^\s+raise [A-Z]\w*\(", text, re.MULTILINE)}


def test_every_file_that_raises_has_a_section() -> None:
    known, files = sections(), raising()
    assert len(known) > 40
    assert [path for path in files if section_of(path, known) is None] == []
    useless = [p for p in known if not any(fnmatch(path, p) and section_of(path, known) == known[p] for path in files)]
    assert not useless, "these name no file that raises anything"


def test_sections_are_there() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    }
    assert {*sections().values()} <= headings
    assert len(headings) == len(re.findall(r"^##+ ", PAGE, re.MULTILINE)), "two sections of one name share an anchor"


def test_errors_with_a_name_are_explained() -> None:
    classes = [found for text in raising().values() for found in re.findall(r"^class (\w+)\((.*)\):$", text, re.M)]
    named = {name for name, base in classes if base.rpartition(".")[2] in FOR_USERS}
    named |= {"TraceError"}  # its file raises nothing itself
    assert {"PeerError", "CheckpointError", "NoMemory", "Busy"} <= named
    assert [name for name in sorted(named) if f"`{name}`" not in PAGE] == []


def test_a_file_that_nobody_named_would_be_found() -> None:
    known = {"trainer/*": "training", "trainer/data/*": "data"}
    assert section_of("trainer/data/x.py", known) == "data"
    assert section_of("trainer/loop.py", known) == "training"
    assert section_of("elsewhere.py", known) is None
