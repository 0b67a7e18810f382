"""Random small models and layouts on up to four processes, the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROWS, SEED, SEQ = 20, 2, 64


def gpt2(layers: int, width: int) -> torch.nn.Module:
    """Learned positions, GELU, fused projections."""
    return GPT2LMHeadModel(GPT2Config(
        n_layer=layers, n_embd=width, n_head=4, n_positions=SEQ, vocab_size=2048, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ))  # fmt: skip


def llama(layers: int, width: int) -> torch.nn.Module:
    """Rotary positions, gated feed-forward, grouped queries."""
    return LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=3 * width, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2048, bos_token_id=0, eos_token_id=0, use_cache=False,
    ))  # fmt: skip


def bert(layers: int, width: int) -> torch.nn.Module:
    """Norms after the blocks, a head of its own."""
    return BertForMaskedLM(BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=4,
        vocab_size=2048, max_position_embeddings=SEQ, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


MODELS: dict[str, Callable[[int, int], torch.nn.Module]] = {"gpt2": gpt2, "llama": llama, "bert": bert}
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v")


@dataclass(frozen=True)
class Row:
    """A model, its layout and its batch."""

    model: str
    layers: int
    width: int
    dp: int
    pp: int
    tp: int
    schedule: str
    micro_batches: int
    micro_batch: int

    @property
    def name(self) -> str:
        """For people, and the key in the file."""
        return (
            f"{self.model} {self.layers}x{self.width}, {self.dp}-{self.pp}-{self.tp}, {self.schedule}, "
            f"{self.micro_batches} x {self.micro_batch}"
        )

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.dp * self.pp * self.tp


def rows(count: int = ROWS, seed: int = SEED) -> list[Row]:
    """The same random rows everywhere; those beyond ``count`` would be others."""
    draw, found = random.Random(seed), dict[str, Row]()
    meshes = [(d, p, t) for d in (1, 2, 4) for p in (1, 2, 4) for t in (1, 2, 4) if 1 < d * p * t <= 4]
    while len(found) < count:
        dp, pp, tp = draw.choice(meshes)
        schedule = draw.choice(SCHEDULES) if pp > 1 else "1f1b"
        row = Row(
            draw.choice(sorted(MODELS)), draw.choice((4, 8)), draw.choice((128, 256, 384)), dp, pp, tp, schedule,
            pp * draw.choice((1, 2, 3)), draw.choice((1, 2, 4)),
        )  # fmt: skip
        found[row.name] = row
    return list(found.values())
