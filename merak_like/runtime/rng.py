"""Random numbers that do not depend on the layout.

Each micro-batch of each step has one stream of random numbers, seeded by (seed, step, micro-batch). A stage goes on in
the stream where the stage before it stopped: the generator's state travels with the activations. So every dropout draws
what one process would draw.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

RNG = "random state"
"""The name of the state among the values of a transfer."""


def stream_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of one micro-batch's stream; ``micro_batch`` counts over all replicas."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def start(seed: int, step: int, micro_batch: int) -> None:
    """Begin a micro-batch's stream."""
    torch.manual_seed(stream_seed(seed, step, micro_batch))


def state(device: torch.device) -> Tensor:
    """The generator's state now, as bytes on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def resume(saved: Tensor, device: torch.device) -> None:
    """Go on where a state was taken."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved.cpu(), device)
    else:
        torch.set_rng_state(saved.cpu())
