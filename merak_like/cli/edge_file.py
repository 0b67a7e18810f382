"""edge.yaml: what it may say, and what that means."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from merak_like.split.messages import Task
    from merak_like.split.screen import Screen


class Machines(BaseModel):
    """What there is, for ``plan`` and for the forecast that ``train`` ends with."""

    model_config = ConfigDict(extra="forbid")

    uplink: str
    """Bits a second from the edge to the host: ``20 Mbit``."""
    downlink: str
    latency: float = Field(default=0.01, ge=0)
    """Seconds one way."""
    edge: str = "this"
    """A preset of hardware, a JSON file of figures, or ``this`` machine, measured."""
    edge_flops: str | None = None
    """Instead of ``edge``: what its matrix products reach, such as ``50 Gflops``."""
    edge_memory: str | None = None
    """Bytes the edge may use, such as ``4 GB``; None: what the hardware has."""
    host: str = "a100-80gb"
    """As ``edge``."""


class ClipNoise(BaseModel):
    """Limits and noise on what is sent; no differential privacy, as nobody counts what is told over many steps."""

    model_config = ConfigDict(extra="forbid")

    norm: float = Field(gt=0)
    noise: float = Field(default=0.0, ge=0)


class LowRank(BaseModel):
    """``runtime.methods.projection.LowRank``."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(ge=1)
    every: int = Field(ge=1)
    layers: str = ".*"
    energy: bool = False
    norms: dict[str, str] = {}


class Setting(BaseModel):
    """edge.yaml; paths are relative to the file."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """A folder with config.json and safetensors, or module:function."""
    data: str
    """module:function; ``function(step)`` returns a batch, or (batch, sample ids), the same whenever it is asked."""
    cut: str
    steps: int = Field(ge=1)
    connect: str | list[str] = "127.0.0.1:7750"
    """HOST:PORT, or several."""
    keys: Path | None = None
    name: str = "edge"
    insecure: bool = False
    state: Path = Path("edge")
    """Checkpoints and the session's name: start again with the same to go on."""
    weights: Path | None = None
    hf_task: str | None = None
    codec: str = "identity"
    back_codec: str = "identity"
    micro_batches: int = 1
    window: int = 4
    optimizer: dict[str, Any] = {}
    max_grad_norm: float | None = None
    seed: int = 0
    checkpoint_every: int = 50
    frozen_edge: bool = False
    binary_edge: bool = False
    """Whether the Linear layers of the edge's head have weights of signs, and signs are sent."""
    leak: float = Field(default=0.0, ge=0)
    """Weight of a loss against what is sent telling of the samples."""
    clip_noise: ClipNoise | None = None
    local: dict[str, Any] | None = None
    """``alone``, ``temperature``, ``width``, ``sparse``: learn at home, in a group whose mode is ``chosen``."""
    low_rank: LowRank | None = None
    """Project the weights of the edge's layers to a rank now and then."""
    skip: str = "none"
    weigh: str = "plain"
    """How a changed layer is factored; ``sides`` and ``elements`` need ``fisher``."""
    fisher: Path | None = None
    """A file of ``merak edge fisher``; the host needs the same."""
    group: str | None = None
    """The group of the host's operator that this edge trains with."""
    average_edges: bool = False
    """Whether this edge's own layers may go to the host, to be averaged with those of its group."""
    lora: dict[str, Any] | None = None
    """``rank``, ``alpha`` and ``targets`` of adapters: the host trains these, and its weights stay as they are."""
    patience: float = 300.0
    device: str = "cpu"
    machines: Machines | None = None


def load(file: Path) -> Setting:
    """Read edge.yaml. Raises ValueError naming the field that is wrong."""
    import yaml

    try:
        found = Setting.model_validate(yaml.safe_load(file.expanduser().read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    here = file.expanduser().resolve().parent
    sys.path.insert(0, str(here))
    local = {k: here / v for k in ("keys", "state", "weights", "fisher") if (v := getattr(found, k)) is not None}
    model = str(here / found.model) if (here / found.model).exists() else found.model
    return found.model_copy(update={**local, "model": model})


def screen_of(setting: Setting) -> Screen | None:
    """What edge.yaml says shall be done to what is sent; None: nothing."""
    from merak_like.split.screen import Screen

    norm, noise = (setting.clip_noise.norm, setting.clip_noise.noise) if setting.clip_noise else (None, 0.0)
    screen = Screen(setting.binary_edge, norm, noise, setting.leak)
    return None if screen == Screen() else screen


def task_of(setting: Setting) -> Task:
    """The task that edge.yaml describes. Raises ValueError naming the field that is wrong."""
    from merak_like.split.messages import LocalText, LoraText, OptimizerText, Task

    try:
        names = ("cut", "codec", "back_codec", "micro_batches", "window", "max_grad_norm", "seed", "checkpoint_every",
                 "frozen_edge", "binary_edge", "skip", "weigh", "group",
                 "average_edges")  # fmt: skip
        lora = None if setting.lora is None else LoraText(**setting.lora)
        local = None if setting.local is None else LocalText(**setting.local)
        return Task(
            optimizer=OptimizerText(**setting.optimizer),
            lora=lora,
            local=local,
            **{name: getattr(setting, name) for name in names},
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
