"""Named Hugging Face cases: tiny configs, three blocks or more, dropout on, layerdrop off, no cache, loss inside."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn

from tests.zoo import case as batches
from tests.zoo.case import BOS, EOS, PAD, VOCAB, Batch, Case

BOTH = ("eager", "sdpa")
EAGER = ("eager",)
DROPOUT = 0.1
_AVAILABLE = frozenset(dir(transformers))
MISSING: dict[str, str] = {}  # name -> why the installed transformers does not have it
CASES: dict[str, Case] = {}

TEXT = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "use_cache": False}
DEEP = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = TEXT | DEEP | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT = TEXT | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
BERT = TEXT | DEEP | {"intermediate_size": 48, "num_labels": 2}
SEQ2SEQ = TEXT | {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": EOS,
}
T5 = TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
T5 |= {"decoder_start_token_id": PAD}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
VIT |= {"image_size": 32, "patch_size": 8, "num_labels": 2}
SPEECH = TEXT | {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_stride": (4, 4, 2),
    "conv_kernel": (8, 4, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "apply_spec_augment": False,
    "ctc_zero_infinity": True,
    "classifier_proj_size": 16,
    "num_labels": 2,
}


def dropout_on(config: Any) -> Any:
    """Every dropout probability the config (or a config inside it) has becomes DROPOUT, every layerdrop 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            dropout_on(value)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            with suppress(StrictDataclassFieldValidationError):  # MPT insists on an integer probability
                setattr(config, name, 0.0 if "layerdrop" in name else DROPOUT)
    return config


def _add(
    name: str,
    model: str,
    batch: Callable[..., Batch] = batches.causal_lm,
    sizes: dict[str, Any] = LLAMA,
    kind: str = "decoder",
    attentions: tuple[str, ...] = BOTH,
    config: str | None = None,
    reads_values: str = "",
    **more: Any,
) -> None:
    """`config` defaults to the model's class name up to "For", then "Config"."""
    config = config or model.split("For")[0].removesuffix("LMHeadModel").removesuffix("Model") + "Config"
    for needed in (model, config):
        if needed not in _AVAILABLE:
            MISSING[name] = f"transformers {transformers.__version__} has no {needed}"
            return

    def make(attention: str | None) -> nn.Module:
        built = dropout_on(getattr(transformers, config)(**(sizes | more)))
        if attention is not None:
            built._attn_implementation = attention
        return getattr(transformers, model)(built)

    CASES[name] = Case(name, lambda: make(None).train(), batch, kind, attentions, reads_values, None, make)


def cases(kind: str | None = None, attentions: bool = False) -> Iterator[Case]:
    """All cases (of one kind: decoder, encoder, encoder-decoder, vision, audio, multimodal).

    With `attentions`, one variant per attention kernel the model can be built with.
    """
    for case in CASES.values():
        if kind is not None and case.kind != kind:
            continue
        if attentions and case.attentions:
            yield from (case.with_attention(attention) for attention in case.attentions)
        else:
            yield case


# ---------------------------------------------------------------------------------------------------------- decoders
_add("gpt2", "GPT2LMHeadModel", sizes=GPT)
_add(
    "gpt_neo",
    "GPTNeoForCausalLM",
    sizes=TEXT,
    attentions=EAGER,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    max_position_embeddings=64,
    attention_types=[[["global", "local"], 2]],
    window_size=8,
)
_add("gpt_neox", "GPTNeoXForCausalLM", intermediate_size=48)
_add("gptj", "GPTJForCausalLM", sizes=GPT, attentions=EAGER, rotary_dim=4)
_add("opt", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32)
_add("bloom", "BloomForCausalLM", sizes=TEXT, attentions=(), hidden_size=32, n_layer=4, n_head=4)
_add("mpt", "MptForCausalLM", sizes=TEXT, attentions=(), d_model=32, n_layers=4, n_heads=4, max_seq_len=64)
_add("falcon", "FalconForCausalLM", sizes=TEXT | DEEP)
_add("llama", "LlamaForCausalLM")
_add("llama_tied", "LlamaForCausalLM", tie_word_embeddings=True)
_add("mistral", "MistralForCausalLM", sliding_window=8, head_dim=8)
_add("qwen2", "Qwen2ForCausalLM")
_add("qwen3", "Qwen3ForCausalLM", head_dim=8)
_add("gemma2", "Gemma2ForCausalLM", attentions=EAGER, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
_add("gemma3", "Gemma3ForCausalLM", config="Gemma3TextConfig", head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
_add("phi", "PhiForCausalLM")
_add("phi3", "Phi3ForCausalLM")
_add("stablelm", "StableLmForCausalLM")
_add("olmo2", "Olmo2ForCausalLM")
_add("granite", "GraniteForCausalLM", embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0)
_add("cohere", "CohereForCausalLM", use_qk_norm=True)
_add("starcoder2", "Starcoder2ForCausalLM", sliding_window=8)
_add("smollm3", "SmolLM3ForCausalLM", no_rope_layer_interval=2)
_EXPERTS = LLAMA | {"num_experts_per_tok": 2, "output_router_logits": True}
_add("mixtral", "MixtralForCausalLM", sizes=_EXPERTS, num_local_experts=4, head_dim=8)
_add("qwen3_moe", "Qwen3MoeForCausalLM", sizes=_EXPERTS, num_experts=4, moe_intermediate_size=16, head_dim=8)
_add("gpt_oss", "GptOssForCausalLM", sizes=_EXPERTS, attentions=EAGER, num_local_experts=4, head_dim=8)
_add(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
_MAMBA = TEXT | {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4, "time_step_rank": 4}
_add("mamba", "MambaForCausalLM", sizes=_MAMBA, attentions=())
_RWKV = TEXT | {"hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32, "context_length": 64}
_add("rwkv", "RwkvForCausalLM", sizes=_RWKV, attentions=())
_add("llama_classification", "LlamaForSequenceClassification", batches.classification, num_labels=2)

# ---------------------------------------------------------------------------------------------------------- encoders
_encoder = partial(_add, batch=batches.masked_lm, sizes=BERT, kind="encoder")
_encoder("bert", "BertForMaskedLM")
_encoder("bert_classification", "BertForSequenceClassification", batch=batches.classification)
_encoder("roberta", "RobertaForMaskedLM")
_encoder("distilbert", "DistilBertForMaskedLM", sizes=TEXT, dim=32, n_layers=4, n_heads=4, hidden_dim=48)
_encoder("albert", "AlbertForMaskedLM", embedding_size=16)
_encoder("electra", "ElectraForMaskedLM", embedding_size=16)
_encoder(
    "deberta_v2",
    "DebertaV2ForMaskedLM",
    attentions=EAGER,
    relative_attention=True,
    position_buckets=8,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
)
_encoder(
    "modernbert",
    "ModernBertForMaskedLM",
    cls_token_id=BOS,
    sep_token_id=EOS,
    local_attention=8,
    global_attn_every_n_layers=2,
)
_encoder("xlm_roberta", "XLMRobertaForMaskedLM")
_encoder("mpnet", "MPNetForMaskedLM", attentions=EAGER)
_encoder("big_bird", "BigBirdForMaskedLM", attentions=(), attention_type="original_full")

# --------------------------------------------------------------------------------------------------- encoder-decoders
_seq2seq = partial(_add, batch=batches.seq2seq, sizes=SEQ2SEQ, kind="encoder-decoder")
_seq2seq("t5", "T5ForConditionalGeneration", sizes=T5, tie_word_embeddings=True)
_seq2seq("mt5", "MT5ForConditionalGeneration", sizes=T5)
_seq2seq("bart", "BartForConditionalGeneration")
_seq2seq("mbart", "MBartForConditionalGeneration")
_seq2seq("pegasus", "PegasusForConditionalGeneration")
_seq2seq("m2m_100", "M2M100ForConditionalGeneration")
_seq2seq("marian", "MarianMTModel", config="MarianConfig", decoder_vocab_size=VOCAB)
_seq2seq(
    "whisper",
    "WhisperForConditionalGeneration",
    batch=batches.speech_features,
    num_mel_bins=16,
    max_source_positions=16,
    max_target_positions=32,
)

# ----------------------------------------------------------------------------------------------------- vision and audio
_vision = partial(_add, batch=batches.images, sizes=VIT, kind="vision")
_vision("vit", "ViTForImageClassification")
_vision("deit", "DeiTForImageClassification")
_vision("dinov2", "Dinov2ForImageClassification", mlp_ratio=2)
_vision("beit", "BeitForImageClassification", use_relative_position_bias=True, use_mask_token=False)
_PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 2}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_vision("swin", "SwinForImageClassification", sizes=_SWIN, num_labels=2)
_vision("convnext", "ConvNextForImageClassification", sizes=_PYRAMID, attentions=())
_vision("resnet", "ResNetForImageClassification", sizes=_PYRAMID, attentions=(), embedding_size=8, layer_type="basic")
_SEGFORMER = _PYRAMID | {"num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16, "num_labels": 4}
_vision("segformer", "SegformerForSemanticSegmentation", batch=batches.segmentation, sizes=_SEGFORMER)

_audio = partial(_add, sizes=SPEECH, kind="audio")
_CTC = "the CTC loss compares labels.max() with the vocabulary and selects the labels that are not padding"
_audio("wav2vec2", "Wav2Vec2ForCTC", partial(batches.waveform, target=6), reads_values=_CTC)
_audio("wav2vec2_classification", "Wav2Vec2ForSequenceClassification", batches.waveform)
_audio("hubert", "HubertForCTC", partial(batches.waveform, target=6), reads_values=_CTC)
_audio("hubert_classification", "HubertForSequenceClassification", batches.waveform)

# --------------------------------------------------------------------------------------------------------- multimodal
_multimodal = partial(_add, batch=batches.image_and_text, kind="multimodal")
_TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_EYE = _TOWER | {"image_size": 32, "patch_size": 8}
_READER = TEXT | _TOWER | {"max_position_embeddings": 16}
del _READER["use_cache"]
_multimodal("clip", "CLIPModel", sizes={"text_config": _READER, "vision_config": _EYE, "projection_dim": 16})
_READER = _READER | {"projection_size": 32}
_multimodal("siglip", "SiglipModel", sizes={"text_config": _READER, "vision_config": _EYE})
_IMAGE = {"image_token_id": batches.IMAGE}  # an image is really passed; its pieces are tokens
_multimodal(
    "llava",
    "LlavaForConditionalGeneration",
    batch=partial(batches.image_in_text, pieces=16),
    sizes={"text_config": LLAMA | {"model_type": "llama"}, "vision_config": _EYE | {"model_type": "clip_vision_model"}},
    reads_values="counts the image tokens",
    image_token_index=batches.IMAGE,
    image_seq_length=16,
)
_multimodal(
    "idefics3",
    "Idefics3ForConditionalGeneration",
    batch=partial(batches.image_in_text, pieces=4, nested=True),
    sizes=_IMAGE | {"text_config": LLAMA | {"model_type": "llama"}, "vision_config": _EYE, "use_cache": False},
    reads_values="drops the images that are all padding",
    scale_factor=2,
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_multimodal(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    batch=batches.patches_in_text,
    sizes=_IMAGE | {"text_config": LLAMA | {"rope_parameters": _ROPE}},
    vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8},
    reads_values="positions and image borders are computed from image_grid_thw",
    video_token_id=1,
    vision_start_token_id=2,
    vision_end_token_id=3,
)
