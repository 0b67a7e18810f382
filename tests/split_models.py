"""Models that both sides of a split can build, as ``module:function`` wants them: (model, example)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WORDS, CLASSES, TOKENS, ROWS = 3000, 5000, 16, 6


class Tiny(nn.Module):
    """A small encoder with dropout, a norm that counts, a head and its own loss; without transformers."""

    def __init__(self, width: int = 16, layers: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(50, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True) for _ in range(layers)
        )
        self.counted = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.token(input_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1:
                x = self.counted(x.transpose(1, 2)).transpose(1, 2)
        logits = self.head(x.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def tiny() -> tuple[nn.Module, dict[str, Tensor]]:
    """With dropout."""
    torch.manual_seed(0)
    return Tiny(), tiny_batch(0)


def calm() -> tuple[nn.Module, dict[str, Tensor]]:
    """Without dropout."""
    torch.manual_seed(0)
    return Tiny(dropout=0.0), tiny_batch(0)


def steady() -> tuple[nn.Module, dict[str, Tensor]]:
    """Without dropout, and without the norm that counts: it learns of a micro-batch at a time."""
    model, batch = calm()
    model.counted = nn.Identity()
    return model, batch


def tiny_batch(step: int) -> dict[str, Tensor]:
    """The batch of a step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 50, (8, 12), generator=generator)
    return {"input_ids": ids, "labels": ids.sum(1) % 3}


def ids_of(step: int) -> list[int]:
    """Ids of the samples of a step's batch; two batches come again and again."""
    return [8 * (step % 2) + i for i in range(8)]


def again(step: int) -> tuple[dict[str, Tensor], list[int]]:
    """Two batches in turn, with their samples' ids."""
    return tiny_batch(step % 2), ids_of(step)


def bert(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A classifier with padding and so many classes that a label is no small number."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,  # pyright: ignore[reportCallIssue]
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config), text_batch(0, classes=True)


def gpt2(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A language model whose head is tied to its embedding."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=24, n_layer=4, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config), text_batch(0, classes=False)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Rotary positions, gated feed-forward, grouped keys."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, max_position_embeddings=32, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config), text_batch(0, classes=False)


def text_batch(step: int, *, classes: bool) -> dict[str, Tensor]:
    """Token ids from 300 on, padding behind some rows, labels from 300 on."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(300, WORDS, (ROWS, TOKENS), generator=generator)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[1, 10:] = 0
    mask[4, 3:] = 0
    labels = torch.randint(300, CLASSES, (ROWS,), generator=generator) if classes else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
