"""What a run can be told: one frozen, checked tree of sections, from Python or from a file.

Every field has a default but the number of steps, and every section refuses a key that it does not have.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Degree = Count | Literal["auto"]


class Section(BaseModel):
    """A part of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Parallelism(Section):
    """How the model is spread over ranks; the fields are those of ``auto_parallel``."""

    dp: Degree = 1
    """``auto``: chosen for the ranks that torchrun started, and anew when it starts others."""
    pp: Degree = 1
    tp: Degree = 1
    zero: Literal[0, 1, 2, 3, "auto"] = 0
    """Spread over replicas: 1 the optimizer's state, 2 the gradients too, 3 the weights too; ``auto``: chosen."""
    zero_backend: Literal["own", "deepspeed", "deepspeed-offload"] | None = None
    """Who spreads: ourselves, or DeepSpeed's optimizer at level 1, with its state on the CPU too."""
    ds_config: Path | None = None
    """A DeepSpeed configuration; what stands there as "auto" is what these settings say."""
    fuse: bool = True
    """Run activations that the model spells out as one kernel."""
    sequence_parallel: bool | Literal["auto"] = False
    """Divide activations outside of sharded weights among tensor-parallel ranks too; ``auto``: chosen."""
    tp_shares: Count = 1
    """Parts of a micro-batch, the tensor-parallel sums of one under the compute of another."""
    codec: str | None = None
    """What values go through between pipeline stages, such as ``int8`` or ``int4|int8`` (forward, backward)."""
    schedule: str = "1f1b"
    chunks: Count | None = None
    recompute: Literal["auto", "none", "full"] = "auto"
    micro_batches: Count | None = None
    """Of each replica in a step; None: the number that the planner finds fastest."""
    plan: Path | None = None
    """A plan file to obey."""
    hardware: str | None = None
    memory_limit: str | int | None = None
    """Of one rank: bytes, or a text such as 40GB."""
    device: str | None = None
    timeout: float = 600.0
    """Seconds that any wait for another rank may last."""

    @model_validator(mode="after")
    def _what_goes_together(self) -> Self:
        degrees = self.degrees
        if self.plan is not None and "auto" in degrees.values():
            raise ValueError("parallelism.plan has its degrees: give these instead of auto, or leave the plan out")
        if self.tp == 1 and (self.sequence_parallel is True or self.tp_shares > 1):
            key = "sequence_parallel" if self.sequence_parallel is True else "tp_shares"
            raise ValueError(f"parallelism.{key} is about tensor-parallel ranks: say parallelism.tp=2 or more with it")
        if self.zero == 3 and (self.pp, self.tp) != (1, 1):
            raise ValueError(
                f"parallelism.zero=3 calls the model whole, which pp={self.pp}, tp={self.tp} do not: use zero=2, or "
                "pp=1 and tp=1"
            )
        return self

    @property
    def degrees(self) -> dict[str, int | str]:
        """By axis."""
        return {"dp": self.dp, "pp": self.pp, "tp": self.tp}

    @property
    def ranks(self) -> int | None:
        """How many processes this needs; None where the degrees are chosen for as many as there are."""
        fixed = [degree for degree in self.degrees.values() if isinstance(degree, int)]
        return prod(fixed) if len(fixed) == len(self.degrees) else None


class Optimizer(Section):
    """The optimizer, and which weights it lets decay."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(ge=0)] = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam; the first is SGD's momentum."""
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_all: bool = False
    """Also of biases and of the weights of norms."""
    flat: bool = False
    """AdamW in one call for all weights, bit for bit the same."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0

    @model_validator(mode="after")
    def _flat_is_adamw(self) -> Self:
        if self.flat and self.name != "adamw":
            raise ValueError(f"optimizer.flat is a way to run adamw, and optimizer.name is {self.name}")
        return self


class Kfac(Section):
    """Curvature that preconditions gradients (``merak_like.runtime.methods.kfac``)."""

    damping: Annotated[float, Field(gt=0)] = 0.003
    weight: Annotated[float, Field(gt=0, le=1)] = 0.05
    every: Count = 1
    kl_clip: Annotated[float, Field(gt=0)] | None = 0.01


class Compress(Section):
    """Few bits for what layers keep (``merak_like.runtime.methods.compress``)."""

    bound: Annotated[float, Field(gt=0, lt=1)] = 0.01
    entropy: bool = False
    adapt: bool = True
    blocks: str = ".*"


class Offload(Section):
    """What layers keep, in the machine's memory (``merak_like.runtime.methods.offload``)."""

    blocks: str = ".*"
    bandwidth: Annotated[float, Field(gt=0)] = 20e9
    ahead: Annotated[int, Field(ge=0)] = 64 * 2**20


class Float8(Section):
    """Products of Linear layers in float8 (``merak_like.runtime.methods.float8``)."""

    recipe: str = "tensorwise"
    emulate: bool = False
    compile: bool = False


class LowRank(Section):
    """Weights projected to a rank now and then (``merak_like.runtime.methods.projection``)."""

    rank: Count
    every: Count
    layers: str = ".*"
    energy: bool = False
    norms: dict[str, str] = {}


class CentralMask(Section):
    """Steps without a gradient of experts' common cores (``merak_like.runtime.methods.experts``)."""

    probability: Annotated[float, Field(ge=0, lt=1)] = 0.5
    seed: int = 0


class Methods(Section):
    """Parts that plug into the engine; none is on by itself."""

    compile: bool = False
    """Run stages through ``torch.compile``."""
    chunked_loss: bool | Literal["liger"] = False
    """Never make the logits of a whole micro-batch in training."""
    offload: Offload | None = None
    float8: Float8 | None = None
    compress: Compress | None = None
    kfac: Kfac | None = None
    central_mask: CentralMask | None = None
    low_rank: LowRank | None = None


class Schedule(Section):
    """The learning rate over the steps, as a share of ``optimizer.lr``."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup: Annotated[float, Field(ge=0)] = 0
    """Steps in which the rate rises from 0 to its full value; below 1, a share of all steps."""
    end: Share = 0.0
    """The share that is left at the last step."""
    decay: Share = 0.1
    """The share of all steps in which ``wsd`` (warm-up, stable, decay) falls."""


class Training(Section):
    """How long, and how much at once."""

    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch: Count = 8
    """Samples in a step, over all replicas and micro-batches."""
    seed: int = 0
    shuffle: bool = True
    skip_bad_steps: Annotated[int, Field(ge=0)] = 0
    """How many steps in a row may be left out because their loss or gradients are not finite; the next one stops the
    run."""

    check_every: Count | None = None
    """Steps between two looks whether ranks that hold the same weights still do, bit for bit."""
    deterministic: bool = False
    """Refuse operations of torch that may give other bits the next time, and choose the others."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("say either training.steps or training.epochs")
        return self


class Evaluation(Section):
    """When to look at other data, and what counts as best."""

    every: Count | None = None
    """Steps between two evaluations; None: only at the end."""
    batch: Count | None = None
    """Samples at once; None: as in training."""
    batches: Count | None = None
    """At most so many; None: the whole data."""
    metric: str = "eval_loss"
    greater_is_better: bool = False


COMPUTED_IN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "autocast": "bfloat16"}
"""The dtype of most products, by precision."""


class Checkpoints(Section):
    """When the state is written, and what is kept."""

    every: Count | None = None
    """Steps between two; None: only at the end."""
    keep: Count | None = 2
    """The newest that stay on the disk, the best one besides; None: all."""
    best: bool = False
    """Write one whenever ``evaluation.metric`` is better than ever, and end with the best weights."""
    resume: bool | Literal["auto"] | Path = False
    """Go on from the newest whole one: ``true``, or where there is one: ``auto``; or the folder of one, or of a run."""
    background: bool = Field(default=False, alias="async")
    """Write them while training goes on."""


class Profile(Section):
    """torch's profiler, and on a GPU what is allocated where."""

    at: Count = 5
    """The first step that is recorded, of those that a process makes."""
    steps: Count = 3


class Logging(Section):
    """Where numbers go besides the console and ``metrics.jsonl``."""

    every: Count = 10
    console: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    project: str = "merak"
    profile: Profile | None = None
    """Record some steps of each rank into ``profile/``."""


class Settings(Section):
    """All that ``Trainer`` needs to know besides the model and the data."""

    training: Training
    parallelism: Parallelism = Parallelism()
    optimizer: Optimizer = Optimizer()
    methods: Methods = Methods()
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "bf16", "fp16", "autocast"] = "fp32"
    """``bf16``, ``fp16``: computed in it, while sums of gradients, the optimizer and its weights are float32; for fp16
    the loss is scaled. ``autocast``: float32 weights, computed in bfloat16 where torch's autocast allows it."""
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    logging: Logging = Logging()
    folder: Path = Path("runs/run")
    """Where all files of the run go."""

    @property
    def lowered(self) -> str | None:
        """The precision as ``auto_parallel`` has it; None where the model computes in its own, or under autocast."""
        return None if self.precision in ("fp32", "autocast") else self.precision
