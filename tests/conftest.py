"""What all tests share.

What this machine cannot run is left out, saying what is missing: a CUDA device for `gpu`, Chromium for `browser`, the
package for `deepspeed`.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.plans import make_plan

# The same examples on every run, so that a failure is the change's own; `--hypothesis-profile explore` draws new ones.
# How long one takes says how busy the machine is, so it has no deadline: a test that hangs is pytest-timeout's.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", parent=settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a plan in it."""
    monkeypatch.chdir(tmp_path)
    make_plan().save("plan.json")
    return tmp_path


def missing(mark: str) -> str:
    """What this machine lacks for tests with that mark; empty if nothing."""
    if mark == "deepspeed":
        return "" if find_spec("deepspeed") else "deepspeed is not installed: pip install 'merak-like[deepspeed]'"
    if mark == "gpu":
        import torch  # here, because most runs select no such test and torch takes seconds to import

        return "" if torch.cuda.is_available() else "no CUDA device"
    return "" if shutil.which("chromium") or shutil.which("google-chrome") else "no Chromium"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark in ("gpu", "browser", "deepspeed"):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := missing(mark)):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
