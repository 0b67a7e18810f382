"""The same GPT-2 under each engine: every function returns a step that trains on the same batch and gives its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from transformers import GPT2Config, GPT2LMHeadModel

from merak_like import auto_parallel

LR = 1e-4


def gpt2(layers: int, hidden: int, seq: int) -> GPT2Config:
    """A small GPT-2: untied, since not every peer sums the gradients of tied weights; no dropout, to compare losses."""
    return GPT2Config(
        n_layer=layers, n_embd=hidden, n_head=4, n_positions=seq, vocab_size=1000, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def model_of(config: GPT2Config) -> GPT2LMHeadModel:
    """The same weights for everybody."""
    torch.manual_seed(1)
    return GPT2LMHeadModel(config).train()


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What GPT2LMHeadModel computes from labels."""
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def one_process(config: GPT2Config, ids: Tensor, micro_batches: int) -> Callable[[], float]:
    """The plain loop."""
    model = model_of(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step() -> float:
        total = 0.0
        for part in ids.chunk(micro_batches):
            loss = model(input_ids=part, labels=part).loss / micro_batches
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def merak(
    config: GPT2Config, ids: Tensor, micro_batches: int, schedule: str, **more: Any
) -> tuple[Callable[[], float], int]:
    """Ours, and the block its second stage begins with."""
    batch = {"input_ids": ids, "labels": ids}
    engine = auto_parallel(
        model_of(config), dp=1, pp=dist.get_world_size(), example=batch, schedule=schedule,
        optimizer=lambda params: torch.optim.AdamW(params, lr=LR), micro_batches=micro_batches, **more,
    )  # fmt: skip
    first = next(name for name in engine.plan.stages[1].params if ".h." in name)
    return lambda: engine.step(batch).loss, int(first.split(".")[2])


class Piece(nn.Module):
    """A hand-written stage: the embeddings or nothing, some blocks, the head or nothing."""

    def __init__(self, model: GPT2LMHeadModel, start: int, stop: int) -> None:
        super().__init__()
        body = model.transformer
        self.embeddings = nn.ModuleList([body.wte, body.wpe]) if start == 0 else None
        self.blocks = nn.ModuleList(body.h[start:stop])
        self.head = nn.Sequential(body.ln_f, model.lm_head) if stop == len(body.h) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embeddings is not None:
            x = self.embeddings[0](x) + self.embeddings[1](torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x if self.head is None else self.head(x)


TORCH: dict[str, tuple[Any, Callable[[int, int], list[int]]]] = {
    "1F1B": (Schedule1F1B, lambda rank, ranks: [rank]),
    "GPipe": (ScheduleGPipe, lambda rank, ranks: [rank]),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, lambda rank, ranks: [rank, rank + ranks]),
    "ZBVZeroBubble": (ScheduleZBVZeroBubble, lambda rank, ranks: [rank, 2 * ranks - 1 - rank]),
}
"""Schedules of torch.distributed.pipelining, and the stages that a rank has under each."""


def torch_pipelining(config: GPT2Config, ids: Tensor, micro_batches: int, cut: int, kind: str) -> Callable[[], float]:
    """torch.distributed.pipelining on the same stages; each halved for schedules that have two on a rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    make, places = TORCH[kind]
    mine = places(rank, ranks)
    bounds = [0, cut, config.n_layer]
    if ranks * len(mine) > 2:
        bounds = [0, cut // 2, cut, (cut + config.n_layer) // 2, config.n_layer]
    pieces = [Piece(model_of(config), bounds[n], bounds[n + 1]) for n in mine]
    stages = [
        PipelineStage(piece, n, len(bounds) - 1, torch.device("cpu")) for n, piece in zip(mine, pieces, strict=True)
    ]
    schedule = make(stages if len(mine) > 1 else stages[0], micro_batches, loss_fn=shifted_loss)
    optimizer = torch.optim.AdamW([p for piece in pieces for p in piece.parameters()], lr=LR)
    last = len(bounds) - 2 in mine

    def step() -> float:
        losses: list[Tensor] = []
        more = {"target": ids, "losses": losses} if last else {}
        schedule.step(*([ids] if 0 in mine else []), **more)
        optimizer.step()
        optimizer.zero_grad()
        return sum(x.item() for x in losses) / micro_batches

    return step


def deepspeed_pipeline(config: GPT2Config, ids: Tensor, micro_batches: int) -> Callable[[], float]:
    """DeepSpeed's PipelineModule, cut as it likes."""
    import deepspeed  # pyright: ignore[reportMissingImports]
    from deepspeed.pipe import PipelineModule  # pyright: ignore[reportMissingImports]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would compile an op on the spot
    deepspeed.init_distributed("gloo")
    model = model_of(config)
    body = model.transformer
    layers: list[Any] = [_Embed(body), *(_Block(block) for block in body.h), nn.Sequential(body.ln_f, model.lm_head)]
    module = PipelineModule(
        layers, num_stages=dist.get_world_size(), loss_fn=shifted_loss, partition_method="parameters"
    )
    rows = ids.shape[0] // micro_batches
    engine: Any = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LR),
        config={
            "train_batch_size": ids.shape[0], "train_micro_batch_size_per_gpu": rows, "gradient_clipping": 0.0,
            "gradient_accumulation_steps": micro_batches, "steps_per_print": 10**9,
        },
    )[0]  # fmt: skip
    parts = [(part, part) for part in ids.chunk(micro_batches)]
    return lambda: float(engine.train_batch(iter(parts)))


class _Embed(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.wte, self.wpe = body.wte, body.wpe

    def forward(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))


class _Block(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return out[0] if isinstance(out, tuple) else out
