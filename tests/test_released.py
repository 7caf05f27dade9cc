"""The authors' released checkpoints: scores from text against a re-computation of what their example does."""

import json
import logging

import pytest
import torch
from conftest import BACKBONES, assistant, save_to_cache, user
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_renderer import GEMMA, LLAMA3, message, prepend_bos
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from gpm_trl import GPMConfig, GPMForPreference, GPMModelConfig, GPMTrainer, PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.data.renderer import ReleasedRenderer, Renderer
from gpm_trl_cli import main

TEMPLATES = {"gemma": GEMMA, "gemma2": GEMMA, "llama": LLAMA3}
QUESTION = [user("What is 2 + 2?")]
ANSWERS = ["4", "It is five.", "Three, more or less, or four."]
CONVENTIONS = {"max_length": 4096, "long_rows": "truncate_end", "convention": "released"}


def released_tokenizer(template=GEMMA):
    tokenizer = byte_tokenizer()
    prepend_bos(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def save_released(directory, backbone="gemma", gated=True, sharded=False, num_blocks=3, heads=None):
    """A checkpoint in the authors' layout: a causal LM with one or two heads more, and a tokenizer that adds a BOS."""
    directory.mkdir(exist_ok=True)
    set_seed(1)
    model = AutoModelForCausalLM.from_config(BACKBONES[backbone])  # the embeddings of a Gemma are tied
    # Larger than at the start of a training, so that the last token, always EOS, tells responses apart.
    weights = {name: weight * (4 if "_proj" in name else 1) for name, weight in model.state_dict().items()}
    if backbone.startswith("gemma"):
        del weights["lm_head.weight"]
    gate = {"prompt_head.weight": (num_blocks, 32)} if gated else {}
    heads = heads or {"value_head.weight": (2 * num_blocks, 32), **gate}
    weights |= {name: torch.randn(shape) for name, shape in heads.items()}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if sharded:
        names = sorted(weights)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        for file, part in shards.items():
            save_file({name: weights[name] for name in part}, directory / file, metadata={"format": "pt"})
    else:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    released_tokenizer(TEMPLATES[backbone]).save_pretrained(directory)
    return directory


def read_weights(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def example_scores(directory, conversations, max_length=4096):
    """
    s(i, j) of conversations, (N, N), as Section 6 of the specification says: written from it alone, in float64 but for
    the norms of the backbones, with left padding. No function of the package is called.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    backbone = AutoModelForCausalLM.from_pretrained(directory).model.double().eval()
    weights = read_weights(directory)

    def tokens(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer(text, add_special_tokens=True).input_ids[:max_length]

    rows = [tokens(conversation) for conversation in conversations]
    width = max(map(len, rows))
    input_ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    input_ids[:, -1] = tokenizer.eos_token_id
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    hidden = backbone(input_ids=input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
    raw = hidden[:, -1].double() @ weights["value_head.weight"].double().T
    embeddings = raw / raw.pow(2).sum(-1, keepdim=True).sqrt()
    num_blocks = embeddings.shape[1] // 2
    scores = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, conversation in enumerate(conversations):
        gate = torch.ones(num_blocks, dtype=torch.float64)
        if "prompt_head.weight" in weights:
            response_length = len(rows[i]) - len(tokens(conversation[:1]))
            logits = weights["prompt_head.weight"].double() @ hidden[i, width - response_length - 1].double()
            gate = logits.exp() / logits.exp().sum()
        operator = torch.zeros(2 * num_blocks, 2 * num_blocks, dtype=torch.float64)
        for block in range(num_blocks):
            operator[2 * block, 2 * block + 1] = -gate[block]
            operator[2 * block + 1, 2 * block] = gate[block]
        for j in range(len(rows)):
            scores[i, j] = (operator @ embeddings[i]) @ embeddings[j]
    return scores


def conversations(prompt, answers):
    return [[*prompt, *([assistant(answer)] if isinstance(answer, str) else answer)] for answer in answers]


def assert_scores_equal(scorer, directory, prompt, answers, **settings):
    expected = example_scores(directory, conversations(prompt, answers), **settings)
    assert expected.abs().max() > 0.03  # there is something to compare
    (matrix,) = scorer.matrix([prompt], [answers])
    torch.testing.assert_close(matrix.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "gated", "sharded", "shared_prefix"),
    [
        ("gemma", True, False, True),
        ("gemma", False, True, False),
        ("llama", True, True, False),
        ("llama", False, False, True),
    ],
)
def test_scores_from_text_are_those_of_the_example(tmp_path, backbone, gated, sharded, shared_prefix):
    save_released(tmp_path, backbone, gated, sharded)
    scorer = PreferenceScorer.from_pretrained(tmp_path, device="cpu", shared_prefix=shared_prefix)
    assert_scores_equal(scorer, tmp_path, QUESTION, ANSWERS)
    assert scorer.temperature == pytest.approx(0.1)


CONVERSATIONS = {
    "system": ([message("system", "Be brief."), user("Hi?")], ANSWERS),
    "turns": ([user("Hi?"), assistant("Yes?"), user("What is it?")], ANSWERS),
    "several messages": (
        [user("Hi?")],
        [[assistant(answer), user("Sure?"), assistant(answer[::-1])] for answer in ANSWERS],
    ),
}


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_gate_reads_the_first_message_of_a_conversation(tmp_path, shared_prefix):
    """The first two begin with another message, and the prompts of a batch are told apart."""
    save_released(tmp_path, "llama")
    scorer = PreferenceScorer.from_pretrained(tmp_path, device="cpu", shared_prefix=shared_prefix)
    prompts, answers = zip(*CONVERSATIONS.values(), strict=True)
    for index, matrix in enumerate(scorer.matrix(list(prompts), list(answers))):
        expected = example_scores(tmp_path, conversations(prompts[index], answers[index]))
        torch.testing.assert_close(matrix.double(), expected, atol=1e-5, rtol=1e-5)


def test_scores_of_a_backbone_with_sliding_windows_are_those_of_the_example(tmp_path):
    save_released(tmp_path, "gemma2")
    scorer = PreferenceScorer.from_pretrained(tmp_path, device="cpu")
    # Two rows of equal length: transformers gives NaN where a window holds nothing but padding on the left.
    assert_scores_equal(scorer, tmp_path, QUESTION, ["It is four.", "Maybe five."])


@pytest.mark.parametrize("backbone", ["gemma", "llama"])
def test_long_rows_are_cut_at_their_end(tmp_path, backbone):
    save_released(tmp_path, backbone)
    scorer = PreferenceScorer.from_pretrained(tmp_path, device="cpu", max_length=130)
    answers = ["a" * 20 + "b" * 100, "c" * 200, "short"]
    assert scorer.encode(QUESTION, answers).truncated
    assert_scores_equal(scorer, tmp_path, QUESTION, answers, max_length=130)
    scorer = PreferenceScorer.from_pretrained(tmp_path, device="cpu", max_length=20)
    with pytest.raises(ValueError, match="`max_length` = 20, rows would have nothing of a response"):
        scorer.matrix([QUESTION], [ANSWERS])


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("backbone", ["gemma", "llama"])
def test_conventions_are_values_of_the_configuration(tmp_path, backbone, gated):
    save_released(tmp_path, backbone, gated, num_blocks=2)
    model, info = GPMForPreference.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    config = model.config
    assert (config.embedding_dim, config.use_scale_gate, config.gate_activation) == (4, gated, "softmax")
    assert (config.normalize_embeddings, config.temperature, config.renderer) == (True, 0.1, CONVENTIONS)
    weights, loaded = read_weights(tmp_path), model.state_dict()
    assert torch.equal(loaded["embedding_head.weight"], weights["value_head.weight"])
    if gated:
        assert torch.equal(loaded["scale_gate.weight"], weights["prompt_head.weight"])
    assert not [name for name in loaded if name.startswith(("lm_head", "value_head", "prompt_head"))]
    assert loaded["model.norm.weight"].equal(weights["model.norm.weight"])


def test_fields_can_be_overridden(tmp_path):
    save_released(tmp_path)
    model = GPMForPreference.from_pretrained(tmp_path, temperature=0.5, renderer={"max_length": 99})
    assert model.config.temperature == 0.5
    assert model.config.renderer == {**CONVENTIONS, "max_length": 99}
    with pytest.raises(
        ValueError, match=r"embedding_head.weight \[6, 32\], expected \[8, 32\].*Leave out `embedding_dim`"
    ):
        GPMForPreference.from_pretrained(tmp_path, embedding_dim=8)
    with pytest.raises(ValueError, match=r"holds scale_gate.weight, which the model would drop"):
        GPMForPreference.from_pretrained(tmp_path, use_scale_gate=False)


def test_checkpoint_in_the_cache_of_the_hub_is_loaded(tmp_path):
    save_released(tmp_path / "local", "llama", sharded=True)
    save_to_cache(tmp_path / "local", tmp_path / "cache", "user/gpm")
    scorer = PreferenceScorer.from_pretrained("user/gpm", device="cpu", cache_dir=tmp_path / "cache")
    assert_scores_equal(scorer, tmp_path / "local", QUESTION, ANSWERS)


def test_training_goes_on_with_the_rendering_of_the_package_and_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpm_trl"), "propagate", True)
    save_released(tmp_path / "released")
    row = {"prompt": QUESTION, "chosen": [assistant("4")], "rejected": [assistant("5")]}
    args = GPMConfig(str(tmp_path / "new"), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True)
    trainer = GPMTrainer(str(tmp_path / "released"), args, train_dataset=Dataset.from_list([row] * 8))
    assert [record for record in caplog.records if "by the convention 'released'; from now on" in record.message]
    trainer.train()
    trainer.save_model()
    scorer = PreferenceScorer.from_pretrained(tmp_path / "new", device="cpu")
    assert type(scorer.renderer) is Renderer
    assert (scorer.model.config.embedding_dim, scorer.temperature) == (6, pytest.approx(0.1))


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_a_head_of_one_row_is_a_bradley_terry_model(tmp_path, sharded, capsys):
    """Of the authors' layout: scores are differences of rewards, read where the example reads embeddings."""
    source = save_released(tmp_path / "released", "llama", sharded=sharded, heads={"value_head.weight": (1, 32)})
    tokenizer, weights = AutoTokenizer.from_pretrained(source), read_weights(source)
    backbone = AutoModelForCausalLM.from_pretrained(source).model.eval()
    rewards = []
    for conversation in conversations(QUESTION, ANSWERS):
        ids = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False)).input_ids
        ids[-1] = tokenizer.eos_token_id
        with torch.no_grad():
            hidden = backbone(torch.tensor([ids])).last_hidden_state[0, -1]
        rewards.append(weights["value_head.weight"][0] @ hidden)
    expected = torch.stack(rewards)[:, None] - torch.stack(rewards)
    assert main(["convert", str(source), str(tmp_path / "native")]) == 0
    assert "Bradley-Terry model, embedding_dim 0, reward_dim 1, without a gate, tau = 0.1" in capsys.readouterr().out
    for directory in (source, tmp_path / "native"):
        scorer = PreferenceScorer.from_pretrained(directory, device="cpu")
        assert scorer.model.config.kind == "Bradley-Terry model"
        torch.testing.assert_close(scorer.matrix([QUESTION], [ANSWERS])[0], expected, rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("heads", "complaint"),
    [
        ({"prompt_head.weight": (3, 32)}, r"lacks embedding_head\.weight"),
        ({"value_head.weight": (5, 32)}, r"heads of the shapes .*\[5, 32\].*: the authors' have 2k rows"),
        ({"value_head.weight": (6,)}, r"heads of the shapes .*\[6\]"),
        ({"value_head.weight": (6, 32), "prompt_head.weight": (6, 32)}, r"heads of the shapes .*\[6, 32\].*\[6, 32\]"),
        ({"value_head.weight": (1, 32), "prompt_head.weight": (1, 32)}, r"or one row, .* in the former alone"),
        ({"value_head.weight": (6, 16)}, r"embedding_head\.weight \[6, 16\], expected \[6, 32\]"),
        ({"value_head.weight": (1, 16)}, r"embedding_head\.weight \[1, 16\], expected \[1, 32\]"),
    ],
)
def test_missing_and_misshapen_heads_raise(tmp_path, heads, complaint):
    save_released(tmp_path, heads=heads)
    with pytest.raises(ValueError, match=complaint) as raised:
        PreferenceScorer.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_head_that_the_index_promises_must_be_there(tmp_path):
    save_released(tmp_path, sharded=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["value_head.weight"]
    weights = load_file(shard)
    del weights["value_head.weight"]
    save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged weight file .*does not contain tensor value_head.weight"):
        GPMForPreference.from_pretrained(tmp_path)


def test_a_file_that_is_cut_off_or_a_pickle_raises(tmp_path):
    path = save_released(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="has a damaged weight file"):
        PreferenceScorer.from_pretrained(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has its weights in pytorch_model\.bin, a pickle"):
        PreferenceScorer.from_pretrained(tmp_path)


# The rendering


def test_bos_stands_twice_and_the_last_token_becomes_eos_but_for_plain_text():
    tokenizer = released_tokenizer()
    prompt_ids, (response_ids,) = ReleasedRenderer(tokenizer).encode([user("Hi")], ["yes"])
    assert tokenizer.decode(prompt_ids) == "<s><s><start_of_turn>user\nHi<end_of_turn>\n"
    assert tokenizer.decode(response_ids) == "<start_of_turn>model\nyes<end_of_turn></s>"  # "\n" is overwritten
    plain = "2 + 2 = ", ["4", "5"]
    assert ReleasedRenderer(tokenizer).encode(*plain) == Renderer(tokenizer).encode(*plain)


def test_conversations_whose_first_message_cannot_be_told_apart_raise():
    template = "{{ messages[-1].content }}|{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="The first message, which the gate reads, has other tokens"):
        ReleasedRenderer(released_tokenizer(template)).encode([user("Hi")], ["yes", "no"])
    with pytest.raises(ValueError, match="no longer than its first message"):
        ReleasedRenderer(released_tokenizer()).encode([], [[user("Hi")]])


def test_another_convention_brings_its_own_settings(tmp_path):
    source = save_released(tmp_path / "released")
    GPMForPreference.from_pretrained(source).save_pretrained(tmp_path / "native")
    for name in ("released", "native"):
        config = GPMForPreference.from_pretrained(tmp_path / name, renderer={"convention": "gpm"}).config
        assert config.renderer == {**GPMModelConfig().renderer, "convention": "gpm"}
        config = GPMForPreference.from_pretrained(tmp_path / name, renderer={"convention": "reward_model"}).config
        assert config.renderer == {**GPMModelConfig().renderer, "convention": "reward_model"}
