"""Any default config of transformers, made tiny by the names of its fields.

Sizes are chosen so that what usually must divide does: 64 wide = 4 heads of 16, two key-value heads where there are
fewer of them, 8 experts in 2 groups. What a name cannot tell is in UNSET and ADJUST, as short as they can be.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCAB = 128
FIRST_TOKEN, LAST_TOKEN = 10, 99  # drawn by batches; special tokens lie below and above
IMAGE = 64
LAYERS = 4

# field name -> the largest value it may keep. The first pattern found in the name decides.
LARGEST: tuple[tuple[str, int], ...] = (
    (r"vocab", VOCAB),
    (r"(key_value|kv|key|query_groups).*heads?|num_query_groups|multi_query_group_num", 2),
    (r"mamba_(n|num)_heads", 8),
    (r"heads?$|^n_heads?$|attention_heads", 4),
    (r"experts_per_tok|top_?k(_experts)?$|^moe_k$", 2),
    (r"^(num_|n_|moe_)?(routed_|local_|num_)?experts$|^num_local_experts$|^moe_num_experts$", 8),
    (r"^n_group$|^num_expert_groups?$", 2),
    (r"topk_group", 1),
    (r"shared_experts$", 1),
    (r"layers?$|^depth$|_depth$|num_blocks$", LAYERS),
    (r"image_size|crop_size", IMAGE),
    (r"patch_size|kernel|stride|conv_kernel", 1 << 30),
    (r"window|chunk|local_attention|attention_span", 8),
    (r"position|n_ctx|context_length|max_seq_len|max_length|n_positions", 512),
    (r"rope_head_dim|rotary_dim", 8),
    (r"head_dim|d_kv|head_size|headdim|d_head|kv_channels|(kv|q)_lora_rank", 16),
    (r"moe_.*(size|dim)|expert.*(size|dim)", 32),
    (r"intermediate|ffn_dim|ff_dim|^d_ff$|^d_inner$|n_inner|ffn_hidden|hidden_dim|mlp_dim", 96),
    (r"size$|dims?$|rank$|width$|channels$|^d_model$|^n_embd$|^hidden|^d_|_features$|^embed", 64),
)
LISTS = re.compile(r"hidden_sizes|dims?$|channels|embed|sizes$|width")
DEPTHS = re.compile(r"depths|num_blocks|^layers$|block_repeats|num_block_repeats|block_sizes")
SPECIAL = re.compile(r"token_(id|index)s?$|_token_id$")

# what some default configs leave unset although their models need it
UNSET = {
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "vocab_size": VOCAB,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
}

# model type -> fields that no rule gives; applied to the config of that type wherever it occurs
_LINEAR, _HYBRID = "linear_attention", "hybrid"
ADJUST: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 4},
    "bloom": {"n_layer": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "donut-swin": {"embed_dim": 24, "window_size": 4, "image_size": 128},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.5,
        "hidden_dim": 320,
        "in_channels": [32, 16, 24, 40, 80, 112, 192],
        "out_channels": [16, 24, 40, 80, 112, 192, 320],
    },
    "esmc": {"vocab_size": VOCAB},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 32, 48, 64],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [32, 48, 64, 64],
        "stage_numb_of_layers": [2, 2, 2, 2],
        "hidden_sizes": [32, 48, 64, 64],
    },
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 96},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mobilenet_v1": {"classifier_dropout_prob": 0.1},
    "mobilenet_v2": {"classifier_dropout_prob": 0.1},
    "mobilevit": {"hidden_sizes": [16, 24, 32]},
    "nemotron3_diarization": {"chunk_left_context": 2, "chunk_right_context": 2},
    "perceiver": {"max_position_embeddings": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"] * 2},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 20, "no_token_index": 21},
    "swin": {"embed_dim": 24, "window_size": 4, "image_size": 128},
    "swinv2": {"embed_dim": 24},
    "textnet": {"stem_out_channels": 8},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": [_LINEAR, _LINEAR, _HYBRID] * 2},
}


def shrink(model_type: str, task: str = "") -> PretrainedConfig:
    """The default config of this type with every size made small."""
    config = _shrink(CONFIG_MAPPING[model_type](), {})
    if config.architectures is None:
        config.architectures = []  # two classes for one task: the auto class looks here which is meant
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if task == "causal-lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # the encoders that can also be decoders
    return config


def _shrink(default: PretrainedConfig, special: dict[int, int]) -> PretrainedConfig:
    small: dict[str, Any] = {}
    has = vars(default)
    for field in dataclasses.fields(type(default)):
        name, value = field.name, has.get(field.name)
        if isinstance(value, PretrainedConfig):
            small[name] = _shrink(value, special)
        elif value is None:
            if name in UNSET:
                small[name] = UNSET[name]
        elif SPECIAL.search(name):
            small[name] = _token(value, special)
        elif field.default is None or isinstance(field.default, str) or isinstance(value, bool):
            continue  # not a size, or one the config works out by itself
        elif isinstance(value, int):
            small[name] = _smaller(name, value)
            if name == "num_key_value_heads" and value == has.get("num_attention_heads"):
                small[name] = _smaller("num_attention_heads", value)
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            small[name] = type(value)(_smaller_item(name, item, value) for item in value)
    small |= _per_layer(default) | ADJUST.get(default.model_type, {})
    config = type(default)(**small)
    for name in list(vars(config)):
        if name == "use_cache":
            config.use_cache = False
        elif "layerdrop" in name:
            setattr(config, name, 0.0)
    return config


def _per_layer(default: PretrainedConfig) -> dict[str, Any]:
    """The lists with one entry per layer, for LAYERS of the layers: together they show every kind of layer there is."""
    has = vars(default)
    layers = has.get("num_hidden_layers")
    if not isinstance(layers, int) or layers <= LAYERS:
        return {}
    names = [field.name for field in dataclasses.fields(type(default))]
    lists = {n: has[n] for n in names if isinstance(has.get(n), (list, tuple)) and len(has[n]) == layers}
    kinds = list(zip(*(map(str, entries) for entries in lists.values()), strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds})[:LAYERS]
    kept += [layer for layer in range(layers) if layer not in kept][: LAYERS - len(kept)]
    return {name: [_smaller_entry(name, entries[layer]) for layer in sorted(kept)] for name, entries in lists.items()}


def _smaller_entry(name: str, entry: Any) -> Any:
    return _smaller(name, entry) if type(entry) is int else entry


def _smaller(name: str, value: int) -> int:
    for pattern, largest in LARGEST:
        if re.search(pattern, name):
            return min(value, largest)
    return value


def _smaller_item(name: str, item: int, items: Any) -> int:
    if "image_size" in name:
        return min(item, IMAGE)
    if DEPTHS.search(name):
        return min(item, 1 if len(items) > 3 else 2)
    if LISTS.search(name) and max(items) > 64:
        return max(4, item // 8)
    return item


def _token(value: Any, special: dict[int, int]) -> Any:
    """Special tokens stay where they are if no batch draws them there, else they move to the end of the vocabulary."""
    if isinstance(value, (list, tuple)):
        return type(value)(_token(item, special) for item in value)
    if not isinstance(value, int) or 0 <= value < FIRST_TOKEN:
        return value
    if value < 0:
        return 0
    return special.setdefault(value, VOCAB - 1 - len(special) % (VOCAB - 1 - LAST_TOKEN))
