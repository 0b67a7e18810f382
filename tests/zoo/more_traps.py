"""More toys with one trap each: inputs, Python, hooks, numbers. Importing this fills TRAPS further."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import Batch, generator
from tests.zoo.traps import DEPTH, LENGTH, WIDTH, Layers, inputs, toy


# ----------------------------------------------------------------------------------------------------------- arithmetic
@toy("randn")
class Randn(Layers):
    def trap(self, h: Tensor) -> Tensor:
        return h + 0.1 * torch.randn(h.shape, device=h.device) + 0.1 * torch.rand_like(h)


@toy("fft")
class Fft(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(LENGTH // 2 + 1, WIDTH, dtype=torch.complex64) * 0.3)

    def trap(self, h: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(h, dim=1) * self.filter, n=LENGTH, dim=1)


@toy("complex_output")
class ComplexOutput(Layers):
    """Complex values also cross from layer to layer and leave the model."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(x, torch.flip(x, (1,)))
        for layer in self.layers:
            z = torch.complex(torch.tanh(layer(z.real)), self.dropout(layer(z.imag)))
        return z


@toy("autocast_off")
class AutocastOff(Layers):
    """Under an outer autocast this region alone is float32."""

    def trap(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return torch.tanh(self.layers[1](h.float()))


@toy("autocast_on")
class AutocastOn(Layers):
    def trap(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, dtype=torch.bfloat16):
            return torch.tanh(self.layers[1](h)).float()


@toy("layerdrop_zero")
class LayerDropZero(Layers):
    """A branch on a random tensor that never goes the other way."""

    probability = 0.0

    def trap(self, h: Tensor) -> Tensor:
        if self.training and torch.rand([]) < self.probability:
            return h
        return torch.tanh(self.layers[1](h))


# --------------------------------------------------------------------------------------------------------------- inputs
def _odd_inputs(size: int = 4) -> Batch:
    extra = {"bias": torch.randn(WIDTH, generator=generator(1)), "deep": {"names": ["a", "b"], "missing": None}}
    return inputs(size) | {"mask": None, "scale": 0.5, "repeat": 2, "mode": "tanh", "extra": extra}


@toy("odd_inputs", _odd_inputs)
class OddInputs(Layers):
    """None, numbers, a string and a nested dict beside the tensor."""

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None, scale: float, repeat: int, mode: str, extra: dict[str, Any]
    ) -> Tensor:
        h = x if mask is None else x * mask
        if extra["deep"]["missing"] is None:
            h = h + extra["bias"]
        for _ in range(repeat):
            h = super().forward(h * scale)
        return torch.tanh(h) if mode == "tanh" else h


def _masked(size: int = 4) -> Batch:
    mask = torch.ones(size, LENGTH, dtype=torch.bool)
    mask[1::2, -2:] = False
    return inputs(size) | {"mask": mask}


@toy("branch_on_input", _masked, reads_values="if mask.all()")
class BranchOnInput(Layers):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        h = super().forward(x)
        return h if mask.all() else h * mask[..., None]


@toy("mask_indexing", _masked, reads_values="the number of true places in mask is a size")
class MaskIndexing(Layers):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.zeros_like(x)
        out[mask] = super().forward(x[mask])
        return out


# --------------------------------------------------------------------------------------------------------------- Python
@toy("plain_constant")
class PlainConstant(Layers):
    """A tensor attribute that is neither parameter nor buffer: in no state_dict, moved by no `.to`."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.linspace(0.5, 1.5, WIDTH)
        self.constants = [torch.ones(WIDTH), torch.full((WIDTH,), 0.25)]

    def trap(self, h: Tensor) -> Tensor:
        return h * self.constant.to(h.device) + self.constants[1].to(h.device)


@toy("python_state")
class PythonState(Layers):
    """What it remembers has no influence on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.last: Tensor | None = None

    def trap(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.last = h.detach()
        return h


def _shift(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + 0.5


def _scale_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 0.5, *args[1:])


def _halve(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(grad * 0.5 for grad in grad_input)


@toy("forward_hook")
class ForwardHook(Layers):
    """On a childless module, and on one with children."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].register_forward_hook(_shift)
        self.layers[3].register_forward_pre_hook(_scale_input)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.block.register_forward_hook(_shift)

    def trap(self, h: Tensor) -> Tensor:
        return self.block(h)


@toy("backward_hook")
class BackwardHook(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.layers[3].register_full_backward_hook(_halve)


@toy("backward_hook_on_block")
class BackwardHookOnBlock(Layers):
    """The hook is on a module with children, which a trace that goes inside would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.block.register_full_backward_hook(_halve)

    def trap(self, h: Tensor) -> Tensor:
        return self.block(h)


@toy("compiled_block")
class CompiledBlock(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.block = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), backend="eager")

    def trap(self, h: Tensor) -> Tensor:
        return self.block(h)


# ------------------------------------------------------------------------------------------------------ must be refused
@toy("branch_on_activation", refused="the way through the model depends on an activation")
class BranchOnActivation(Layers):
    def trap(self, h: Tensor) -> Tensor:
        return h * 2.0 if h.sum() > 0 else h - 1.0


@toy("item_of_activation", refused="an activation becomes a Python number")
class ItemOfActivation(Layers):
    def trap(self, h: Tensor) -> Tensor:
        return h / (1.0 + h.abs().max().item())


@toy("numpy_of_activation", refused="an activation leaves torch")
class NumpyOfActivation(Layers):
    def trap(self, h: Tensor) -> Tensor:
        noise = torch.from_numpy(h.detach().cpu().numpy() * 0.1)
        return h + noise.to(h.device)


@toy("size_of_activation", refused="how many activations are positive is a size")
class SizeOfActivation(Layers):
    def late(self, h: Tensor) -> Tensor:
        positive = h[h > 0]
        return h + positive.mean() * (len(positive) / h.numel()) / DEPTH
