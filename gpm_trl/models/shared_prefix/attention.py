"""The attention of packed rows, by the kernels of transformers' attention implementations."""

import functools
import inspect
import re

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .layout import SharedPrefixLayout

logger = logging.get_logger(__name__)

# Attention implementations that packed rows are written for, and what they are called with them. No name may hold
# "flash": transformers would look for a kernel of that name.
NAMES = {
    "eager": "gpm_shared_prefix_eager",
    "sdpa": "gpm_shared_prefix_sdpa",
    "flash_attention_2": "gpm_shared_prefix_fa2",
    "flash_attention_3": "gpm_shared_prefix_fa3",
    "flex_attention": "gpm_shared_prefix_flex",
}
UNMASKED_DEVICES = ("cpu",)  # flex attention is compiled there, but not with the mask of packed rows
BASES = {name: base for base, name in NAMES.items()}
# In a layer: what it calls its attention with.
ATTENTION_CALL = re.compile(r"self\.(?:self_attn|attn|attention|self_attention)\((.*?)\)\n", re.DOTALL)
_source = functools.cache(inspect.getsource)  # which parses the file each time


def cannot_share_prefixes(backbone: PreTrainedModel) -> str | None:
    """
    Why a backbone cannot share prefixes, or `None` if it can: its layers must be attention, to all earlier tokens or
    to a window of them, by transformers' attention interface, with positions that come with the tokens.
    """
    config = backbone.config
    if config.get_text_config() is not config:
        return f"{config.model_type} is more than a decoder of text"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if others := sorted(layer_types - {"full_attention", "sliding_attention"}):
        return f"{config.model_type} has layers of {', '.join(others)}"
    if backbone._auto_class is not None:
        return f"{config.model_type} has code of its own, which may not tell its attention what is where"
    if getattr(config, "alibi", False) or getattr(config, "attention_chunk_size", None):
        return f"{config.model_type} has ALiBi positions or attention in chunks"
    if hasattr(config, "keep_window_size"):  # of Doge
        return f"{config.model_type} makes masks of what it reads"
    # What attention is told shows in the source alone, where transformers, too, looks for its interface.
    forwards = {type(module).forward for module in backbone.modules()}
    try:
        source = "".join(map(_source, forwards))
    except (OSError, TypeError):  # of a class that was not read from a file
        return f"the source of {config.model_type} cannot be read, in which its attention shows"
    if "ALL_ATTENTION_FUNCTIONS.get_interface(" not in source:
        return f"{config.model_type} does not use transformers' attention interface"
    if not all("**" in arguments for arguments in ATTENTION_CALL.findall(source)):
        return f"{config.model_type} does not pass on to its attention what is where"
    has_windows = getattr(config, "sliding_window", None) or "sliding_attention" in layer_types
    if has_windows and "sliding_window=" not in source:
        return f"{config.model_type} does not tell its attention the window"
    if base_attention(config) not in NAMES:
        return f"the attention implementation {config._attn_implementation} has no shared-prefix form"
    return None


def base_attention(config: PreTrainedConfig) -> str:
    """The attention implementation of a backbone, whether or not it takes packed rows too."""
    return BASES.get(config._attn_implementation, config._attn_implementation)


def enable_shared_prefix(backbone: PreTrainedModel) -> None:
    """
    Let a backbone take packed rows: with a `shared_prefix_layout` argument, by this module's attention, and without
    one as before. The name of the attention implementation changes, which `save_pretrained` does not write.

    Raises:
        ValueError: If it has layers that cannot, see [`cannot_share_prefixes`].
    """
    reason = cannot_share_prefixes(backbone)
    if reason is not None:
        raise ValueError(f"Prefixes cannot be shared: {reason}. Use padded rows.")
    backbone.set_attn_implementation(NAMES[base_attention(backbone.config)])


def share_prefixes(backbone: PreTrainedModel, wanted: str | bool, hindrance: str | None = None) -> bool:
    """
    Whether rows are packed. If so, the backbone is made ready for it. `wanted` is `"auto"`, which packs them where
    nothing hinders it, and logs what does; True or False. `hindrance` is what hinders it besides the backbone.

    Raises:
        ValueError: If `wanted` is none of these, or True where something hinders it.
    """
    if wanted not in ("auto", True, False):
        raise ValueError(f'`shared_prefix` is {wanted!r}; choose "auto", True or False.')
    if wanted is False:
        return False
    reason = hindrance or cannot_share_prefixes(backbone)
    if reason is None:
        enable_shared_prefix(backbone)
        return True
    if wanted is True:
        raise ValueError(f"`shared_prefix` is True, but {reason}: leave one of the two out.")
    logger.warning_once(f"Prompts are computed once for each response, in padded rows: {reason}.")
    return False


def split_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    base: str,
    shared_prefix_layout: SharedPrefixLayout | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of a packed row on any device: prompt by prompt, then its responses, those of a length together.

    `query` (1, H, T, D), `key` and `value` of as many heads or fewer; returns `(1, T, H, D)`.
    """
    options = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    if shared_prefix_layout is None and base != "eager":
        kwargs |= {**options, "sliding_window": sliding_window}
        return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, attention_mask, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if shared_prefix_layout is None:
        return _attend(query, key, value, attention_mask, **options).transpose(1, 2).contiguous(), None
    # Split once and joined once: the gradient of each slice, or of a write to one, would be as large as the whole.
    segments = shared_prefix_layout.segments
    split = zip(
        *(states.split([part.num_queries for part in segments], dim=2) for states in (query, key, value)), strict=True
    )
    states = {part.start: own for part, own in zip(segments, split, strict=True)}
    outputs: dict[int, torch.Tensor] = {}
    for prefix, responses in shared_prefix_layout.groups:
        shared_keys, shared_values = key[:, :, :0], value[:, :, :0]
        length = prefix.num_queries
        if length:
            queries, shared_keys, shared_values = states[prefix.start]
            # Kernels skip what causality hides, and compute what a mask hides.
            is_causal = softcap is None and s_aux is None and (sliding_window is None or length <= sliding_window)
            mask = None if is_causal else shared_prefix_layout.visible(length, length, sliding_window, query.device)
            outputs[prefix.start] = _attend(queries, shared_keys, shared_values, mask, is_causal=is_causal, **options)
        for length in dict.fromkeys(response.num_queries for response in responses):
            starts = [response.start for response in responses if response.num_queries == length]
            queries, keys, values = (torch.cat(own) for own in zip(*(states[start] for start in starts), strict=True))
            keys = torch.cat([shared_keys.expand(len(starts), -1, -1, -1), keys], dim=2)
            values = torch.cat([shared_values.expand(len(starts), -1, -1, -1), values], dim=2)
            mask = shared_prefix_layout.visible(length, keys.shape[2], sliding_window, query.device)
            outputs.update(zip(starts, _attend(queries, keys, values, mask, **options).split(1), strict=True))
    return torch.cat([outputs[part.start] for part in segments], dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention, `(B, H, Q, D)`; what a kernel cannot do is written out, in float32."""
    if softcap is None and s_aux is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=dropout, is_causal=is_causal, scale=scaling
        )
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:  # a sink for each head
        sinks = s_aux.reshape(1, -1, 1, 1).expand(len(query), -1, query.shape[2], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = scores.float().softmax(-1).to(query.dtype)[..., : key.shape[2]]
    return F.dropout(weights, dropout) @ value


def flash_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    base: str,
    shared_prefix_layout: SharedPrefixLayout | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of a packed row by flash attention: one call, prompts and responses being sequences with fewer queries
    than keys, the last of which are theirs (flash attention >= 2.1 aligns the causal mask so).

    transformers' own entry point reads the kernel's name off the configuration; this one is told it, here and for
    padded rows.
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    value = F.pad(value, [0, head_dim - value_dim])  # the kernels take values of the width of queries only
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # (1, T, H, D)
    if shared_prefix_layout is not None:
        indices, arguments = shared_prefix_layout.key_segments(query.device)
        key, value = key[:, indices], value[:, indices]
        attention_mask = None
        kwargs |= arguments
    output = _flash_attention_forward(
        query,
        key,
        value,
        attention_mask,
        query_length=query.shape[1],
        is_causal=module.is_causal if is_causal is None else is_causal,
        softmax_scale=scaling,
        target_dtype=get_target_dtype(query, module),
        attn_implementation=base,
        s_aux=None if s_aux is None else s_aux.to(query.dtype),
        **kwargs,
    )
    return output[..., :value_dim], None


def flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    base: str,
    shared_prefix_layout: SharedPrefixLayout | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a packed row by flex attention, with a mask over the whole row."""
    kwargs["sliding_window"] = sliding_window
    if shared_prefix_layout is None or query.device.type in UNMASKED_DEVICES:
        kwargs["shared_prefix_layout"] = shared_prefix_layout
        return split_attention(module, query, key, value, attention_mask, base, **kwargs)
    mask = shared_prefix_layout.block_mask(sliding_window, query.device)
    return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, mask, **kwargs)


KERNELS = {"eager": split_attention, "sdpa": split_attention, "flex_attention": flex_attention}
for base, name in NAMES.items():
    AttentionInterface.register(name, functools.partial(KERNELS.get(base, flash_attention), base=base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
