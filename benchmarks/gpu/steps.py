"""Models, batches and steps that the questions to a GPU are about: torch alone, and the engine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Size(NamedTuple):
    """What a row runs."""

    device: str
    dtype: str
    batch: int
    seq: int
    turns: int
    models: dict[str, tuple[str, dict[str, Any]]]
    backend: str
    """Of torch.compile. On a CPU "inductor" builds a C++ library for each kernel: minutes even at a tiny size.
    What is asked there is whether graphs are captured and differentiated: "aot_eager" does that and no more."""


FULL = Size("cuda", "bfloat16", 8, 1024, 5, {
    "GPT-2 XL": ("gpt2", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
    "Llama 1B": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 2048,
    }),
}, "inductor")  # fmt: skip
TINY = Size("cpu", "float32", 2, 16, 2, {
    "GPT-2 XL": ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 100}),
    "Llama 1B": ("llama", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100,
    }),
}, "aot_eager")  # fmt: skip


def model_of(size: Size, name: str, where: str) -> Any:
    """A model without dropout in the size's dtype, with the same weights every time unless on meta."""
    import torch
    import transformers

    kind, sizes = size.models[name]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    kinds = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    config, made = kinds[kind]
    settings = config(**sizes, **dropout, bos_token_id=0, eos_token_id=0, use_cache=False)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with torch.device(where):
            return made(settings).train()
    finally:
        torch.set_default_dtype(before)


def block(width: int, heads: int) -> Any:
    """A transformer block written out: two LayerNorms, a softmax with dropout, a GELU, two more dropouts."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.dropouts = nn.ModuleList(nn.Dropout(0.1) for _ in range(3))

        def forward(self, x: Any) -> Any:
            q, k, v = self.into(self.norms[0](x)).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            share = self.dropouts[0]((q @ k.mT * (width // heads) ** -0.5).softmax(-1))
            x = x + self.dropouts[1](self.out((share @ v).transpose(1, 2).flatten(2)))
            return x + self.dropouts[2](self.down(F.gelu(self.up(self.norms[1](x)))))

    torch.manual_seed(0)
    return Block()


def batch_of(size: Size, name: str, where: str) -> dict[str, Any]:
    """Tokens that are also what is to be said."""
    import torch

    words = size.models[name][1].get("vocab_size", 50257)
    ids = torch.randint(0, words, (size.batch, size.seq), generator=torch.Generator().manual_seed(1)).to(where)
    return {"input_ids": ids, "labels": ids}


def adamw(parameters: Any) -> Any:
    """One kernel for all weights, where there is one."""
    import torch

    return torch.optim.AdamW(parameters, lr=1e-5, fused=torch.cuda.is_available() or None)


def seconds(step: Callable[[], Any], size: Size) -> float:
    """The middle of some turns, after two that warm up; the device is waited for."""
    import torch

    def wait() -> None:
        if size.device == "cuda":
            torch.cuda.synchronize()

    taken = []
    for turn in range(size.turns + 2):
        wait()
        began = time.perf_counter()
        step()
        wait()
        if turn > 1:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


@contextmanager
def plain(size: Size, name: str, *, compiled: bool = False, checkpointing: bool = False) -> Iterator[Callable[[], Any]]:
    """A step of torch alone."""
    import torch

    model = model_of(size, name, size.device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, optimizer = batch_of(size, name, size.device), adamw(model.parameters())
    held = {"call": torch.compile(model, backend=size.backend) if compiled else model, "optimizer": optimizer}
    del model, optimizer  # so that nothing but this holds the weights

    def step() -> None:
        held["call"](**batch).loss.backward()
        held["optimizer"].step()
        held["optimizer"].zero_grad()

    yield step
    held.clear()
    free()


@contextmanager
def ours(size: Size, name: str, **options: Any) -> Iterator[Any]:
    """The engine alone."""
    from merak_like import auto_parallel

    model = model_of(size, name, "meta")
    engine = auto_parallel(
        model, example=batch_of(size, name, "cpu"), optimizer=adamw, device=size.device, hardware=hardware(), **options
    )
    try:
        yield engine
    finally:
        engine.close()
        del engine, model
        free()


def free() -> None:
    """Give the device's memory back."""
    import torch

    torch.compiler.reset()  # compiled code holds the weights it was compiled for
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def hardware() -> str | None:
    """The preset of this GPU; None: whatever the planner takes for an unknown one."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    memory = torch.cuda.get_device_properties(0).total_memory
    presets = ("h200", "h100", "rtx4090", "rtx3090")
    if "a100" in name:
        return "a100-80gb" if memory > 60e9 else "a100-40gb"
    return next((p for p in presets if p.removeprefix("rtx") in name), None)


def utilisation(engine: Any, size: Size, taken: float) -> str:
    """The share of the device's peak that the model's arithmetic takes (no recomputed operation counts)."""
    from merak_like.trainer.speed import meter

    its = meter(engine.plan, size.dtype)
    return f"{its.flops / taken / its.peak:.1%}" if its.peak else "peak not known"
