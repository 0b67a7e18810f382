"""The same GPT-2 on two replicas under each way to spread it: every function returns a step on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from merak_like import Engine, auto_parallel

LR = 1e-4
Step = Callable[[], float]


def model_of(layers: int, hidden: int, seq: int) -> Any:
    """The same weights for everybody."""
    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=4, n_positions=seq, vocab_size=1000, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def ours(model: Any, ids: Tensor, micro_batches: int, zero: int, backend: str | None = None) -> tuple[Step, Engine]:
    """The engine at a level."""
    batch = {"input_ids": ids, "labels": ids}
    engine = auto_parallel(
        model, dp=dist.get_world_size(), example=batch, micro_batches=micro_batches, zero=zero, zero_backend=backend,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LR), hardware="a100-80gb",
    )  # fmt: skip
    return lambda: engine.step(batch).loss, engine


def _loop(model: Any, ids: Tensor, micro_batches: int, optimizer: Any, unsynced: Callable[[bool], Any]) -> Step:
    """Accumulate this rank's micro-batches, and step."""
    parts = ids.chunk(dist.get_world_size())[dist.get_rank()].chunk(micro_batches)

    def step() -> float:
        total = 0.0
        for number, part in enumerate(parts):
            with unsynced(number + 1 < len(parts)):
                loss = model(input_ids=part, labels=part).loss / len(parts)
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        mean = torch.tensor(total)
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()

    return step


def ddp(model: Any, ids: Tensor, micro_batches: int, spread: bool) -> Step:
    """DistributedDataParallel with AdamW, or with it spread by ZeroRedundancyOptimizer (level 1)."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if spread:
        optimizer: Any = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=LR)
    else:
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LR)
    return _loop(wrapped, ids, micro_batches, optimizer, lambda on: wrapped.no_sync() if on else nullcontext())


def fsdp2(model: Any, ids: Tensor, micro_batches: int, every: bool, keep: bool) -> Step:
    """``fully_shard`` of each block, summing after every micro-batch or once; it may keep whole weights in a step."""
    for block in model.transformer.h:
        fully_shard(block, reshard_after_forward=not keep)
    fully_shard(model, reshard_after_forward=False if keep else None)

    def unsynced(on: bool) -> Any:
        model.set_requires_gradient_sync(every or not on)
        model.set_reshard_after_backward(not (keep and on))
        return nullcontext()

    return _loop(model, ids, micro_batches, torch.optim.AdamW(model.parameters(), lr=LR), unsynced)


def deepspeed_zero(model: Any, ids: Tensor, micro_batches: int, level: int) -> Step:
    """DeepSpeed's ZeRO at a level."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would compile an op on the spot
    deepspeed.init_distributed("gloo")
    parts = ids.chunk(dist.get_world_size())[dist.get_rank()].chunk(micro_batches)
    engine: Any = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LR),
        config={
            "train_batch_size": ids.shape[0], "train_micro_batch_size_per_gpu": len(parts[0]),
            "gradient_accumulation_steps": micro_batches, "gradient_clipping": 0.0, "steps_per_print": 10**9,
            "zero_optimization": {"stage": level}, "zero_allow_untested_optimizer": True,
        },
    )[0]  # fmt: skip

    def step() -> float:
        total = 0.0
        for part in parts:
            loss = engine(input_ids=part, labels=part).loss
            engine.backward(loss)
            engine.step()
            total += loss.item() / len(parts)
        mean = torch.tensor(total)
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()

    return step
