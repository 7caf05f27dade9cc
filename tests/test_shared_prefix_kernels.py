"""
Shared prefixes by flash attention and flex attention, as far as a CPU goes.

Flash attention's kernels need a GPU: here stand reference kernels with their signatures, loaded by transformers' own
loader, so that lengths, key indices, windows, soft-caps and padding reach them as they would on a GPU.
"""

import math

import pytest
import torch
from test_shared_prefix import SHARING, gpm, padded, ragged_groups, separate
from transformers import modeling_flash_attention_utils as flash_utils

from gpm_trl.models.shared_prefix import SharedPrefixLayout, attention, cannot_share_prefixes
from gpm_trl.models.shared_prefix.attention import NAMES, base_attention

calls = []


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """Flash attention 2's, by its documentation: the causal mask is aligned to the bottom right; (T, H, D)."""
    calls.append(len(cu_seqlens_q) - 1)
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    outputs = []
    splits = ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    split = (tensor.split(ends.diff().tolist()) for tensor, ends in splits)
    for queries, keys, values in zip(*split, strict=True):
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys)
        scores = scores * (softmax_scale if softmax_scale is not None else 1 / math.sqrt(q.shape[-1]))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))
        if causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        if window_size[0] >= 0:
            scores = scores.masked_fill(distance > window_size[0], -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    ends = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1])
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
    output = flash_attn_varlen_func(*flat, ends, ends, q.shape[1], q.shape[1], 0.0, softmax_scale, causal, window_size)
    return output.view(*q.shape)


@pytest.fixture
def reference_kernels(monkeypatch):
    kernels = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda implementation, *args, **kwargs: kernels)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    calls.clear()


def packed_by(base: str, model, groups):
    model.model.set_attn_implementation(NAMES[base])
    layout, ids = SharedPrefixLayout.pack(groups)
    return model(torch.tensor([ids], device=model.device), shared_prefix_layout=layout)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "granite"])
def test_flash_attention_gives_the_embeddings_of_separate_rows(name, reference_kernels):
    model, groups = gpm(name), ragged_groups()
    with torch.no_grad():
        embeddings, scales = separate(model, groups)
        output = packed_by("flash_attention_2", model, groups)
    torch.testing.assert_close(output.embeddings, embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.scales, scales, rtol=0, atol=1e-5)
    # One call a layer, with a segment for each prefix and each response.
    assert calls == [sum(len(responses) + 1 for _, responses in groups)] * model.model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padded_rows_still_go_to_flash_attention(name, reference_kernels):
    model, groups = gpm(name), ragged_groups()
    with torch.no_grad():
        expected = padded(model, groups)
        model.model.set_attn_implementation(NAMES["flash_attention_2"])
        output = padded(model, groups)
    torch.testing.assert_close(output.embeddings, expected.embeddings, rtol=0, atol=1e-5)
    assert len(calls) == model.model.config.num_hidden_layers


def test_the_kernels_name_is_the_one_that_was_asked_for(reference_kernels, monkeypatch):
    """transformers loads kernels by name: that of packed rows would be looked for on the Hub."""
    names, load = [], flash_utils._lazy_imports
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda name, *args, **kwargs: names.append(name) or load(name))
    model = gpm("llama")
    with torch.no_grad():
        packed_by("flash_attention_2", model, ragged_groups())
    assert names == ["flash_attention_2"]
    assert base_attention(model.model.config) == "flash_attention_2"
    assert cannot_share_prefixes(model.model) is None


def test_a_backbone_without_a_source_is_padded():
    model, space = gpm("llama"), {}
    exec("def forward(self, *args, **kwargs):\n    return super(type(self), self).forward(*args, **kwargs)", space)
    model.model.__class__ = type("Unread", (type(model.model),), space)
    assert cannot_share_prefixes(model.model) == "the source of llama cannot be read, in which its attention shows"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_the_mask_of_flex_attention_is_that_of_separate_rows(name, monkeypatch):
    """Flex attention without a compiler, which is its reference; compiled, it has no gradients on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    def uncompiled(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(attention, "UNMASKED_DEVICES", ())
    model, groups = gpm(name), ragged_groups()
    with torch.no_grad():
        embeddings, scales = separate(model, groups)
        output = packed_by("flex_attention", model, groups)
    torch.testing.assert_close(output.embeddings, embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.scales, scales, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_flex_attention_takes_packed_rows_on_a_cpu_with_gradients(name):
    model, groups = gpm(name), ragged_groups()
    embeddings, scales = separate(model, groups)
    output = packed_by("flex_attention", model, groups)
    torch.testing.assert_close(output.embeddings, embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.scales, scales, rtol=0, atol=1e-5)
    output.embeddings.sum().backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("base", NAMES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_on_a_gpu_embeddings_are_those_of_separate_rows(base, name, monkeypatch):
    """Flash attention's alignment of the causal mask, where there are fewer queries than keys, above all."""
    if (base, name) == ("sdpa", "gemma2"):
        pytest.skip("transformers has no sdpa with soft-capping")
    monkeypatch.setattr(SHARING[name], "head_dim", 16)  # flex attention takes no narrower heads
    if base.startswith("flash") and not getattr(flash_utils, f"is_flash_attn_{base[-1]}_available")():
        pytest.skip(f"needs {base}")
    model, groups = gpm(name).to("cuda", torch.bfloat16), ragged_groups()
    with torch.no_grad():
        expected, _ = separate(model, groups)
        output = packed_by(base, model, groups)
    torch.testing.assert_close(output.embeddings, expected, rtol=0, atol=5e-2)
    assert (expected[0] - expected[1]).abs().max() > 0.1
