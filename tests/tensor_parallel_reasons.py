"""Why we shard some weights in another way than transformers' hand-written plans."""

from __future__ import annotations


def matches(key: tuple[str, str], family: str, name: str) -> bool:
    """Whether a reason is about this weight: families by their beginning, weights by a part of their name."""
    return family.startswith(key[0]) and key[1] in name


def reason(family: str, name: str) -> str:
    """Why we shard a weight in another way than transformers."""
    return next((why for key, why in REASONS.items() if matches(key, family, name)), "")


REASONS: dict[tuple[str, str], str] = {
    (
        "doge",
        "self_attn.",
    ): "dt_proj maps heads to heads: one axis on both sides of a weight. The width of a head of values "
    "is sharded instead, which queries and keys do not have",
    ("embedding_gemma2", "self_attn."): "one key-value head in layers of full attention: it is on both ranks",
    ("neomme", "self_attn."): "one key-value head: it is on both ranks",
    ("gemma3n", ".mlp."): "its activation takes the deviation over the width: over a shard it is another",
    ("gemma4", "embed_tokens"): "the table is also indexed directly",
    ("granite_speech", "embed_tokens"): "the model's Python asks about its data",
    ("shieldgemma2", "embed_tokens"): "the table is also indexed directly",
    ("inkling", "lm_head"): "the vocabulary is sharded, so that the logits are never gathered",
    ("longcat_flash", ".experts."): "its experts look at their data and are kept whole",
    ("muse_", "vision_"): "there is no image in the batch",
    ("muse_spark", "_expert_proj"): "an axis of more parameters meets it",
    ("nem", "embeddings.weight"): "another dimension, whose axis divides as many parameters",
    ("nem", ".experts."): "another dimension, whose axis divides more parameters",
    ("qwen", "linear_attn.out_proj"): "the heads before it are sharded, so it is summed over; theirs are whole",
    ("qwen4_exp", "input_mix_weight_down"): "sharded by its rows, so that its input may stay whole",
}
