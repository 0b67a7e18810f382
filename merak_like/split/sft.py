"""SFT: a layer's feed-forward gets a narrow place, so that only rank numbers a token cross the cut.

The first matrix W of one layer's feed-forward is factored by a truncated singular value decomposition, W ~ U S V, and
the residual link around that feed-forward is removed (Shi et al. 2022, "An Efficient Split Fine-tuning Framework for
Edge and Cloud Collaborative Learning", arXiv 2211.16703; the details are from the public code of its users).

    edge   ... attention, norm --> h --> v --> s --> z        z = S V h, (b, s, rank): all that crosses, forward
    cloud  z --> u --> activation --> last --> norm? --> ...   and its gradient, backward

S starts diagonal and is trained as a full (rank, rank) matrix, as are U and V. A gated feed-forward has its gate and
up matrix stacked, so that one z serves both. Both the missing link and the rank cost accuracy, on token-level
tasks much of it: measure yours. With ``skip="surrogate"`` the cloud adds P z in its place, P = V^T S^-1 at first and
trained, at no byte more.

The model's own Python runs on, under its own names: only the matrices are replaced, and the layer's forward is run
under a mode that leaves out one addition, the one of something that does not come from the feed-forward. So the
change holds in training and evaluation, for any shape, eagerly and when traced; the graph that the tracer sees no
longer has the link.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.tracer import LossFn, trace
from merak_like.split.element_weights import factor_by_elements
from merak_like.split.feed_forward import ADDS, FeedForward, find_feed_forward, matrix_of
from merak_like.split.low_rank import factor

SKIPS = ("none", "surrogate")
PLAIN = "plain"
WEIGHINGS = {"sides": factor, "elements": factor_by_elements}
"""How the Fisher information of a weight weighs its factors: as FWSVD, on both sides, and as TFWSVD."""


def sft(
    model: nn.Module,
    example: Any,
    layer: str,
    rank: int,
    *,
    skip: str = "none",
    fisher: Mapping[str, Tensor] | None = None,
    weigh: str = "sides",
    loss_fn: LossFn | None = None,
) -> FeedForward:
    """Change the model in place: layer (a module path) sends ``rank`` numbers a token past the middle of its
    feed-forward.

    ``example`` is a batch as training will see it, as for ``trace``. ``fisher`` holds the Fisher information of the
    first matrices' weights by parameter name and weighs the factors, by ``weigh`` either whole rows and columns or each
    element for itself; see ``fisher_information``, and ``element_weights.spread`` for which. A model on the meta device
    keeps its factors there, to be loaded later. Returns what was found; the new parameters are
    ``{layer}.wire.v.weight`` and ``.s.weight``, ``{first}.u.weight`` and ``.u.bias``, and for a surrogate
    ``{layer}.wire.skip.weight``.

    Raises ValueError where the layer has no feed-forward with one residual link, or for a rank it cannot have; the
    model is then as it was.
    """
    for word, said, known in (("skip", skip, SKIPS), ("weigh", weigh, WEIGHINGS)):
        if said not in known:
            raise ValueError(f"{word} must be one of {', '.join(known)}, found {said!r}")
    block = _submodule(model, layer)
    if isinstance(block, Narrow):
        raise ValueError(f"{layer} is changed already, to rank {block.wire.rank}: take another layer or a fresh model")
    found = find_feed_forward(trace(model, example, loss_fn).graph, model, layer)
    matrices = [_matrix(model, path) for path in found.first]
    sizes = [weight.shape[0] for weight, _ in matrices]
    information, whole = _stacked_fisher(model, found, fisher), torch.cat([weight.detach() for weight, _ in matrices])
    factors = factor(whole, rank) if information is None else WEIGHINGS[weigh](whole, rank, information)
    like = matrices[0][0]
    surrogate = None
    if skip == "surrogate":
        inverse = torch.where(factors.s.diagonal() > 0, 1 / factors.s.diagonal(), 0)
        surrogate = _linear(factors.v.T * inverse, None, like)
    wire = Wire(_linear(factors.v, None, like), _linear(factors.s, None, like), surrogate)
    for path, u, (_, bias) in zip(found.first, factors.u.split(sizes), matrices, strict=True):
        model.set_submodule(path, Factored(wire, _linear(u, bias, like)))
    kind = type(block)
    block.add_module("wire", wire)
    # As torch's parametrizations do: the object stays itself, with its attributes and its base class.
    block.__class__ = type(f"Narrow{kind.__name__}", (Narrow, kind), {"__module__": __name__})
    return found


def cut_of(graph: ProxyGraph, layer: str) -> int:
    """The first op of the cloud's part in a trace of the changed model: ``starts`` of (0, cut, len(ops)) cut at z.

    Raises ValueError where the graph has no such layer.
    """
    path = f"{layer}.wire.s"
    at = [i + 1 for i, op in enumerate(graph.ops) if op.target == path]
    at = at or [call.stop for call in graph.calls if call.path == path]  # traced down to functions
    if len(at) != 1:
        raise ValueError(f"the graph computes the wire of {layer!r} {len(at)} times: was it traced after sft(...)?")
    return at[0]


NOT_ALONE = nn.Identity()
"""A module of no model. A tracer that meets it records the calls under way op by op and folds none of them into one
node: rightly, since they depend on more than their arguments, on z or on the mode of the layer around them."""


class Wire(nn.Module):
    """z = S V h, once a pass, whoever asks."""

    def __init__(self, v: nn.Linear, s: nn.Linear, skip: nn.Linear | None) -> None:
        super().__init__()
        self.v, self.s, self.skip = v, s, skip
        self.active: _WithoutResidual | None = None
        """The pass under way, while the layer's own forward runs."""

    @property
    def rank(self) -> int:
        """Numbers a token."""
        return self.s.out_features

    def forward(self, h: Tensor) -> Tensor:
        """(..., rank) of (..., in)."""
        if self.active is None:
            return self.s(self.v(h))
        return self.active.product(h)


class Factored(nn.Module):
    """One of the first matrices: U z + b, where z comes over the wire."""

    def __init__(self, wire: Wire, u: nn.Linear) -> None:
        super().__init__()
        self.u = u
        self.shared = (wire,)
        """In a tuple, since it belongs to the layer: registered here its parameters would have two names."""

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) that the factors stand for, for code that looks at a layer's weight."""
        wire = self.shared[0]
        return self.u.weight @ wire.s.weight @ wire.v.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, likewise."""
        return self.u.bias

    def forward(self, h: Tensor) -> Tensor:
        """(..., out) of (..., in)."""
        wire = self.shared[0]
        out = self.u(NOT_ALONE(wire(h)))
        if wire.active is not None:
            wire.active.mine(out)
        return out


class Narrow(nn.Module):
    """Mixed into the layer's class: its forward without the residual link around the feed-forward."""

    wire: Wire

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own class computes, but for one addition."""
        wire = self.wire
        wire.active = run = _WithoutResidual(wire)
        try:
            with run:
                out = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            wire.active = None
        run.require_done(out, type(self).__name__)
        return out


class _WithoutResidual(TorchFunctionMode):
    """Follows what comes from the feed-forward; the one addition of something else to it is left out."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire
        self.own: dict[int, Tensor] = {}
        """Everything computed from the feed-forward, by ``id``, kept so that ids stay theirs."""
        self.made: tuple[Tensor, Tensor] | None = None
        """h and its z."""
        self.dropped = 0

    def product(self, h: Tensor) -> Tensor:
        """z of h, computed once for the gate and the up matrix."""
        if self.made is None or self.made[0] is not h:
            self.made = h, self.wire.s(self.wire.v(h))
        return self.made[1]

    def mine(self, *tensors: Tensor) -> None:
        """These come from the feed-forward."""
        self.own.update((id(tensor), tensor) for tensor in tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ins = _tensors((args, kwargs))
        if not any(id(tensor) in self.own for tensor in ins):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ADDS and len(ins) == 2 and ins[0].shape == ins[1].shape:
            own = [tensor for tensor in ins if id(tensor) in self.own]
            if len(own) == 1:
                return self.without(own[0])
        out = func(*args, **kwargs)
        self.mine(*_tensors(out))
        return out

    def without(self, result: Tensor) -> Tensor:
        """The sum without the residual; with the surrogate where there is one."""
        self.dropped += 1
        NOT_ALONE(result)
        assert self.made is not None
        if self.wire.skip is not None:
            result = result + self.wire.skip(self.made[1])
            self.mine(result)
        return result

    def require_done(self, out: Any, who: str) -> None:
        """Raises ValueError where this pass did not come by one residual link, or came out beside the feed-forward."""
        results = _tensors(out)
        if self.dropped != 1 or not results or id(results[0]) not in self.own:
            raise ValueError(
                f"{who}: this pass added something to its feed-forward {self.dropped} times, not once as the traced "
                f"example did, so that more than the wire would have to travel: does the model run differently here?"
            )


def _tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, Mapping):
        return [tensor for value in item.values() for tensor in _tensors(value)]
    if isinstance(item, tuple | list):
        return [tensor for value in item for tensor in _tensors(value)]
    return []


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        paths = [name for name, _ in model.named_modules()]
        near = ", ".join(get_close_matches(path, paths, 3, cutoff=0)) or "none"
        raise ValueError(f"the model has no layer {path!r}; near it: {near}") from None


def _matrix(model: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    found = matrix_of(model.get_submodule(path))
    assert found is not None, path
    return found


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    """A Linear with these values, trained if ``like`` is; the bias stays the parameter it was."""
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    module.weight = nn.Parameter(weight.detach().to(like.device).contiguous(), requires_grad=like.requires_grad)
    if bias is not None:
        module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return module


def _stacked_fisher(model: nn.Module, found: FeedForward, fisher: Mapping[str, Tensor] | None) -> Tensor | None:
    if fisher is None:
        return None
    missing = [f"{path}.weight" for path in found.first if f"{path}.weight" not in fisher]
    if missing:
        raise ValueError(f"the Fisher information of {', '.join(missing)} is missing; given: {', '.join(fisher)}")
    turned = [not isinstance(model.get_submodule(path), nn.Linear) for path in found.first]
    given = [fisher[f"{path}.weight"] for path in found.first]
    return torch.cat([each.T if turn else each for each, turn in zip(given, turned, strict=True)])
