"""Weights as a sparse matrix of powers of two times a small basis (SmartDeal: Chen et al., IEEE TNNLS 2022).

    W as rows of ``basis`` numbers  A (rows, basis)  ~  C (rows, basis) B (basis, basis)
    C: zeros and +-2^k                       B: dense, in float16

On disk: a bit for each number of C that says whether it is zero, a sign and an exponent of 3 bits for each that is not,
and B. Reading gives back exactly what ``rounded`` gives. It is a format for keeping and loading an edge half; nothing
is said of energy, which needs other hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from merak_like.runtime.codecs.bits import pack, packed_bytes, unpack

EXPONENTS = 8
"""Different powers of two: what fits into 3 bits."""
BASIS, THRESHOLD, ROUNDS = 4, 0.05, 50
SMALLEST = 256
"""Numbers in a tensor that is worth it; smaller ones are kept as they are."""


@dataclass(frozen=True)
class Powers:
    """One weight."""

    shape: tuple[int, ...]
    basis: Tensor
    """(basis, basis), float16."""
    codes: Tensor
    """(rows, basis), int16: 0, or sign times (exponent - lowest + 1)."""
    lowest: int
    """Exponent of the smallest power."""

    def tensor(self) -> Tensor:
        """The weight, float32."""
        made = powers(self.codes, self.lowest) @ self.basis.float()
        return made.flatten()[: torch.Size(self.shape).numel()].view(self.shape)


def powers(codes: Tensor, lowest: int) -> Tensor:
    """The coefficients that codes stand for."""
    return torch.where(codes == 0, 0.0, codes.sign() * torch.exp2((codes.abs() + (lowest - 1)).float()))


def _rounded(c: Tensor, threshold: float) -> tuple[Tensor, int]:
    """The nearest power of two of each number that is not small beside the largest, as codes."""
    most = float(c.abs().max())
    top = round(torch.tensor(max(most, 1e-30)).log2().item())
    lowest = top - EXPONENTS + 1
    exponent = c.abs().clamp(min=1e-30).log2().round()
    keep = (c.abs() >= threshold * c.abs().mean() * 2) & (exponent >= lowest)
    return (torch.where(keep, (exponent - lowest + 1).clamp(max=EXPONENTS), 0) * c.sign()).to(torch.int16), lowest


def decompose(weight: Tensor, *, basis: int = BASIS, threshold: float = THRESHOLD, rounds: int = ROUNDS) -> Powers:
    """Coefficients and basis in turn: C rounded, B the least squares of C B = A, C that of A from B (section III).

    ``threshold`` is the share of twice the mean magnitude below which a coefficient is zero.
    """
    flat = weight.detach().float().flatten()
    a = torch.cat([flat, flat.new_zeros(-len(flat) % basis)]).view(-1, basis)
    c, best = a.clone(), None
    for _ in range(rounds):
        codes, lowest = _rounded(c, threshold)
        found = powers(codes, lowest)
        b = torch.linalg.lstsq(found, a, driver="gelsd").solution.half().contiguous()
        error = float((found @ b.float() - a).square().sum())
        if best is not None and error >= best[0] * (1 - 1e-6):
            break
        best = error, Powers(tuple(weight.shape), b, codes, lowest)
        c = torch.linalg.lstsq(b.float().t(), a.t(), driver="gelsd").solution.t()
    assert best is not None
    return best[1]


def save(state: Mapping[str, Tensor], path: Path, *, basis: int = BASIS, threshold: float = THRESHOLD) -> None:
    """Write weights; floating matrices as powers of two, all else as it is. A safetensors file."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.numel() < SMALLEST:
            out[f"plain.{name}"] = tensor.detach().clone()
            continue
        found = decompose(tensor, basis=basis, threshold=threshold)
        there = found.codes.flatten() != 0
        some = found.codes.flatten()[there]
        out[f"mask.{name}"] = pack(there.to(torch.uint8), 1)
        out[f"codes.{name}"] = pack((some.abs() - 1 + EXPONENTS * (some < 0)).to(torch.uint8), 4)
        out[f"basis.{name}"] = found.basis
        out[f"shape.{name}"] = torch.tensor([found.lowest, *found.shape])
    save_file(out, path)


def kept_so(path: Path) -> bool:
    """Whether a safetensors file was written by ``save``."""
    with safe_open(path, "pt") as file:
        return any(key.startswith("basis.") for key in file.keys())  # noqa: SIM118 - it is no mapping


def load(path: Path) -> dict[str, Tensor]:
    """The weights as ``decompose`` rounded them. Raises ValueError for a file that is not one of these."""
    read = load_file(path)
    found: dict[str, Tensor] = {}
    for key, tensor in read.items():
        kind, _, name = key.partition(".")
        if kind == "plain":
            found[name] = tensor
        elif kind == "basis":
            if missing := [k for k in ("mask", "codes", "shape") if f"{k}.{name}" not in read]:
                raise ValueError(f"{path} has no {missing[0]} of {name}")
            lowest, *shape = read[f"shape.{name}"].tolist()
            count = -(-torch.Size(shape).numel() // len(tensor)) * len(tensor)
            mask, data = read[f"mask.{name}"], read[f"codes.{name}"]
            if mask.numel() != packed_bytes(count, 1):
                raise ValueError(f"{path} has {mask.numel()} bytes of mask for the {count} coefficients of {name}")
            there = unpack(mask, 1, count).bool()
            some = unpack(data, 4, int(there.sum())).to(torch.int16)
            codes = torch.zeros(count, dtype=torch.int16)
            codes[there] = (some % EXPONENTS + 1) * torch.where(some >= EXPONENTS, -1, 1).to(torch.int16)
            found[name] = Powers(tuple(shape), tensor, codes.view(-1, len(tensor)), lowest).tensor()
    return found
