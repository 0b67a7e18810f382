"""What MODEL on a command line means: a folder with a ``config.json``, or ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Loaded:
    """A model, one batch of it, and its loss where the model has none of its own."""

    model: nn.Module
    example: Any
    loss_fn: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class FromConfig:
    """A Hugging Face model without weights; an example of any number of samples can be made."""

    folder: Path
    seq: int | None
    task: str | None
    dtype: str | None

    @property
    def words(self) -> dict[str, Any]:
        """How the model is named on a command line: MODEL, and the options that were given."""
        given = {"seq": self.seq, "task": self.task, "dtype": self.dtype}
        return {"model": str(self.folder), **{name: value for name, value in given.items() if value is not None}}

    @property
    def says_dtype(self) -> bool:
        """Whether the config names the dtype of its weights."""
        file = self.folder / "config.json" if self.folder.is_dir() else self.folder
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # whoever reads it next says what is wrong
            return True
        return any(data.get(name) for name in ("dtype", "torch_dtype"))

    def load(self, samples: int) -> Loaded:
        """The model with a batch of so many samples."""
        from merak_like.hf import from_config

        logging.getLogger("transformers").setLevel(logging.ERROR)  # its advice is about running, and this runs nothing
        return Loaded(*from_config(self.folder, batch=samples, seq=self.seq, task=self.task, dtype=self.dtype))


@dataclass(frozen=True)
class FromFunction:
    """A model of the user's own; the example is the function's."""

    module: str
    function: str

    @property
    def words(self) -> dict[str, Any]:
        """How the model is named on a command line."""
        return {"model": f"{self.module}:{self.function}"}

    def load(self, samples: int) -> Loaded:
        """What the function returns; ``samples`` is its own business."""
        spec = f"{self.module}:{self.function}"
        sys.path.insert(0, str(Path.cwd()))
        try:
            made = self._function()()
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{spec} raised {type(error).__name__}: {error} (merak --debug shows where)") from error
        finally:
            sys.path.pop(0)
        from torch import nn

        if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
            raise ValueError(
                f"{spec} must return (model, example) or (model, example, loss_fn), but it returned {_described(made)}"
            )
        if len(made) == 3 and not callable(made[2]):
            raise ValueError(f"the loss_fn that {spec} returns is a {type(made[2]).__name__}, not a function")
        return Loaded(*made)

    def _function(self) -> Callable[[], Any]:
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            where = f" in {Path.cwd()}" if error.name == self.module.partition(".")[0] else ""
            raise ValueError(f"cannot import {self.module!r}: {error}{where}") from error
        found = getattr(module, self.function, None)
        if not callable(found):
            there = [name for name, item in vars(module).items() if inspect.isfunction(item) and name[0] != "_"]
            raise ValueError(
                f"{self.module!r} has no function {self.function!r}: it has {', '.join(there) or 'no functions'}"
            )
        return found


Source = FromConfig | FromFunction


def source(text: str, *, seq: int | None, task: str | None, dtype: str | None) -> Source:
    """Read MODEL and the options that belong to it.

    Raises ValueError when it is neither, and for options that a function cannot obey.
    """
    path = Path(text).expanduser()
    module, colon, function = text.partition(":")
    if path.exists():
        return FromConfig(path, seq, task, dtype)
    if colon and function.isidentifier():
        for name, given in (("--seq", seq), ("--task", task), ("--dtype", dtype)):
            if given is not None:
                raise ValueError(
                    f"{name} {given} has no meaning for {text}: the function makes the model and the example"
                )
        return FromFunction(module.removesuffix(".py").replace("/", "."), function)
    hub = ": nothing is downloaded, `hf download` a model first and name its folder" if text.count("/") == 1 else ""
    raise ValueError(
        f"no model {text!r}{hub or ': name a folder with a config.json, or a function as module:function'}"
    )


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return f"a {type(made).__name__}"
