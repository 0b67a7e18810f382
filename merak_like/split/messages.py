"""Control messages: small JSON objects with known fields, kinds and limits. Anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merak_like.split.wire import WireError

Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
Word = Annotated[str, Field(max_length=500)]


class Message(BaseModel):
    """Strict and frozen: no coercion, no field nobody knows."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def body(self) -> bytes:
        """As it travels."""
        return self.model_dump_json(exclude_defaults=True).encode()


class OptimizerText(Message):
    """How the cloud's half is updated: a row of ``OPTIMIZERS`` and its numbers."""

    name: Word = "adamw"
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup: Count = 0
    """Steps in which the rate rises from 0."""
    steps: Count = 0
    """Steps until the rate has fallen to 0; 0: it does not fall."""


class LoraText(Message):
    """Adapters of a session on a frozen trunk (see ``adapters``)."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Adapters count alpha / rank times; None: twice."""
    targets: Annotated[tuple[Word, ...], Field(max_length=64, strict=False)] = ()
    """Last parts of the names of the layers that get adapters; none: every linear layer that the half calls."""


class LocalText(Message):
    """An edge that learns by a contrastive loss of its own labels, without gradients from its host (AdaSplit)."""

    alone: Count = 0
    """Steps before the first that the host may hear; nothing is sent in them."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.07
    width: Annotated[int, Field(ge=1, le=2**16)] = 32
    """Numbers of a sample that are compared."""
    sparse: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of an L1 term on what is sent."""


class Task(Message):
    """What both ends must agree on before anything is trained."""

    cut: Word
    codec: Word = "identity"
    """For what the edge's head sends."""
    back_codec: Word = "identity"
    """For what the cloud returns to the edge's tail."""
    micro_batches: Annotated[int, Field(ge=1, le=4096)] = 1
    window: Annotated[int, Field(ge=1, le=4096)] = 4
    """Micro-batches under way at once."""
    optimizer: OptimizerText = OptimizerText()
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Limits the gradient of each half by itself."""
    seed: Count = 0
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints, on both ends alike."""
    frozen_edge: bool = False
    """Whether the edge's head is not trained: then no gradient comes back to it."""
    binary_edge: bool = False
    """Whether the Linear layers of the edge's head have weights of signs (see ``binarised``)."""
    skip: Literal["none", "surrogate"] = "none"
    weigh: Literal["plain", "sides", "elements"] = "plain"
    """How a changed layer is factored: plainly, or by the Fisher information that both sides have (see ``sft``)."""
    group: Word | None = None
    """The group whose cloud half is trained together; None: a half of one's own. There the host's operator says how the
    cloud's half learns, and ``optimizer`` and ``max_grad_norm`` are the edge's alone."""
    lora: LoraText | None = None
    """Train adapters on the host's frozen weights, which all such sessions have in common, instead of a half."""
    local: LocalText | None = None
    """Learn at home; in a group whose mode is ``chosen``, with a cut without a tail."""
    average_edges: bool = False
    """Whether the edge's own trained layers may go to the host, to be averaged with those of its group."""


class Hello(Message):
    """Edge to host: open a session, or go on with one."""

    task: Task
    example: Any
    """The shapes of a batch (see ``outline``)."""
    digest: Id
    """Of the edge's cut trace of that batch."""
    session: Id | None = None
    step: Count = 0
    """The step the edge is at."""
    saved: Annotated[tuple[Count, ...], Field(max_length=16, strict=False)] = ()
    """Steps it has checkpoints of."""
    probe: Annotated[tuple[float, ...], Field(max_length=8192, strict=False)] = ()
    """Of a changed layer: what its narrow place makes of a fixed vector."""


class Welcome(Message):
    """Host to edge: the session is open."""

    session: Id
    step: Count
    """The step to go on with; one more than the edge's where the host has done that step already."""
    largest: Annotated[int, Field(ge=0)]
    """Most bytes of one message of tensors."""
    owes: bool = False
    """Whether the edge's own layers are due, to be averaged, before the next step."""
    heard: bool = True
    """Whether the edge's next step is heard; always, but in a chosen group."""


class Begin(Message):
    """Edge to host: a step begins; its micro-batches follow."""

    outline: Any
    digest: Id
    """Of the first micro-batch's cut trace."""
    training: bool = True
    lengths: Annotated[tuple[int, ...], Field(max_length=2**16, strict=False)] | None = None
    """Unmasked tokens of each sample, negative where the padding is in front; None: no mask."""
    labels: Any = None
    """Only with a cut that has no tail."""
    silent: bool = False
    """In a group that does not hear this edge now: no micro-batch follows, the step is done at home."""
    samples: Annotated[tuple[int, ...], Field(max_length=2**16, strict=False)] = ()
    """Opaque ids, the same at every visit of a sample; for codecs with memory."""


class Done(Message):
    """Host to edge: the step is applied, once and for all."""

    SIZE: ClassVar[int] = 96
    """Bytes of its body, whatever the numbers: a step's bytes are known before it."""
    loss: float | None = None
    """Of a cut without a tail."""
    queued: float = 0.0
    """Seconds this step waited for its turn on the host."""
    save: bool | None = None
    """In a group: whether the edge must keep a checkpoint of this step, as the host does. None: when it is due."""
    owes: bool = False
    """In a group: whether the edge's own layers are due now, to be averaged."""
    heard: bool = True
    """In a chosen group: whether the next step is heard."""

    def body(self) -> bytes:
        """As it travels: JSON, and blanks behind it."""
        return super().body().ljust(self.SIZE)


class Failed(Message):
    """Either to the other: why it stops."""

    code: Literal["refused", "busy", "bad", "not-finite", "internal"]
    message: Annotated[str, Field(max_length=2000)]
    after: float = 0.0
    """Seconds after which to try again, where that may help."""


Known = TypeVar("Known", bound=Message)


def parse(kind: type[Known], body: bytes) -> Known:
    """Read a message of this kind. Raises WireError naming the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deeply"}
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"{kind.__name__}{f'.{where}' if where else ''}: {first['msg']}"[:500]) from None
