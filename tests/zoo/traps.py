"""Toys with one trap each: five layers of (batch, length, WIDTH), and in their middle what may go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Batch, Toy, generator

WIDTH, LENGTH, DEPTH = 16, 6, 5
TRAPS: dict[str, Toy] = {}


def inputs(size: int = 4) -> Batch:
    return {"x": torch.randn(size, LENGTH, WIDTH, generator=generator())}


class Layers(nn.Module):
    """The common body: `trap` is called between the second and third layer, `late` before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
        self.dropout = nn.Dropout(0.1)

    def trap(self, h: Tensor) -> Tensor:
        return h

    def late(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number == 2:
                x = self.trap(x)
            if number == DEPTH - 1:
                x = self.late(x)
            x = self.dropout(torch.tanh(layer(x)))
        return x


def toy(name: str, batch: Callable[..., Batch] = inputs, **more: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter the class into TRAPS under that name."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        TRAPS[name] = Toy(name, cls, batch, **more)
        return cls

    return enter


# ------------------------------------------------------------------------------------------------- written in place
@toy("setitem")
class SetItem(Layers):
    def trap(self, h: Tensor) -> Tensor:
        h = h * 1.0
        h[:, 0] = h[:, 1] * 2.0
        return h


@toy("inplace")
class InPlace(Layers):
    def trap(self, h: Tensor) -> Tensor:
        h = h + 1.0
        h.mul_(0.5)
        h += 0.25
        return h


@toy("view_mutation")
class ViewMutation(Layers):
    def trap(self, h: Tensor) -> Tensor:
        h = h + 1.0
        h.view(-1, WIDTH).transpose(0, 1)[:3].mul_(0.5)
        return h


@toy("far_view_mutation")
class FarViewMutation(Layers):
    """Made before two layers and changed, through a view, after them: no cut may come in between."""

    def trap(self, h: Tensor) -> Tensor:
        self.kept = h + 1.0
        return h

    def late(self, h: Tensor) -> Tensor:
        kept = self.kept
        del self.kept
        kept[:, 1:3].mul_(0.5)
        return h + kept


@toy("relu_inplace")
class ReluInPlace(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def trap(self, h: Tensor) -> Tensor:
        h = h + 0.1
        self.relu(h)  # the result is not used: h itself was changed
        return h


@toy("buffer_counter")
class BufferCounter(Layers):
    steps: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def trap(self, h: Tensor) -> Tensor:
        self.steps += 1
        self.mean.lerp_(h.detach().mean(dim=(0, 1)), 0.1)
        return (h - self.mean) / self.steps


# --------------------------------------------------------------------------------------- what autograd does differently
@toy("no_grad")
class NoGrad(Layers):
    def trap(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.layers[1](h).abs().mean(dim=-1, keepdim=True) + 1.0
        return h / scale


@toy("detach")
class Detach(Layers):
    def trap(self, h: Tensor) -> Tensor:
        return h + (h * h).detach()


class Staircase(torch.autograd.Function):
    """A gradient that no autograd rule would find from the forward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.round(h * 8.0) / 8.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return grads[0] * (1.5 + torch.tanh(h))


class Halves(torch.autograd.Function):
    """Two outputs and an argument that is no tensor."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        return h[..., : WIDTH // 2] * factor, h[..., WIDTH // 2 :] * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat([3.0 * ctx.factor * grads[0], 0.5 * grads[1]], dim=-1), None


SAVED_APPLY = Staircase.apply


@toy("custom_function")
class CustomFunction(Layers):
    def trap(self, h: Tensor) -> Tensor:
        return Staircase.apply(h)


@toy("custom_function_two_outputs")
class CustomFunctionTwoOutputs(Layers):
    def trap(self, h: Tensor) -> Tensor:
        left, right = Halves.apply(h, 0.5)
        return torch.cat([right, left], dim=-1)


@toy("saved_apply", refused="Function.apply was saved before tracing began, so the call cannot be seen")
class SavedApply(Layers):
    def trap(self, h: Tensor) -> Tensor:
        return SAVED_APPLY(h)


def _double(grad: Tensor) -> Tensor:
    return grad * 2.0


@toy("tensor_hook")
class TensorHook(Layers):
    def trap(self, h: Tensor) -> Tensor:
        h = h * 1.5
        if h.requires_grad:
            h.register_hook(_double)
        return h


@toy("frozen")
class Frozen(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].weight.requires_grad_(False)


@toy("frozen_start")
class FrozenStart(Layers):
    """Nothing before the third layer is trained: no gradient may be asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[:2].requires_grad_(False)


@toy("checkpoint")
class Checkpoint(Layers):
    reentrant = False

    def trap(self, h: Tensor) -> Tensor:
        return checkpoint(self.block, h, use_reentrant=self.reentrant)

    def block(self, h: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.layers[1](h)))


@toy("checkpoint_reentrant")
class CheckpointReentrant(Checkpoint):
    reentrant = True


# -------------------------------------------------------------------------------------------------- modules and weights
@toy("shared_module")
class SharedModule(Layers):
    def trap(self, h: Tensor) -> Tensor:
        return self.layers[0](h)

    def late(self, h: Tensor) -> Tensor:
        return self.layers[0](h)


@toy("tied_linear", lambda size=4: {"x": torch.randint(0, 20, (size, LENGTH), generator=generator())})
class TiedLinear(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(self.embedding(x)), self.embedding.weight)


@toy("multihead_attention")
class MultiheadAttention(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)

    def trap(self, h: Tensor) -> Tensor:
        out, weights = self.attention(h, h, h, need_weights=True)
        return h + out * weights.sum(dim=-1, keepdim=True)


@toy("lstm")
class Lstm(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True)

    def trap(self, h: Tensor) -> Tensor:
        out, (last, _) = self.lstm(h)
        return out + last[-1][:, None]


@toy("transformer_encoder")
class TransformerEncoder(Layers):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)

    def trap(self, h: Tensor) -> Tensor:
        padding = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
        padding[:, -1] = True
        return self.encoder(h, src_key_padding_mask=padding)
