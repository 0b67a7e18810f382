"""The ``merak`` command under a torch as USE_DISTRIBUTED=0 builds it: ``python -m tests.undistributed edge train ...``.

Such a build has neither ``torch._C._c10d_init``, by which torch knows, nor the module behind ``torch.distributed``.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

GONE = ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init")
"""What torch/csrc/Module.cpp adds only under USE_DISTRIBUTED."""


class Without(Loader):
    """Loads torch's extension, and takes away what such a build lacks."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name in GONE:
            delattr(module, name)


class Finder(MetaPathFinder):
    """Finds torch's extension, to be loaded so."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == "torch._C" else None
        if spec is not None and spec.loader is not None:
            spec.loader = Without(spec.loader)
        return spec


def never_a_dtensor() -> None:
    """Let this extension, which was built with it, ask for DTensor once: it keeps the answer, as the other has none."""
    from torch import empty
    from torch._subclasses import FakeTensorMode

    there = ModuleType("torch.distributed.tensor")
    there.__dict__["DTensor"] = type("DTensor", (), {})
    sys.modules[there.__name__] = there
    with FakeTensorMode():
        tensor = empty(1)
    _ = tensor + 1  # outside the mode it is for the tensor's class to answer
    del sys.modules[there.__name__]


if __name__ == "__main__":
    sys.meta_path.insert(0, Finder())
    import torch

    assert not torch.distributed.is_available()
    never_a_dtensor()
    from merak_like.cli import main

    main()
