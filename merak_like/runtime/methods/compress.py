"""What linear layers and convolutions keep for their backward, in few bits (COMET: Jin et al., VLDB 2022).

    forward    x -> layer(x), and instead of x its codes are kept         (quantiser.py: |x - x'| <= bound, always)
    backward   codes -> x' -> the weight's gradient

Only weights' gradients feel it: a sum over n inputs is off by about ``A * mean|g| * sqrt(n * rho) * bound``, where g
are the gradients of the layer's output and rho the share of inputs that are not 0. Each layer's bound is set so that
this is ``NOISE`` of the mean momentum of its weight (the paper's rule); until there is momentum it is ``bound``.

Several layers that read one tensor keep it once, together with the ReLU that made it, whose backward stays exact as
signs and zeros do. Pieces that are run again keep nothing, so nothing there is compressed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from merak_like._compat import storage_key
from merak_like.partitioner.graph import ProxyGraph
from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods.by_blocks import ALL, ByBlocks
from merak_like.runtime.methods.layers import Watched
from merak_like.runtime.methods.method import Job, Place
from merak_like.runtime.methods.planned_bytes import coder, with_packed_inputs
from merak_like.runtime.methods.quantiser import Packed, quantise
from merak_like.runtime.methods.wrapped import AfterSum
from merak_like.runtime.split_backward import Operands
from merak_like.runtime.stage_code import Piece

A, NOISE = 0.32, 0.01
"""Of COMET's model of the error, and how much of it is allowed."""
RANGE = 2.5
"""Bounds are relative to so many root mean squares of the tensor: about its range, and no outlier moves it."""
TIGHTEST, LOOSEST = 1e-3, 0.1
SMALLEST = 1024
"""Numbers in a tensor that is worth packing."""
EVERY = 50
"""Steps between two looks at momentum."""
RELU = frozenset((F.relu, torch.relu, Tensor.relu))


class Kept:
    """A tensor that the backward will read, as it is or in few bits."""

    def __init__(self, tensor: Tensor) -> None:
        self._held: Tensor | Packed = tensor.detach()
        self._tried = False

    def squeeze(self, bound: float, entropy: bool) -> tuple[int, int]:
        """Pack it, the first time it is asked to; its bytes before and after."""
        if self._tried or isinstance(self._held, Packed):
            return 0, 0
        self._tried, before = True, self._held.nbytes
        self._held = quantise(self._held, bound, entropy=entropy) or self._held.clone()
        return before, self._held.nbytes

    def tensor(self) -> Tensor:
        """The tensor, within its bound."""
        return self._held.tensor() if isinstance(self._held, Packed) else self._held


@dataclass
class Layer:
    """What is known of one weight's layer."""

    bound: float
    """Relative."""
    size: float = 0.0
    """Root mean square of its input."""
    rows: int = 0
    """That its gradient is a sum over, in this step."""
    gradients: list[float] = field(default_factory=list[float])
    """Mean magnitudes of its output's."""
    full: float = 1.0
    """Share of its inputs that are not 0."""


class Compress(ByBlocks):
    """Packs the inputs that Linear and Conv layers keep. ``bound`` is relative to about the range of each tensor.

    Only in modules whose path matches ``blocks``, all by default. With ``"auto"`` ``auto_parallel`` chooses among the
    blocks of the model those for which this costs less than to keep them, where they do not fit, or to compute them
    again; it may be none.

    Bounds are not in checkpoints: the first step of a job that goes on looks at the momentum again.
    ``entropy`` spends time on half the bytes again. Without ``adapt`` the bound stays. ``counted`` has the bytes of
    all that was kept, before and after.
    """

    what = "some layers keep their inputs in few bits"

    def __init__(
        self, bound: float = 0.01, *, entropy: bool = False, adapt: bool = True, blocks: str = ALL
    ) -> None:  # fmt: skip
        if not 0 < bound < 1:
            raise ValueError(f"bound={bound}: it is a share of a tensor's range, above 0 and below 1")
        super().__init__(blocks)
        self.bound, self.entropy, self.adapt = bound, entropy, adapt
        self._layers: dict[int, Layer] = {}
        self._known: dict[int, tuple[Any, int, Kept]] = {}
        self._own: set[int] | None = None
        self._counted = [0, 0]
        self._looked, self._looking = False, False

    @property
    def counted(self) -> tuple[int, int]:
        """Bytes kept so far: of the tensors, and of what stands for them."""
        return self._counted[0], self._counted[1]

    def bounds(self) -> tuple[float, ...]:
        """The relative bound of each layer, in the order of their first call."""
        return tuple(layer.bound for layer in self._layers.values())

    def check(self, job: Job) -> None:
        """Shares of the momentum say nothing of a whole weight."""
        super().check(job)
        if job.elsewhere and self.adapt:
            raise ValueError(
                f"Compress looks at the momentum of the parameters, {job.elsewhere} has it elsewhere: adapt=False"
            )

    def planned(self, graph: ProxyGraph, inside: tuple[str, ...] | None) -> ProxyGraph:
        """Fewer bytes kept, and more time."""
        return with_packed_inputs(graph, SMALLEST, coder(self.bound, entropy=self.entropy), inside)

    def piece(self, piece: Piece) -> Piece:
        """Compress what it keeps, unless it is run again."""
        if piece.again:
            return piece
        return replace(piece, module=Watched(piece.module, self._around, {RELU: self._relu}))  # type: ignore[arg-type]

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """The same, and at its end a look at the momentum; from now on it is known which layers are meant."""
        inside = None if self.blocks == ALL else tuple(f"{path}." if path else "" for path in self.named(place.model))
        within = {id(p) for name, p in place.parameters.items() if inside is None or name.startswith(inside)}
        self._own = None if inside is None else within
        if not self.adapt:
            return reducer
        return AfterSum(reducer, lambda: self.settle(place), lambda: self.begin(place.steps()))

    # --- while a stage runs --------------------------------------------------------------------------------------

    def _around(self, func: Any, found: Operands, call: Callable[[Tensor], Tensor]) -> Tensor:
        x, kind = found.x, found.x.device.type
        others = self._own is not None and id(found.weight) not in self._own
        if others or not x.is_floating_point() or x.numel() < SMALLEST:
            return call(x)
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))  # as the layer would; so what it keeps is known
        layer = self._layers.setdefault(id(found.weight), Layer(self.bound))
        # Autograd keeps ``pack`` as long as what it packed, so it must not hold x.
        memory, numel, kept = storage_key(x), x.numel(), self._of(x)

        def pack(tensor: Tensor) -> Any:
            if storage_key(tensor) != memory or tensor.numel() != numel or not tensor.is_contiguous():
                return tensor
            bound = layer.bound * RANGE * float(tensor.detach().float().square().mean().sqrt())
            before, after = kept.squeeze(bound, self.entropy)
            self._counted[0] += before
            self._counted[1] += after
            return kept, tensor.shape

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            made = call(x)
        if self._looking and made.requires_grad:
            self._look(layer, x, found.weight, made)
        return made

    def _relu(self, call: Callable[[], Tensor]) -> Tensor:
        """A ReLU keeps its result: the next layer may pack it for both."""
        kepts: list[tuple[Tensor, Kept]] = []

        def pack(tensor: Tensor) -> Any:
            kepts.append((tensor, Kept(tensor)))
            return kepts[-1][1], tensor.shape

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            made = call()
        for tensor, kept in kepts:
            if storage_key(tensor) == storage_key(made) and tensor.shape == made.shape:
                self._note(made, kept)
        kepts.clear()  # autograd keeps ``pack``, and that the list
        return made

    def _of(self, x: Tensor) -> Kept:
        known = self._known.get(id(x))
        if known is not None and known[0]() is x and known[1] == x._version:
            return known[2]
        return self._note(x, Kept(x) if x.is_contiguous() else Kept(x.contiguous()))

    def _note(self, x: Tensor, kept: Kept) -> Kept:
        key, known = id(x), self._known

        def forget(_: Any) -> None:
            known.pop(key, None)

        known[key] = (weakref.ref(x, forget), x._version, kept)
        return kept

    # --- bounds --------------------------------------------------------------------------------------------------

    def _look(self, layer: Layer, x: Tensor, weight: Tensor, made: Tensor) -> None:
        layer.rows += made.numel() // weight.shape[0]
        layer.size = float(x.detach().float().square().mean().sqrt())
        layer.full = float((x.detach() != 0).float().mean())
        made.register_hook(lambda g: layer.gradients.append(float(g.detach().abs().mean())))

    def begin(self, step: int) -> None:
        """A step begins; one of them all, or the first of a job that goes on."""
        self._looking = step % EVERY == 0 or not self._looked
        self._looked = True
        for layer in self._layers.values():
            layer.rows = 0
            layer.gradients.clear()

    def settle(self, place: Place) -> None:
        """Set each layer's bound by the momentum of its weight, in a step that was looked at."""
        if not self._looking:
            return
        state = place.optimizer.state if place.optimizer is not None else {}
        for parameter in place.parameters.values():
            layer = self._layers.get(id(parameter))
            if layer is None or not layer.gradients or parameter.grad is None:
                continue
            own = state.get(parameter, {})
            momentum = own.get("exp_avg", own.get("momentum_buffer"))
            if momentum is None:
                continue
            steepness = sum(layer.gradients) / len(layer.gradients)
            spread = A * steepness * (layer.rows * layer.full * place.count) ** 0.5 * RANGE * layer.size
            if spread > 0:
                wanted = NOISE * float(momentum.abs().mean()) / spread
                layer.bound = min(LOOSEST, max(TIGHTEST, wanted))


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    held, shape = kept
    return held.tensor().view(shape)
