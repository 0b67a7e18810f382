"""AdamW whose weights and state lie in one piece, so that a step is one call for many small tensors.

    weights   | w3 w3 | w2 w2 w2 | w1 .. |      the parameters are views; the order is the backward's
    state     | m3 m3 | m2 m2 m2 | m1 .. |      likewise, so a checkpoint sees it by parameter

LightSeq2's idea (Wang et al., SC 2022, section 3.2: one kernel for all parameters, in contiguous memory) without its
kernels: every number goes through torch's own AdamW, which treats each for itself, so the result is bit for bit the
same. It pays where tensors are many and small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class Run:
    """Weights that lie one behind the other and have had as many steps."""

    parameters: Sequence[Tensor]
    places: Sequence[int]
    """Where each lies in memory: it may be moved."""
    states: Sequence[dict[str, Any]]
    weights: Tensor
    flat: dict[str, Tensor]
    """The state of all of them, and ``step``."""
    steps: Tensor
    """The same count for each of them: what is copied or saved may share nothing."""
    gradients: Tensor

    def stands(self, own: Any) -> bool:
        """Whether weights and state are still what they were when the run was made."""
        return all(own.get(p) is s for p, s in zip(self.parameters, self.states, strict=True)) and all(
            p.data_ptr() == place for p, place in zip(self.parameters, self.places, strict=True)
        )

    def gradient(self) -> Tensor:
        """As one tensor: the one they are views of, if they lie in the same order, else gathered."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        if _adjacent(found):
            return _whole(found)
        return torch.cat([gradient.flatten() for gradient in found], out=self.gradients)


class FlatAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` in one call for all weights of a group. Moves the weights' memory when it is made.

    Sparse and complex parameters, and ``capturable`` or ``differentiable`` steps, are refused with a ValueError.
    """

    elementwise = True
    """Every number for itself, so shares of weights will do (ZeRO)."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        """``options`` are those of ``torch.optim.AdamW``."""
        super().__init__(params, lr, **options)
        for name in ("capturable", "differentiable"):
            if any(group[name] for group in self.param_groups):
                raise ValueError(f"FlatAdamW does not go with {name}=True: use torch.optim.AdamW")
        self._runs: dict[int, list[Run]] = {}
        for group in self.param_groups:
            if odd := [tuple(p.shape) for p in group["params"] if p.is_complex() or p.layout != torch.strided]:
                raise ValueError(f"FlatAdamW is for dense real weights, found others of shapes {odd[:3]}: use AdamW")
            _lay_flat(group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for run in self._runs_of(number, [p for p in reversed(group["params"]) if p.grad is not None]):
                most = [run.flat["max_exp_avg_sq"]] if group["amsgrad"] else []
                adamw(
                    [run.weights], [run.gradient()], [run.flat["exp_avg"]], [run.flat["exp_avg_sq"]], most,
                    [run.flat["step"]], foreach=group["foreach"], fused=group["fused"], amsgrad=group["amsgrad"],
                    beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                    weight_decay=group["weight_decay"], maximize=group["maximize"],
                    grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
                )  # fmt: skip
                run.steps.copy_(run.flat["step"])
        return loss

    def _runs_of(self, number: int, trained: list[Tensor]) -> list[Run]:
        runs = self._runs.get(number, [])
        same = sum(len(run.parameters) for run in runs) == len(trained)
        covered = iter(trained)
        if not same or any(p is not next(covered) for run in runs for p in run.parameters):
            runs = []
        if not runs or not all(run.stands(self.state) for run in runs):
            group = self.param_groups[number]
            for parameter in group["params"]:  # who has no gradient now leaves the run, and keeps its count of steps
                if self.state.get(parameter):
                    self.state[parameter]["step"] = self.state[parameter]["step"].clone()
            runs = self._runs[number] = [self._run(part, group) for part in self._parts(trained)]
        return runs

    def _parts(self, trained: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        part: list[Tensor] = []
        for parameter in trained:
            if part and (not _adjacent([part[-1], parameter]) or self._steps(part[-1]) != self._steps(parameter)):
                yield part
                part = []
            part.append(parameter)
        if part:
            yield part

    def _steps(self, parameter: Tensor) -> float:
        state = self.state.get(parameter)
        return float(state["step"]) if state else 0.0

    def _run(self, parameters: list[Tensor], group: dict[str, Any]) -> Run:
        weights = _whole(parameters)
        names = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
        flat = {name: torch.zeros_like(weights) for name in names}
        device = weights.device if group["fused"] else "cpu"
        flat["step"] = torch.tensor(self._steps(parameters[0]), dtype=torch.float32, device=device)
        steps = flat["step"].repeat(len(parameters))
        for start, count, parameter in zip(_starts(parameters), steps, parameters, strict=True):
            before = self.state.get(parameter, {})
            views = {name: flat[name].narrow(0, start, parameter.numel()).view(parameter.shape) for name in names}
            for name in names:
                if name in before:
                    views[name].copy_(before[name])
            self.state[parameter] = {"step": count, **views}
        places, states = [p.data_ptr() for p in parameters], [self.state[p] for p in parameters]
        return Run(parameters, places, states, weights, flat, steps, torch.empty_like(weights))


def _lay_flat(parameters: Sequence[Tensor]) -> None:
    """Give the weights of one dtype and device one memory, last first: as the backward meets them."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in reversed(parameters):
        # what is a view of other memory, as with ZeRO, belongs there
        alone = not parameter.is_meta and parameter.untyped_storage().nbytes() == parameter.nbytes
        if alone and parameter.is_contiguous() and parameter.numel():
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in kinds.values():
        flat = torch.cat([p.detach().flatten() for p in members])
        for start, parameter in zip(_starts(members), members, strict=True):
            parameter.data = flat.narrow(0, start, parameter.numel()).view(parameter.shape)


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    return list(accumulate((t.numel() for t in tensors[:-1]), initial=0))


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether they lie in one memory, each where the one before ends."""
    first = tensors[0]
    place, size, memory = first.data_ptr(), first.element_size(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != place or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return False
        if tensor.untyped_storage().data_ptr() != memory:
            return False
        place += tensor.numel() * size
    return True


def _whole(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0].detach()
    return first.as_strided((sum(t.numel() for t in tensors),), (1,), first.storage_offset())
