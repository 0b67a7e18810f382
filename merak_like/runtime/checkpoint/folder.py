"""A checkpoint as files: complete or not there.

    folder/saving-00000200      being written: nobody reads it
    folder/step-00000100        job.pt, .metadata, __0_0.distcp, ..., manifest.json

Everything is written and synced below the first name; the manifest, with size and SHA-256 of every other file and of
itself, comes last; then one rename makes it a checkpoint. What was damaged later is noticed before it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
JOB = "job.pt"
VERSION = 1
"""Of the folder's contents; another one is refused."""
_BLOCK = 2**22


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or is damaged; the message names the file and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    about: Mapping[str, Any]
    """Model, layout and versions of the job that wrote it."""
    files: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 of every file."""
    version: int = VERSION

    def text(self) -> str:
        """As JSON that ends with its own digest."""
        body = {"version": self.version, "step": self.step, "about": dict(self.about), "files": dict(self.files)}
        return json.dumps({**body, "sha256": _digest_of(body)}, indent=1)

    @staticmethod
    def read(path: Path) -> Manifest:
        """Read a checkpoint's manifest; CheckpointError if it is missing, damaged or of another version."""
        file = path / MANIFEST
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            said = body.pop("sha256")
            files = {name: (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
            found = Manifest(int(body["step"]), dict(body["about"]), files, body["version"])
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no {MANIFEST}: it was not written to its end") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error})") from None
        if said != _digest_of(body):
            raise CheckpointError(f"{file} is damaged: its contents do not have the SHA-256 that it states")
        if found.version != VERSION:
            raise CheckpointError(f"{file} has version {found.version}, this merak_like reads version {VERSION}")
        return found


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def fingerprint(file: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def problem(path: Path, name: str, expected: tuple[int, str]) -> str:
    """What is wrong with one file of a checkpoint; empty if it is what was written."""
    file = path / name
    try:
        size = file.stat().st_size
        if size != expected[0]:
            return f"{file} has {size} bytes instead of {expected[0]}: it is cut off or not all there"
        if fingerprint(file) != expected:
            return f"{file} is damaged: its SHA-256 is not that of what was written"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return ""


def candidates(folder: Path) -> list[Path]:
    """What may be loaded from a folder, newest first: the checkpoint it is, or the checkpoints in it."""
    if (folder / MANIFEST).is_file() or folder.name.startswith("step-"):
        return [folder] if folder.is_dir() else []
    found = [(_place(path.name), path) for path in folder.glob("step-*") if path.is_dir()] if folder.is_dir() else []
    return [path for place, path in sorted(found, reverse=True) if place is not None]


def _place(name: str) -> tuple[int, int] | None:
    """(step, which of that step) of a checkpoint's name; None for other names."""
    _, step, *more = name.split("-")
    numbers = [step, *(more or ["0"])]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and all(n.isdigit() for n in numbers) else None


def begin(folder: Path, step: int) -> Path:
    """An empty place to write to; what an earlier attempt left half-written is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob("saving-*"), *folder.glob("removing-*")):
        shutil.rmtree(left)
    place = folder / f"saving-{step:08d}"
    place.mkdir()
    return place


def write(file: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def commit(place: Path, manifest: Manifest) -> Path:
    """Turn a fully written place into a checkpoint; an earlier one of the same step stays beside it."""
    write(place / MANIFEST, manifest.text().encode())
    sync(place)
    folder, number = place.parent, 0
    while (final := folder / f"step-{manifest.step:08d}{f'-{number}' if number else ''}").exists():
        number += 1
    place.rename(final)
    sync(folder)
    return final


def step_of(path: Path) -> int:
    """The step of a checkpoint by its name."""
    place = _place(path.name)
    return place[0] if place is not None else 0


def prune(folder: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and those of the steps in ``spare``.

    What is damaged counts as none and is left alone.
    """
    kept = [path for path in candidates(folder) if complete(path)]
    for old in kept[keep:]:
        if step_of(old) in spare:
            continue
        gone = folder / f"removing-{old.name}"  # under its own name a half-removed one would look damaged
        old.rename(gone)
        shutil.rmtree(gone)


def complete(path: Path) -> bool:
    """Whether all files of a checkpoint are there, in their sizes."""
    try:
        files = Manifest.read(path).files
    except CheckpointError:
        return False
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, (size, _) in files.items())


def sync(folder: Path) -> None:
    """Wait until the disk has a folder's names."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
