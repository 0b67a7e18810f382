"""Leaves out what this machine cannot run, saying what is missing: a CUDA device for `gpu`, Chromium for `browser`."""

from __future__ import annotations

import shutil

import pytest


def missing(mark: str) -> str:
    """What this machine lacks for tests with that mark; empty if nothing."""
    if mark == "gpu":
        import torch  # here, because most runs select no such test and torch takes seconds to import

        return "" if torch.cuda.is_available() else "no CUDA device"
    return "" if shutil.which("chromium") or shutil.which("google-chrome") else "no Chromium"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark in ("gpu", "browser"):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := missing(mark)):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
