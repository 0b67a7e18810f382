"""Records from files: jsonl, parquet, text, and what Hugging Face ``datasets`` saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any

FORMATS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text", ".rst": "text",
    ".npy": "tokens",
}  # fmt: skip
"""The format that the end of a name says."""


def found(pattern: str, kind: str) -> tuple[list[Path], str]:
    """The files that a name or pattern means, sorted, and their format. Raises ValueError where there are none."""
    where = Path(pattern).expanduser()
    if where.is_dir():
        if kind == "datasets" or (where / "state.json").exists() or (where / "dataset_info.json").exists():
            return [where], "datasets"
        files = sorted(
            p for p in where.rglob("*") if p.suffix in FORMATS and (kind == "auto" or FORMATS[p.suffix] == kind)
        )
    else:
        files = [Path(name) for name in sorted(glob(str(where), recursive=True))]
    if not files:
        near = (
            get_close_matches(where.name, [p.name for p in where.parent.glob("*")], 1) if where.parent.is_dir() else []
        )
        raise ValueError(f"no file {pattern!r}{f', perhaps {near[0]!r}' if near else ''} with data to train on")
    if kind != "auto":
        return files, kind
    kinds = {FORMATS.get(path.suffix, "") for path in files}
    if len(kinds) > 1 or kinds == {""}:
        raise ValueError(
            f"{pattern!r} means files such as {files[0].name} and {files[-1].name}, whose format is not clear: say "
            f"data.format, one of {', '.join(sorted(set(FORMATS.values())))}"
        )
    return files, kinds.pop()


def records(files: list[Path], kind: str) -> Iterator[Mapping[str, Any]]:
    """Every record of the files in order. A text file is one, ``{"text": ...}``."""
    for path in files:
        if kind == "jsonl":
            yield from _jsonl(path)
        elif kind == "parquet":
            yield from _optional("pyarrow.parquet", "pyarrow").read_table(path).to_pylist()
        elif kind == "datasets":
            yield from _optional("datasets", "datasets").load_from_disk(str(path))
        else:
            yield {"text": path.read_text(encoding="utf-8")}


def field(record: Mapping[str, Any], name: str, where: str) -> Any:
    """A field of a record; ValueError with the nearest name if it has none."""
    if name not in record:
        near = get_close_matches(name, list(record), 1)
        raise ValueError(
            f"{where} = {name!r}, but records have {', '.join(record)}{f', perhaps {near[0]}' if near else ''}"
        )
    return record[name]


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: a record is an object, not {line.strip()[:40]!r}")
            yield record


def _optional(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(f"these files need {package}: pip install 'merak-like[data]'") from None
