"""Products of Linear layers in float8, by torchao (dynamic scales: Micikevicius et al., arXiv 2209.05433).

    forward     x and w are rounded to e4m3, each with a scale of its own, multiplied, and the product is as wide as x
    backward    the output's gradient in e5m2, both products likewise

Weights, sums of gradients and the optimizer are as they would be without. A layer is run as torchao's own, which shares
its weight, where the stage's code calls the function; nothing is traced, saved or sharded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.methods.layers import Watched
from merak_like.runtime.methods.method import Method, Place
from merak_like.runtime.methods.wrapped import AfterSum
from merak_like.runtime.split_backward import Operands
from merak_like.runtime.stage_code import Piece

MULTIPLE = 16
"""Both sides of a weight are multiples of it: torch's float8 product asks for that."""
LEAST = (8, 9)
"""CUDA capability that has such products."""


class Float8(Method):
    """Runs Linear layers in float8 where both sides of the weight are multiples of 16; others stay as they are.

    ``recipe`` is torchao's: "tensorwise", "rowwise" or "rowwise_with_gw_hp". ``emulate`` gives the same rounding with
    products in the usual precision, on any device. ``compile`` compiles each layer, which joins rounding and product.
    Raises ValueError where torchao is not there.
    """

    watches = True

    def __init__(self, recipe: str = "tensorwise", *, emulate: bool = False, compile: bool = False) -> None:
        try:
            self._torchao: Any = import_module("torchao.float8")
        except ImportError as error:
            raise ValueError(
                f"Float8 needs torchao, but {error}: pip install 'merak-like[float8]', or use precision='bf16'"
            ) from None
        known = [one.value for one in self._torchao.Float8LinearRecipeName]
        if recipe not in known:
            raise ValueError(f"recipe={recipe!r} is none of torchao's: {', '.join(known)}")
        self.recipe, self.emulate, self.compile = recipe, emulate, compile
        self._layers: dict[int, Callable[[Tensor], Tensor]] = {}

    def gradients(self, reducer: Gradients, place: Place) -> Gradients:
        """The same; here it is known where this runs. Raises ValueError for a device that has no such products."""
        device = place.world.device
        if not self.emulate and (missing := lacking(device)):
            raise ValueError(
                f"Float8 multiplies in float8, and {missing}: use precision='bf16', or Float8(emulate=True), which "
                "rounds in the same way and saves nothing"
            )
        if not any(_suits(p) for p in place.parameters.values()):
            raise ValueError(
                f"Float8 found no weight on this rank whose two sides are multiples of {MULTIPLE}: leave it out, or "
                "make the layers so wide"
            )
        return AfterSum(reducer, end=self._layers.clear)

    def piece(self, piece: Piece) -> Piece:
        """Run its Linear layers in float8."""
        return replace(piece, module=Watched(piece.module, self._around))  # type: ignore[arg-type]

    def _around(self, func: Any, found: Operands, call: Callable[[Tensor], Tensor]) -> Tensor:
        weight = found.weight
        if func is not F.linear or not isinstance(weight, nn.Parameter) or not _suits(weight):
            return call(found.x)
        made = self._layer(weight)(found.x)
        return made if found.bias is None else made + found.bias.to(made.dtype)  # as torchao's own adds it

    def _layer(self, weight: nn.Parameter) -> Callable[[Tensor], Tensor]:
        """Without a bias: calls with one weight may have different ones."""
        if id(weight) not in self._layers:
            empty = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
            config = self._torchao.Float8LinearConfig.from_recipe_name(self.recipe)
            config = replace(config, emulate=self.emulate)
            made: Any = self._torchao.convert_to_float8_training(nn.Sequential(empty), config=config)[0]
            made.weight = weight
            self._layers[id(weight)] = torch.compile(made) if self.compile else made
        return self._layers[id(weight)]


def lacking(device: torch.device) -> str:
    """What a device has not that float8 products need; empty if it has all."""
    if device.type != "cuda":
        return f"a device of type {device.type} has no such products"
    found = torch.cuda.get_device_capability(device)
    return "" if found >= LEAST else f"{device} has CUDA capability {found[0]}.{found[1]}, not {LEAST[0]}.{LEAST[1]}"


def _suits(weight: Tensor) -> bool:
    return weight.ndim == 2 and all(side % MULTIPLE == 0 for side in weight.shape)
