"""Every decoder of transformers that may share prefixes gives what separate rows give: none is wrong in silence."""

import pytest
import torch
from test_shared_prefix import random_ids
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel

from gpm_trl import GPMForPreference, GPMModelConfig
from gpm_trl.models.shared_prefix import SharedPrefixLayout, cannot_share_prefixes, enable_shared_prefix

pytestmark = pytest.mark.slow

# What the fields of a tiny model are called; windows and what sparse attention keeps are shorter than a row.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "index_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "qk_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "max_window_layers", "bos_token_id"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "index_n_heads", "eos_token_id"), 2),
    **dict.fromkeys(("sliding_window", "index_topk", "keep_window_size"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 259),
    "use_sliding_window": True,
    **dict.fromkeys(("num_nextn_predict_layers", "pad_token_id"), 0),
}
# What the decoders of several parts need besides.
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
MORE = {
    "dots1": {**ALTERNATING, "n_shared_experts": 1},
    "gemma3n_text": {**ALTERNATING, "num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": None},
    "gemma4_text": {**ALTERNATING, "num_kv_shared_layers": 2, "global_head_dim": 8},
    "gemma4_unified_text": {**ALTERNATING, "global_head_dim": 8},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2, "num_dense_layers": 1},
}
# These must be among those that are compared, whatever of the others a version of transformers can make so small.
COMMON = {
    *("cohere2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite"),
    *MORE,
    *("jetmoe", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
}
# The ones that were wrong before they were refused.
REFUSED = {"doge", "nemotron", "phimoe", "qwen2_moe", "stablelm", "xlstm"}


def tiny_backbone(config_class: type) -> torch.nn.Module:
    """A decoder of two small layers; raises whatever its classes do where these sizes do not fit it."""
    annotated = {name for parent in config_class.__mro__ for name in getattr(parent, "__annotations__", ())}
    fields = {name: size for name, size in SIZES.items() if name in annotated} | MORE.get(config_class.model_type, {})
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    config = config_class(**fields)
    with torch.device("meta"):
        implementation = "sdpa" if AutoModel.from_config(config)._supports_sdpa else "eager"
        model = AutoModel.from_config(config, attn_implementation=implementation)
    if model.num_parameters() > 1e7:
        raise ValueError("it is of several parts")
    model = AutoModel.from_config(config, attn_implementation=implementation).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention tells tokens apart
            parameter += torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.1)
    return model


@torch.no_grad()
def difference(model: torch.nn.Module) -> float:
    """The largest between packed and separate rows, relative to the largest hidden state."""
    generator = torch.Generator().manual_seed(1)
    prompt, responses = random_ids(13, generator), [random_ids(length, generator) for length in (5, 8, 5)]
    rows = [model(input_ids=torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) :] for ids in responses]
    enable_shared_prefix(model)
    layout, packed = SharedPrefixLayout.pack([(prompt, responses)])
    inputs = {"input_ids": torch.tensor([packed]), **layout.model_inputs(torch.device("cpu"))}
    hidden = model(**inputs).last_hidden_state[0, len(prompt) :]
    return ((hidden - torch.cat(rows)).abs().max() / torch.cat(rows).abs().max()).item()


def test_every_decoder_that_may_share_gives_what_separate_rows_give():
    differences, refused = {}, {}
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = config_class.model_type
        try:
            model = tiny_backbone(config_class)
            GPMForPreference(GPMModelConfig(text_config=model.config, embedding_dim=4))
        except Exception as error:  # of another size, of several parts, an encoder
            refused[name] = str(error)
            continue
        refused[name] = cannot_share_prefixes(model)
        if refused[name] is None:
            differences[name] = difference(model)
    assert {name: value for name, value in differences.items() if not value < 1e-4} == {}
    assert differences.keys() >= COMMON
    assert all(refused[name] for name in REFUSED)
    assert "is an encoder" in refused["bert"]
