"""Scores and rankings from texts: those of each row alone, whatever the batch; reward models; the pipeline."""

import copy
import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import CHAT_TEMPLATE, TINY, lively_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    pipeline,
    set_seed,
)

from gpm_trl import GPMForPreference, GPMModelConfig, PreferenceScorer, Ranking, Renderer, rank_scores
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.games import cyclicity

METHODS = ["mean", "copeland", "von_neumann"]
TOOLS_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood or '' }}" + CHAT_TEMPLATE


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def random_text(generator: random.Random, longest: int = 25) -> str:
    return "".join(generator.choices("abcdefgh é.", k=generator.randint(1, longest)))


def ragged_groups(sizes=(3, 1, 9, 2, 5, 8, 4, 7, 6), seed: int = 0) -> tuple[list[str], list[list[str]]]:
    generator = random.Random(seed)
    prompts = [f"{index} {random_text(generator)}?" for index in range(len(sizes))]
    return prompts, [[random_text(generator) for _ in range(size)] for size in sizes]


@torch.no_grad()
def reference_embedding(model, prompt_ids: list[int], response_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """v(x, y) and lambda(x) of Section 1 of the specification, one row alone, the heads in float64."""
    hidden = model.model(torch.tensor([[*prompt_ids, *response_ids]])).last_hidden_state[0].double()  # (L, hidden)
    embedding = model.embedding_head.weight.double() @ hidden[-1]
    if model.config.normalize_embeddings:
        embedding = embedding / (embedding**2).sum().sqrt()
    if not model.config.use_scale_gate:
        return embedding, torch.ones(len(embedding) // 2, dtype=torch.float64)
    logits = (model.scale_gate.weight.double() @ hidden[len(prompt_ids) - 1]).exp()
    return embedding, (logits / logits.sum() if model.config.gate_activation == "softmax" else (1 + logits).log())


def reference_matrix(model, tokenizer, prompt, responses) -> torch.Tensor:
    """s(i, j) = sum_l lambda_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l]), pair by pair, in float64."""
    renderer = Renderer(tokenizer)
    rows = [renderer.encode(prompt, [response]) for response in responses]
    parts = [reference_embedding(model, prompt_ids, *response_ids) for prompt_ids, response_ids in rows]
    matrix = torch.empty(len(parts), len(parts), dtype=torch.float64)
    for (i, (v_i, scales)), (j, (v_j, _)) in itertools.product(enumerate(parts), repeat=2):
        blocks = range(len(scales))
        matrix[i, j] = sum(scales[b] * (v_i[2 * b] * v_j[2 * b + 1] - v_i[2 * b + 1] * v_j[2 * b]) for b in blocks)
    return matrix


def assert_close(actual, expected, tolerance: float = 1e-5):
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def count_rows(model) -> list[int]:
    """The number of rows of each batch, padded or packed, that the model is given from now on."""
    counts = []

    def count(module, args, kwargs):
        packed = "shared_prefix_layout" in kwargs
        counts.append(len(kwargs["shared_prefix_layout"].row_lengths if packed else kwargs["input_ids"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def set_embedding(model, tokenizer, character: str, value: float) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(character, add_special_tokens=False).input_ids] = value


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("gemma2", {}),
        ("qwen3", {}),
        ("qwen3", {"use_scale_gate": False}),
        ("qwen3", {"normalize_embeddings": False}),
        ("qwen3", {"use_scale_gate": False, "normalize_embeddings": False, "embedding_dim": 2}),
        ("qwen3", {"gate_activation": "softplus", "embedding_dim": 8}),
    ],
    ids=["gemma2", "gate-norm", "norm", "gate", "neither", "softplus"],
)
def test_scores_equal_those_of_rows_alone_in_float64(tokenizer, backbone, settings):
    model = lively_model(backbone, **settings)
    prompts, responses = ragged_groups()
    scorer = PreferenceScorer(model, tokenizer, batch_tokens=200)
    matrices = scorer.matrix(prompts, responses)
    assert [len(matrix) for matrix in matrices] == [len(group) for group in responses]
    spread = 0.0
    for prompt, group, matrix in zip(prompts, responses, matrices, strict=True):
        expected = reference_matrix(model, tokenizer, prompt, group)
        assert_close(matrix, expected)
        spread = max(spread, expected.abs().max().item())
    assert spread > 0.1  # so that the tolerance means something


def test_conversations_have_the_scores_of_each_alone(chat_tokenizer):
    model = lively_model()
    prompt, responses = [user("How many?"), assistant("Of what?"), user("Cats")], ["Two", "Many more", ""]
    (matrix,) = PreferenceScorer(model, chat_tokenizer).matrix([prompt], [responses])
    assert_close(matrix, reference_matrix(model, chat_tokenizer, prompt, responses))


@pytest.mark.parametrize("batch_tokens", [97, 10**9])
def test_scores_do_not_depend_on_the_batch(tokenizer, batch_tokens):
    model, (prompts, responses) = lively_model(), ragged_groups()
    counts = count_rows(model)
    one_by_one = PreferenceScorer(model, tokenizer, batch_tokens=1).matrix(prompts, responses)
    assert counts == [1] * 45
    counts.clear()
    batched = PreferenceScorer(model, tokenizer, batch_tokens=batch_tokens).matrix(prompts, responses)
    assert sum(counts) == 45
    assert len(counts) == 1 or batch_tokens == 97
    for matrix, expected in zip(batched, one_by_one, strict=True):
        assert_close(matrix, expected, tolerance=2e-6)


def test_batches_keep_the_budget_with_their_padding_and_come_longest_first(tokenizer):
    model, (prompts, responses) = lively_model(), ragged_groups()
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    PreferenceScorer(model, tokenizer, batch_tokens=120, shared_prefix=False).matrix(prompts, responses)
    assert all(rows * width <= 120 or rows == 1 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    assert max(rows for rows, _ in shapes) > 1


def test_each_distinct_row_is_embedded_once(tokenizer):
    model = lively_model()
    counts = count_rows(model)
    scorer = PreferenceScorer(model, tokenizer, batch_tokens=8)
    scorer.matrix(["p", "q", "p", "q"], [["a", "b", "a"], ["a", "a", "a"], ["b", "c"], ["a", "d"]])
    assert sum(counts) == 5
    counts.clear()
    scores = scorer.score(["p"] * 3, ["a", "b", "c"], ["b", "c", "a"])
    assert sum(counts) == 3
    (matrix,) = scorer.matrix(["p"], [["a", "b", "c"]])
    assert_close(scores, torch.stack([matrix[0, 1], matrix[1, 2], matrix[2, 0]]), tolerance=2e-6)
    counts.clear()
    # The gate reads another position, so "ab" + "c" is not "a" + "bc".
    first, second = scorer.embed(["ab", "a"], [["c"], ["bc"]])
    assert sum(counts) == 2
    assert_close(first.embeddings, second.embeddings)
    assert not torch.allclose(first.scales, second.scales, atol=1e-3)


def test_duplicates_tie_exactly(tokenizer):
    scorer = PreferenceScorer(lively_model(), tokenizer, batch_tokens=8)
    (matrix,) = scorer.matrix(["p"], [["a", "bbbb", "a", "cc", "a"]])
    assert matrix[0, 2] == matrix[0, 4] == matrix[2, 4] == 0
    assert torch.equal(matrix[0], matrix[2])
    assert scorer.score(["p"], ["a"], ["a"]).item() == 0
    assert scorer.probability(["p"], ["a"], ["a"]).item() == 0.5


def test_a_prompt_has_one_gate_whatever_its_batches(tokenizer):
    """The last bits of a gate may differ from batch to batch, here more: it is one all the same."""
    model, batches = lively_model(), itertools.count(1)

    def vary(module, args, output):
        output.scales = output.scales * (1 + 0.01 * next(batches))
        return output

    model.register_forward_hook(vary)
    prompts, responses = ["What?", "Who?", "What?"], [["a", "b" * 50, "c" * 20], ["d"], ["e" * 30, "f"]]
    groups = PreferenceScorer(model, tokenizer, batch_tokens=1).embed(prompts, responses)
    assert next(batches) == 7
    assert [group.scales.shape for group in groups] == [(2,)] * 3
    assert torch.equal(groups[0].scales, groups[2].scales)
    assert not torch.allclose(groups[0].scales / groups[0].scales.sum(), groups[1].scales / groups[1].scales.sum())


def test_probabilities_and_means_are_those_of_the_formulas(tokenizer):
    model = lively_model(temperature=0.25)
    scorer = PreferenceScorer(model, tokenizer)
    prompts, responses = ragged_groups(sizes=(2, 4))
    probabilities = scorer.probability(prompts, [group[0] for group in responses], [group[1] for group in responses])
    means = scorer.mean_preference(prompts, responses)
    for index, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        expected = reference_matrix(model, tokenizer, prompt, group)
        assert probabilities[index].item() == pytest.approx(1 / (1 + math.exp(-expected[0, 1] / 0.25)), abs=1e-5)
        assert_close(means[index], expected.sum(1) / len(group) / 0.25, tolerance=1e-4)
        assert means[index].sum().item() == pytest.approx(0, abs=1e-5)


def test_mean_preference_over_references_is_a_number_of_each_response_alone(tokenizer):
    model = lively_model(temperature=0.25)
    scorer = PreferenceScorer(model, tokenizer)
    prompts, responses = ragged_groups(sizes=(2, 4))
    references = [["one", "two", "three"], responses[1][:1]]
    means = scorer.mean_preference(prompts, responses, references=references)
    for prompt, group, others, mean in zip(prompts, responses, references, means, strict=True):
        expected = reference_matrix(model, tokenizer, prompt, [*group, *others])
        assert_close(mean, expected[: len(group), len(group) :].mean(1) / 0.25, tolerance=1e-4)
        (alone,) = scorer.mean_preference([prompt], [group[:1]], references=[others])
        assert_close(alone, mean[:1])
    assert means[1][0] == 0  # a response over itself


def test_rankings_and_winners_are_those_of_the_scores(tokenizer):
    prompts, responses = ragged_groups(sizes=(3, 1, 5))
    scorer = PreferenceScorer(lively_model(temperature=0.3), tokenizer)
    matrices = scorer.matrix(prompts, responses)
    for method in METHODS:
        expected = [rank_scores(matrix, 0.3, method) for matrix in matrices]
        for prompt, group, wanted in zip(prompts, responses, expected, strict=True):
            ranking = scorer.rank(prompt, group, method=method)
            assert ranking.order == wanted.order
            assert_close(ranking.values, wanted.values)
        winners = [group[ranking.order[0]] for group, ranking in zip(responses, expected, strict=True)]
        assert scorer.best_of_n(prompts, responses, method=method) == winners


def test_no_prompts_give_no_results(tokenizer):
    scorer = PreferenceScorer(lively_model(), tokenizer)
    assert scorer.embed([], []) == scorer.best_of_n([], []) == scorer.mean_preference([], []) == []
    assert scorer.score([], [], []).shape == scorer.probability([], [], []).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scorer: scorer.matrix(["p", "q"], [["a"], []]), "^Prompt 1: There are no responses"),
        (lambda scorer: scorer.matrix(["p", "q"], [["a"]]), "got 2 `prompts`, 1 `responses`"),
        (lambda scorer: scorer.matrix("p", [["a"]]), "got a string for `prompts`, 1 `responses`"),
        (lambda scorer: scorer.matrix(["p"], ["ab"]), "string"),
        (lambda scorer: scorer.probability(["p"], ["a"], "b"), "a string for `b`"),
        (lambda scorer: scorer.mean_preference(["p"], [["a"]], references=[]), "1 `responses`, 0 `references`"),
        (lambda scorer: scorer.mean_preference(["p"], [["a"]], references=[[]]), "give each prompt at least one"),
        (lambda scorer: scorer.rank("p", ["a"], method="borda"), "`method` is 'borda'; choose one of .*'mean'"),
        (lambda scorer: scorer.best_of_n(["p"], [["a"]], "borda"), "`method` is 'borda'"),
        (lambda scorer: rank_scores(torch.zeros(2, 2), 0.1, "borda"), "`method` is 'borda'"),
        (lambda scorer: scorer.matrix(["p", [user("q")]], [["a"], ["b"]]), "^Prompt 1: .*no chat template"),
        (lambda scorer: scorer.rank("q", ["a"], template_kwargs={"mood": "calm"}), "mood would be ignored"),
        (lambda scorer: PreferenceScorer(scorer.model, scorer.tokenizer, 0), "`batch_tokens` is 0"),
        (lambda scorer: PreferenceScorer(scorer.model.model, scorer.tokenizer), "Qwen3Model .*neither a general"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_embedded(tokenizer, call, message):
    model = lively_model()
    counts = count_rows(model)
    with pytest.raises(ValueError, match=message):
        call(PreferenceScorer(model, tokenizer))
    assert not counts


def test_a_string_response_to_a_conversation_is_an_assistant_message(chat_tokenizer):
    scorer = PreferenceScorer(lively_model(), chat_tokenizer)
    prompt, texts = [user("q")], ["a", "b", "cc"]
    strings, messages, mixed = scorer.embed(
        [prompt] * 3, [texts, [[assistant(text)] for text in texts], ["a", [assistant("b")], "cc"]]
    )
    assert torch.equal(strings.embeddings, messages.embeddings)
    assert torch.equal(strings.embeddings, mixed.embeddings)


def test_template_arguments_reach_the_template_of_their_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    scorer = PreferenceScorer(lively_model(), tokenizer)
    prompt, responses = [user("q")], ["a", "b"]
    tools = [{"type": "function", "function": {"name": "add"}}]
    arguments = [{}, {"tools": tools}, {"mood": "gloomy"}]
    matrices = scorer.matrix([prompt] * 3, [responses] * 3, arguments)
    for matrix, kwargs in zip(matrices, arguments, strict=True):
        prompt_ids, rows = Renderer(tokenizer).encode(prompt, responses, **kwargs)
        (v_i, scales), (v_j, _) = (reference_embedding(scorer.model, prompt_ids, row) for row in rows)
        expected = (scales * (v_i[::2] * v_j[1::2] - v_i[1::2] * v_j[::2])).sum()
        assert_close(matrix[0, 1], expected)
        assert_close(scorer.rank(prompt, responses, template_kwargs=kwargs).scores, matrix)
    assert len({round(matrix[0, 1].item(), 5) for matrix in matrices}) == 3
    assert_close(scorer.mean_preference([prompt], [responses], [arguments[1]])[0], matrices[1].mean(1) / 0.1, 1e-4)


@pytest.mark.parametrize("long_rows", ["filter", "error"])
def test_a_row_too_long_names_prompt_and_response(tokenizer, long_rows):
    scorer = PreferenceScorer(lively_model(renderer={"max_length": 10, "long_rows": long_rows}), tokenizer)
    with pytest.raises(ValueError, match=r"^Prompt 1: The row of response 2 has 11 tokens.*`max_length` = 10"):
        scorer.matrix(["p", "12345"], [["a"], ["a", "1234", "12345", "b"]])
    scorer.matrix(["12345"], [["1234"]])  # as long as allowed


def test_max_length_and_long_rows_can_be_given(tokenizer, caplog):
    model = lively_model(renderer={"max_length": 4})
    with pytest.raises(ValueError, match="`max_length` = 4"):
        PreferenceScorer(model, tokenizer).matrix(["12345"], [["a"]])
    longer = PreferenceScorer(model, tokenizer, max_length=20).matrix(["12345"], [["a", "b"]])[0]
    assert_close(longer, reference_matrix(model, tokenizer, "12345", ["a", "b"]))
    scorer = PreferenceScorer(model, tokenizer, max_length=10, long_rows="truncate_prompt")
    cut, whole = scorer.matrix(["0123456789", "p"], [["a", "12345", "bc"], ["a", "b"]])
    assert "1 of 2 prompts were cut to 10 tokens a row" in caplog.text
    assert_close(cut, reference_matrix(model, tokenizer, "6789", ["a", "12345", "bc"]))  # for all its responses
    assert_close(whole, reference_matrix(model, tokenizer, "p", ["a", "b"]))
    assert model.config.renderer == {"max_length": 4, "long_rows": "filter"}


def test_rows_are_never_longer_than_the_backbone_takes(tokenizer):
    scorer = PreferenceScorer(lively_model(), tokenizer, max_length=10_000)
    with pytest.raises(ValueError, match=r"513 tokens, more than `max_length` = 512"):
        scorer.matrix(["p" * 500], [["a" * 12]])
    scorer.matrix(["p" * 500], [["a" * 11]])


@pytest.mark.parametrize("batch_tokens", [1, 10**9])
@pytest.mark.parametrize("kind", ["embedding", "gate", "reward"])
def test_the_first_row_that_is_not_finite_is_named(tokenizer, kind, batch_tokens):
    model = reward_model() if kind == "reward" else lively_model()
    set_embedding(model, tokenizer, "~", math.inf)
    if kind == "gate":
        set_embedding(model, tokenizer, "~", 0.0)
        with torch.no_grad():
            model.scale_gate.weight[0] = math.nan
    scorer = PreferenceScorer(model, tokenizer, batch_tokens=batch_tokens)
    prompt, response, count = (0, 0, 7) if kind == "gate" else (2, 1, 2)
    message = rf"^Prompt {prompt}: The embedding of response {response} is not finite\. {count} of 7 rows are like it"
    with pytest.raises(ValueError, match=message + r".*torch\.float32"):
        scorer.matrix(["p", "q", "r"], [["a", "b"], ["c"], ["d", "e~", "f", "~"]])


@pytest.mark.parametrize("settings", [{"temperature": 1e-300}, {"normalize_embeddings": False}, {}])
def test_scores_that_are_not_finite_are_told_as_embeddings_are(tokenizer, settings):
    """Where products overflow, or a quotient; where a length does, an embedding has no direction."""
    model = lively_model(**settings)
    with torch.no_grad():
        model.embedding_head.weight.mul_(1 if "temperature" in settings else 1e25)
    scorer = PreferenceScorer(model, tokenizer)
    what = "A score" if settings else "The embedding"
    for call in (
        lambda: scorer.score(["p"], ["a"], ["b"]),
        lambda: scorer.probability(["p"], ["a"], ["b"]),
        lambda: scorer.rank("p", ["a", "b"]),
        lambda: scorer.mean_preference(["p"], [["a"]]),
    ):
        with pytest.raises(ValueError, match=rf"^Prompt 0: {what} of response 0 is not finite"):
            call()


def test_rewards_may_be_as_large_as_they_are(tokenizer):
    model = reward_model()
    with torch.no_grad():
        model.score.weight.mul_(1e25)
    scores = PreferenceScorer(model, tokenizer).matrix(["p"], [["a", "b"]])[0]
    assert 1e20 < scores.abs().max() < math.inf


def test_dropout_is_off_and_the_training_mode_comes_back_also_after_an_error(tokenizer):
    set_seed(0)
    config = GPMModelConfig(text_config=LlamaConfig(**TINY, attention_dropout=0.5), embedding_dim=4)
    model = GPMForPreference(config).eval()
    prompts, responses = ragged_groups(sizes=(3, 2))
    scorer = PreferenceScorer(model, tokenizer)
    expected = scorer.embed(prompts, responses)
    assert not model.training
    model.train()
    for one, other in zip(scorer.embed(prompts, responses), expected, strict=True):
        assert torch.equal(one.embeddings, other.embeddings)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        active = model(**Renderer(tokenizer)(prompts[0], responses[0])).embeddings
    assert not torch.allclose(active, expected[0].embeddings, atol=1e-3)  # it would have shown
    model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scorer.matrix(["p"], [["a"]])
    assert model.training


def test_a_lora_model_scores_as_when_merged(tokenizer):
    set_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embedding_head", "scale_gate"])
    base = lively_model(temperature=0.2, renderer={"max_length": 60})
    plain = PreferenceScorer(copy.deepcopy(base), tokenizer)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    prompts, responses = ragged_groups(sizes=(3, 1, 4))
    scorer = PreferenceScorer(model, tokenizer)
    assert (scorer.temperature, scorer.renderer.max_length) == (pytest.approx(0.2), 60)
    matrices = scorer.matrix(prompts, responses)
    assert not torch.allclose(matrices[0], plain.matrix(prompts, responses)[0], atol=1e-3)
    merged = copy.deepcopy(model).merge_and_unload()
    for prompt, group, matrix in zip(prompts, responses, matrices, strict=True):
        assert_close(matrix, reference_matrix(merged, tokenizer, prompt, group))


def save(model, tokenizer, directory):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_saved_model_scores_the_same_with_the_settings_it_was_saved_with(chat_tokenizer, tmp_path):
    settings = {"max_length": 77, "long_rows": "truncate_prompt"}
    model = lively_model("llama", temperature=0.3, renderer=settings)
    scorer = PreferenceScorer.from_pretrained(save(model, chat_tokenizer, tmp_path), device="cpu")
    assert (scorer.renderer.max_length, scorer.renderer.long_rows) == (77, "truncate_prompt")
    assert scorer.temperature == pytest.approx(0.3)
    assert next(scorer.model.model.parameters()).dtype == torch.float32
    prompts, responses = ["p" * 90, [user("q")]], [["a", "b"], ["c", "dd", "e"]]
    expected = PreferenceScorer(model, chat_tokenizer).matrix(prompts, responses)
    for matrix, wanted in zip(scorer.matrix(prompts, responses), expected, strict=True):
        assert torch.equal(matrix, wanted)


def test_loading_takes_the_options_of_the_scorer_and_of_transformers(tokenizer, tmp_path):
    save(lively_model(), tokenizer, tmp_path)
    of_scorer = {"batch_tokens": 99, "max_length": 88, "long_rows": "error", "shared_prefix": False}
    of_model = {"dtype": "bfloat16", "attn_implementation": "eager", "local_files_only": True}
    scorer = PreferenceScorer.from_pretrained(str(tmp_path), torch.device("cpu"), **of_scorer, **of_model)
    assert scorer.model.model.config._attn_implementation == "eager"
    assert (scorer.batch_tokens, scorer.renderer.max_length, scorer.renderer.long_rows) == (99, 88, "error")
    assert next(scorer.model.model.parameters()).dtype == torch.bfloat16
    assert scorer.model.embedding_head.weight.dtype == torch.float32
    prompts, responses = ragged_groups(sizes=(3,))
    (group,), (full,) = (
        one.embed(prompts, responses) for one in (scorer, PreferenceScorer(lively_model(), tokenizer))
    )
    assert {(tensor.dtype, tensor.device.type) for tensor in group} == {(torch.float32, "cpu")}
    assert_close(group.embeddings, full.embeddings, tolerance=0.1)
    assert not torch.equal(group.embeddings, full.embeddings)


def test_what_is_no_preference_model_is_refused_with_the_remedy(tokenizer, decoder, tmp_path):
    message = "is Qwen3ForCausalLM .*neither a general preference model nor a reward model: train one"
    with pytest.raises(ValueError, match=message):
        PreferenceScorer.from_pretrained(decoder)
    model = LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=3))
    for load in (
        lambda: PreferenceScorer(model, tokenizer),
        lambda: PreferenceScorer.from_pretrained(save(model, tokenizer, tmp_path / "labels")),
    ):
        with pytest.raises(ValueError, match="3 labels, but a reward model has one"):
            load()
    with pytest.raises(OSError, match="nowhere"):
        PreferenceScorer.from_pretrained(tmp_path / "nowhere")


def reward_model(backbone=LlamaForSequenceClassification, **settings):
    set_seed(0)
    config_class = {LlamaForSequenceClassification: LlamaConfig, Qwen3ForSequenceClassification: Qwen3Config}[backbone]
    model = backbone(config_class(**{**TINY, **settings}, num_labels=1)).eval()
    with torch.no_grad():
        model.score.weight.mul_(5)
    return model


@torch.no_grad()
def reward(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, 0].double()


@pytest.mark.parametrize(
    ("backbone", "batch_tokens"), [(LlamaForSequenceClassification, 130), (Qwen3ForSequenceClassification, 10**9)]
)
def test_scores_of_a_reward_model_are_differences_of_its_rewards(chat_tokenizer, tmp_path, backbone, batch_tokens):
    directory = save(reward_model(backbone), chat_tokenizer, tmp_path)
    scorer = PreferenceScorer.from_pretrained(directory, device="cpu", batch_tokens=batch_tokens)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    prompts, responses = ragged_groups(sizes=(3, 1, 5, 2))
    prompts[2] = [user(prompts[2])]
    assert scorer.temperature == 1.0
    for prompt, group, matrix in zip(prompts, responses, scorer.matrix(prompts, responses), strict=True):
        if isinstance(prompt, str):
            rows = [chat_tokenizer(prompt + response + "</s>").input_ids for response in group]
        else:
            rows = [chat_tokenizer.apply_chat_template([*prompt, assistant(r)], return_dict=False) for r in group]
        rewards = torch.stack([reward(model, row) for row in rows])
        assert_close(matrix, rewards[:, None] - rewards[None, :])
        assert torch.equal(matrix, -matrix.T)
        assert len(group) == 1 or rewards.std() > 0.05
        ranking = scorer.rank(prompt, group)
        assert ranking.order == rewards.argsort(descending=True).tolist()
        assert_close(ranking.mean_preference, rewards - rewards.mean())
        assert_close(ranking.probabilities, (rewards[:, None] - rewards[None, :]).sigmoid())


def test_long_rows_of_a_reward_model_are_refused_or_cut_from_the_left(tokenizer):
    model = reward_model()
    with pytest.raises(ValueError, match="`max_length` = 512"):
        PreferenceScorer(model, tokenizer).matrix(["p"], [["a" * 600]])
    scorer = PreferenceScorer(model, tokenizer, max_length=8, long_rows="truncate_prompt")
    (matrix,) = scorer.matrix(["prompt"], [["a", "0123"]])
    rows = [tokenizer(text + "</s>").input_ids[-8:] for text in ("prompta", "mpt0123")]
    assert_close(matrix[0, 1], reward(model, rows[0]) - reward(model, rows[1]))
    with pytest.raises(ValueError, match=r"^Prompt 0: The row of response 1 has \d+ tokens.*its prompt was cut"):
        scorer.matrix(["p"], [["a", "0123456789"]])  # as for a general preference model: no response is cut


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_a_reward_model_without_a_pad_token_reads_the_last_token_of_each_row(tokenizer, batch_tokens):
    model = reward_model()
    model.config.pad_token_id = None
    scores = PreferenceScorer(model, tokenizer, batch_tokens).score(["p"] * 2, ["a", "bcd"], ["ef", "gh"])
    assert model.config.pad_token_id is None
    rewards = [reward(model, tokenizer(f"p{text}</s>").input_ids) for text in ("a", "ef", "bcd", "gh")]
    assert_close(scores, torch.stack([rewards[0] - rewards[1], rewards[2] - rewards[3]]))


def test_embeddings_can_be_used_in_training(tokenizer):
    (group,) = PreferenceScorer(lively_model(), tokenizer).embed(["q"], [["a", "b"]])
    weight = torch.ones(4, requires_grad=True)
    (weight * group.embeddings).sum().backward()
    assert weight.grad is not None


# rank_scores


def skew(*above: float) -> torch.Tensor:
    """The skew-symmetric matrix with these entries above the diagonal, row by row."""
    size = round((1 + math.sqrt(1 + 8 * len(above))) / 2)
    matrix = torch.zeros(size, size)
    for value, (i, j) in zip(above, itertools.combinations(range(size), 2), strict=True):
        matrix[i, j], matrix[j, i] = value, -value
    return matrix


def random_skew(size: int, seed: int) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return matrix - matrix.T


def test_a_cycle_has_the_von_neumann_winner_of_the_probabilities():
    """Of a > b > c > a with P - 1/2 = x, y, z: each is played in proportion to the edge between the other two."""
    scores, temperature = skew(1.0, -3.0, 0.5), 2.0  # 0 > 1 by 1, 2 > 0 by 3, 1 > 2 by 0.5
    x, z, y = (1 / (1 + math.exp(-score / temperature)) - 0.5 for score in (1.0, 3.0, 0.5))
    ranking = rank_scores(scores, temperature, method="von_neumann")
    assert ranking.values.tolist() == pytest.approx([y / (x + y + z), z / (x + y + z), x / (x + y + z)], abs=1e-4)
    assert ranking.order == [1, 2, 0]
    assert rank_scores(scores, temperature, method="copeland").values.tolist() == [1.0, 1.0, 1.0]
    assert rank_scores(scores, temperature, method="copeland").order == [2, 1, 0]  # by the mean


@pytest.mark.parametrize("method", METHODS)
def test_ties_are_broken_by_the_order_given(method):
    assert rank_scores(torch.zeros(4, 4), 0.1, method).order == [0, 1, 2, 3]
    assert rank_scores(skew(1.0, -1.0, 1.0), 0.1, method).order == [0, 1, 2]  # rock, scissors, paper
    assert rank_scores(skew(0.0, 1.0, 0.0), 0.1, "copeland").values.tolist() == [1.5, 1.0, 0.5]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.5])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 12])
def test_rankings_equal_their_references(size, temperature):
    scores = random_skew(size, seed=size)
    doubles = scores.double() / temperature
    probabilities = 1 / (1 + (-doubles).exp())
    rankings = {method: rank_scores(scores, temperature, method) for method in METHODS}
    for ranking in rankings.values():
        assert_close(ranking.probabilities, probabilities)
        assert_close(ranking.mean_preference, doubles.sum(1) / size)
        assert torch.equal(ranking.scores, scores)
        assert sorted(ranking.order) == list(range(size))
        values = ranking.values[ranking.order]
        assert torch.equal(values, values.sort(descending=True).values)
        assert ranking.values.dtype == torch.float32
    assert torch.equal(rankings["mean"].values, rankings["mean"].mean_preference)
    wins = [sum(1.0 if s > 0 else 0.5 if s == 0 else 0.0 for s in row) - 0.5 for row in scores.tolist()]
    assert rankings["copeland"].values.tolist() == wins
    mix = rankings["von_neumann"].values.double()
    assert mix.sum().item() == pytest.approx(1, abs=1e-5)
    assert (mix >= 0).all()
    assert (mix @ (probabilities - 0.5) > -5e-6).all()  # nothing beats it


def test_a_ranking_round_trips_through_json():
    ranking = rank_scores(random_skew(4, seed=1), 0.1)
    assert isinstance(ranking, Ranking)
    assert ranking.cyclicity == cyclicity(ranking.scores)
    fields = ranking.to_dict()
    assert json.loads(json.dumps(fields)) == fields
    assert (fields.pop("ranking"), fields.pop("winner")) == (ranking.order, ranking.order[0])
    tensors = (ranking.values, ranking.mean_preference, ranking.scores, ranking.probabilities)
    for name, tensor in zip(("values", "mean_preference", "matrix", "probabilities"), tensors, strict=True):
        torch.testing.assert_close(torch.tensor(fields.pop(name)), tensor, rtol=6e-7, atol=0)  # seven digits
    assert not fields
    assert str(rank_scores(skew(0.1), 1.0).to_dict()["matrix"]) == "[[0.0, 0.1], [-0.1, 0.0]]"
    assert "-0.0" not in str(rank_scores(torch.tensor([[0.0, -0.0], [-0.0, -0.0]]), 0.1).to_dict())


@pytest.fixture(scope="module")
def gpm_directory(tmp_path_factory, chat_tokenizer):
    return save(lively_model(temperature=0.2), chat_tokenizer, tmp_path_factory.mktemp("gpm"))


@pytest.fixture(scope="module")
def ranker(gpm_directory):
    return pipeline("preference-ranking", model=str(gpm_directory), device="cpu")


INPUTS = [
    {"prompt": "How many?", "responses": ["One", "Two cats", "Three"]},
    {"prompt": [user("How many?")], "responses": ["One", [assistant("Two")]]},
    {"prompt": "Who?", "responses": ["I"]},
]


def test_the_pipeline_ranks_as_the_scorer_does(ranker, gpm_directory):
    scorer = PreferenceScorer.from_pretrained(gpm_directory, device="cpu")
    for method in METHODS:
        expected = [scorer.rank(**inputs, method=method).to_dict() for inputs in INPUTS]
        assert [ranker(inputs, method=method) for inputs in INPUTS] == ranker(INPUTS, method=method) == expected
    assert ranker(INPUTS[0]) == ranker(INPUTS[0], method="mean")
    told = pipeline("preference-ranking", scorer.model, tokenizer=scorer.tokenizer, device="cpu", method="copeland")
    assert told(INPUTS[0]) == ranker(INPUTS[0], method="copeland")
    assert told(INPUTS[0], method="mean") == ranker(INPUTS[0])


def test_the_pipeline_refuses_what_it_does_not_take(ranker, decoder):
    for inputs in ("How many?", {"prompt": "How many?"}, [["a", "b"]]):
        with pytest.raises(ValueError, match="Give a dictionary with `prompt` and `responses`"):
            ranker(inputs)
    with pytest.raises(ValueError, match="`batch_size` is 2"):
        ranker(INPUTS, batch_size=2)
    with pytest.raises(TypeError, match="top_k"):
        ranker(INPUTS[0], top_k=1)
    with pytest.raises(ValueError, match="`method` is 'borda'"):
        ranker(INPUTS[0], method="borda")
    with pytest.raises(ValueError, match="neither a general preference model nor a reward model"):
        pipeline("preference-ranking", model=str(decoder), device="cpu")


def test_a_ranking_prints_as_a_table_and_a_scorer_as_what_it_is(chat_tokenizer):
    scorer = PreferenceScorer(lively_model(), chat_tokenizer)
    ranking = scorer.rank("Which?", ["the first\nanswer " * 9, "second"])
    head, *lines = repr(ranking).splitlines()
    assert head.split() == ["rank", "beats", "another", "response"]
    best, worst = (line.split(maxsplit=2) for line in lines)
    assert (best[0], worst[0]) == ("1", "2")
    texts = {best[2], worst[2]}
    assert "second" in texts
    assert any(text.startswith("the first answer") and text.endswith("...") and len(text) <= 80 for text in texts)
    i, j = ranking.order
    assert (best[1], worst[1]) == tuple(f"{ranking.probabilities[pair].item():.1%}" for pair in ((i, j), (j, i)))
    assert "general preference model on qwen3, embedding_dim=4, reward_dim=0, tau=0.1, max_length=512" in repr(scorer)
    messages = scorer.rank([user("Which?")], [[assistant("one")], [assistant("two")]])
    assert {line.split()[-1] for line in repr(messages).splitlines()[1:]} == {"one", "two"}


def test_a_ranking_prints_what_scoring_takes(tokenizer):
    scorer = PreferenceScorer(lively_model(), tokenizer)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    shown = str(replace(scorer.rank("q", ["a", "b"]), responses=[[call], {"from": "gpt", "value": "told"}]))
    assert "'add'" in shown
    assert "told" in shown


def test_a_string_in_place_of_a_list_is_refused_beside_references_too(tokenizer):
    scorer = PreferenceScorer(lively_model(), tokenizer)
    for responses, references in ((["text"], [["b"]]), ([["a"]], ["text"])):
        with pytest.raises(ValueError, match="has a string for a prompt: give a list"):
            scorer.mean_preference(["q"], responses, references=references)


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_a_model_in_training_are_ranked_too(method):
    scores = torch.tensor([[0.0, 0.5, -0.25], [-0.5, 0.0, 1.0], [0.25, -1.0, 0.0]])
    half = scores.to(torch.bfloat16).requires_grad_()
    assert rank_scores(half, 1.0, method).order == rank_scores(scores, 1.0, method).order
