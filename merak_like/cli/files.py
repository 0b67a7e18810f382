"""Reading and writing the files that commands are given."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from merak_like.partitioner.plan import Plan

if TYPE_CHECKING:
    from merak_like.partitioner.hardware import Hardware


def load_plan(path: Path, edited: bool = False) -> Plan:
    """Read a plan; ValueError with the file's name when it cannot be read."""
    path = path.expanduser()
    if path.is_dir():
        path = path / "plan.json"
    if not path.is_file():
        raise ValueError(f"there is no plan {str(path)!r}{_beside(path)}: `merak plan MODEL -o plan.json` makes one")
    try:
        return Plan.load(path, edited=edited)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is not a plan: it is not text") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        hint = " (--edited)" if "digest" in str(error) else ""
        raise ValueError(f"{path}: {error}{hint}") from None


def writable(path: Path) -> Path:
    """A path whose folder exists afterwards; ValueError where a file cannot be."""
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(
            f"cannot write {str(path)!r}: it is a folder; name a file, such as {str(path / 'plan.json')!r}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _beside(path: Path) -> str:
    """The nearest file name in the same folder."""
    if not path.parent.is_dir():
        return ""
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1)
    return f", but there is {str(path.parent / near[0])!r}" if near else ""


def named_hardware(text: str) -> Hardware:
    """A preset, a JSON file of figures, or ``this`` machine, measured; ValueError where it is none of them."""
    from merak_like.partitioner.hardware import Hardware, hardware_named

    if text == "this":
        from merak_like.partitioner.this_machine import this_machine

        return this_machine()
    if text.endswith(".json"):
        file = Path(text).expanduser()
        if not file.is_file():
            raise ValueError(f"there is no hardware file {text!r}: name a preset, `this`, or a JSON file of figures")
        try:
            return Hardware.from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
    return hardware_named(text)
