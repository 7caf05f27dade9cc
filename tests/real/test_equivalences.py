"""Real backbones: embeddings and gradients of padded and of packed rows are those of separate rows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from gpm_trl import GPMForPreference
from gpm_trl.data import Renderer
from gpm_trl.data.collator import pad_rows
from gpm_trl.gpo.reference import add_fused_lm_head
from gpm_trl.gpo.shared_prefix import shared_prefix_log_probs
from gpm_trl.models.shared_prefix import SharedPrefixLayout, enable_shared_prefix
from gpm_trl.preference import preference_cross_entropy, preference_score

from .parts import part, real_tokenizer

pytestmark = pytest.mark.real

BACKBONES = ("smollm2-135m", "gemma3-270m")
TEXTS = {
    "What is 2 + 2?": [" 4", " Five, I believe, but ask somebody else.", " 2 + 2 is 4."],
    "Name a colour. One word is enough, and no more than one is wanted:": [" Red", " Of all the colours, blue."],
}
COMPARISONS = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 4]])
# In float32. Embeddings have unit length; a gradient is measured by the largest of its weight.
EMBEDDINGS = {"rtol": 0, "atol": 1e-5}
GRADIENTS = 1e-3
WEIGHTS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    """A real backbone with new heads that vary with the text more than new ones do, and a few rows for it."""
    set_seed(0)
    model = GPMForPreference.from_pretrained(part(request.param), dtype=torch.float32, embedding_dim=6).eval()
    with torch.no_grad():
        model.embedding_head.weight.mul_(10)
        model.scale_gate.weight.mul_(10)
    enable_shared_prefix(model.model)
    renderer = Renderer(real_tokenizer(request.param))
    return model, [renderer.encode(prompt, responses) for prompt, responses in TEXTS.items()]


def separate(model, groups):
    outputs = [
        model(torch.tensor([prompt + ids]), prompt_lengths=torch.tensor([len(prompt)]))
        for prompt, responses in groups
        for ids in responses
    ]
    return torch.cat([output.embeddings for output in outputs]), torch.cat([output.scales for output in outputs])


def padded(model, groups, pad_to_multiple_of=None, side="right"):
    rows = [prompt + ids for prompt, responses in groups for ids in responses]
    batch = pad_rows(rows, model.config.text_config.eos_token_id or 0, pad_to_multiple_of)
    if side == "left":
        for ids, mask in zip(*batch.values(), strict=True):
            shift = int(len(mask) - mask.sum())
            ids.copy_(ids.roll(shift))
            mask.copy_(mask.roll(shift))
    lengths = torch.tensor([len(prompt) for prompt, responses in groups for _ in responses])
    output = model(**batch, prompt_lengths=lengths)
    return output.embeddings, output.scales


def packed(model, groups):
    layout, ids = SharedPrefixLayout.pack(groups)
    output = model(torch.tensor([ids]), shared_prefix_layout=layout)
    return output.embeddings, output.scales


@pytest.fixture(scope="module")
def expected(backbone):
    with torch.no_grad():
        embeddings, scales = separate(*backbone)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-2
    assert (scales[0] - scales[3]).abs().max() > 1e-3
    return embeddings, scales


BATCHES = {
    "padded": padded,
    "padded on the left": lambda model, groups: padded(model, groups, side="left"),
    "padded more": lambda model, groups: padded(model, groups, pad_to_multiple_of=64),
    "packed": packed,
}


@pytest.mark.parametrize("way", BATCHES)
def test_a_batch_gives_what_its_rows_give(backbone, expected, way):
    with torch.no_grad():
        embeddings, scales = BATCHES[way](*backbone)
    torch.testing.assert_close(embeddings, expected[0], **EMBEDDINGS)
    torch.testing.assert_close(scales, expected[1], **EMBEDDINGS)


def test_longer_than_the_window_a_shared_prefix_gives_what_rows_give():
    """Gemma 3's local layers see 512 tokens: a response must not see the start of a longer prompt in these."""
    set_seed(0)
    model = GPMForPreference.from_pretrained(part("gemma3-270m"), dtype=torch.float32, embedding_dim=6).eval()
    enable_shared_prefix(model.model)
    assert model.config.text_config.sliding_window == 512
    prompt = " ".join(str(number) for number in range(170))
    groups = [Renderer(real_tokenizer("gemma3-270m")).encode(prompt, [" and 170", " one hundred and seventy"])]
    assert 512 < len(groups[0][0]) < 600
    with torch.no_grad():
        torch.testing.assert_close(packed(model, groups), separate(model, groups), **EMBEDDINGS)


def gradients(model, compute, groups) -> dict[str, torch.Tensor]:
    """Of the loss of a few comparisons: those of the heads, and of weights from the first to the last layer."""
    model.zero_grad()
    embeddings, scales = compute(model, groups)
    first, second = embeddings[COMPARISONS].unbind(1)
    scores = preference_score(first, second, scales[COMPARISONS[:, 0]])
    preference_cross_entropy(scores, torch.tensor([1.0, 1.0, 1.0, 0.0]), model.temperature).mean().backward()
    last = model.config.text_config.num_hidden_layers - 1
    names = (
        *("embedding_head.weight", "scale_gate.weight", "model.embed_tokens.weight"),
        *(f"model.layers.{layer}.{weight}" for layer in (0, last // 2, last) for weight in WEIGHTS),
    )
    parameters = dict(model.named_parameters())
    return {name: parameters[name].grad.clone() for name in names}


def test_gradients_are_those_of_separate_rows(backbone):
    model, groups = backbone
    reference = gradients(model, separate, groups)
    for compute in (padded, packed):
        for name, gradient in gradients(model, compute, groups).items():
            largest = reference[name].abs().max()
            assert largest > 0, name
            assert (gradient - reference[name]).abs().max() < GRADIENTS * largest, f"{compute.__name__}: {name}"
    model.zero_grad()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_policy_gives_the_log_probabilities_and_entropies_of_separate_rows(name):
    model = AutoModelForCausalLM.from_pretrained(part(name), dtype=torch.float32).eval()
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    tokenizer = real_tokenizer(name)
    texts = [(prompt, response) for prompt, responses in TEXTS.items() for response in responses]
    prompts, completions = (
        [tokenizer(text, add_special_tokens=False).input_ids for text in of] for of in zip(*texts, strict=True)
    )
    left, right = (max(map(len, rows)) for rows in (prompts, completions))
    ids, mask = torch.zeros(len(texts), left + right, dtype=torch.long), torch.zeros(len(texts), left + right)
    expected = [torch.zeros(len(texts), right) for _ in range(2)]
    with torch.no_grad():
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            tokens, size = torch.tensor(prompt + completion), len(completion)
            place = slice(left - len(prompt), left + size)
            ids[row, place], mask[row, place] = tokens, 1
            logs = (model(tokens[None]).logits[0, -size - 1 : -1] / 0.7).log_softmax(-1)
            expected[0][row, :size] = logs.gather(-1, tokens[-size:, None]).squeeze(-1)
            expected[1][row, :size] = -(logs.exp() * logs).sum(-1)
        enable_shared_prefix(model.base_model)
        found = shared_prefix_log_probs(model, ids, mask.long(), right)
    for values, others in zip(found, expected, strict=True):
        assert others.std() > 0.5
        torch.testing.assert_close(values, others, rtol=1e-5, atol=1e-4)
