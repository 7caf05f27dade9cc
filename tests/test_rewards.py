"""PreferenceReward: its numbers against references, on one rank and two, in TRL's trainers, and under ZeRO-3."""

import copy
import itertools
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, CHAT_TEMPLATE, assistant, byte_tokenizer, tiny_model, tiny_reward_model, user
from datasets import Dataset
from launching import launch, sharding_config
from rewards_run import QUICK
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as deepspeed_integration
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from gpm_trl import PreferenceScorer
from gpm_trl.data.renderer import EncodedGroup
from gpm_trl.gpo import reward as rewards_module
from gpm_trl.gpo.reward import PreferenceReward
from gpm_trl.models.loading import whole_models
from gpm_trl.preference import preference_matrix

SCRIPT = Path(__file__).with_name("rewards_run.py")
PROMPTS = ["What is it?", "Why?", "What is it?", "Why?", "What is it?", "Why?", "Why?"]
COMPLETIONS = ["a thing", "because", "nothing", "", "a thing", "no idea at all", "because"]


@pytest.fixture
def scorer(model, tokenizer):
    return PreferenceScorer(model, tokenizer)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """With a preference model, `gpm`, a reward model, `bt`, and a policy."""
    directory = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(directory / "gpm")
    tiny_reward_model().save_pretrained(directory / "bt")
    AutoModelForCausalLM.from_config(BACKBONES["llama"]).save_pretrained(directory / "policy")
    for name in ("gpm", "bt", "policy"):
        byte_tokenizer().save_pretrained(directory / name)
    return directory


def slow_rewards(scorer: PreferenceScorer, prompts: list, completions: list, signal: str) -> list[float]:
    """One completion after another, each embedded alone, in float64 and by the definitions."""
    vectors, gates = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        (embedded,) = scorer.embed([prompt], [[completion]])
        vectors.append(embedded.embeddings[0].double().tolist())
        gates.append(embedded.scales.double().tolist())
    rewards = []
    for i, prompt in enumerate(prompts):
        terms = []
        for j in [j for j, other in enumerate(prompts) if other == prompt]:
            v, w = vectors[i], vectors[j]
            blocks = zip(gates[i], v[::2], v[1::2], w[::2], w[1::2], strict=True)
            s = sum(gate * (v_even * w_odd - v_odd * w_even) for gate, v_even, v_odd, w_even, w_odd in blocks)
            terms.append(s / scorer.temperature)
        if signal == "probability":
            terms = [1 / (1 + math.exp(-term)) for term in terms]
        rewards.append(sum(terms) / len(terms))
    return rewards


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["score", "probability"])
def test_rewards_are_those_of_the_definitions(scorer, signal):
    rewards = PreferenceReward(scorer, signal=signal)(PROMPTS, COMPLETIONS)
    assert rewards == pytest.approx(slow_rewards(scorer, PROMPTS, COMPLETIONS, signal), abs=1e-5)
    assert all(isinstance(reward, float) for reward in rewards)
    assert max(rewards) - min(rewards) > 0.1


def test_equal_completions_get_equal_rewards(scorer):
    rewards = PreferenceReward(scorer)(["Q"] * 4, ["a", "b", "a", "a"])
    assert rewards[0] == rewards[2] == rewards[3] != rewards[1]
    assert PreferenceReward(scorer)(["Q"] * 3, ["a"] * 3) == [0, 0, 0]
    assert PreferenceReward(scorer)(["Q"], ["a"]) == [0]
    assert PreferenceReward(scorer)([], []) == []


def test_conversations(model, chat_tokenizer):
    scorer = PreferenceScorer(model, chat_tokenizer)
    prompts = [[user(prompt)] for prompt in PROMPTS]
    completions = [[assistant(completion)] for completion in COMPLETIONS]
    rewards = PreferenceReward(scorer)(prompts, completions)
    assert rewards == pytest.approx(slow_rewards(scorer, prompts, completions, "score"), abs=1e-5)
    assert rewards != pytest.approx(PreferenceReward(scorer)(PROMPTS, COMPLETIONS), abs=1e-2)


def test_columns_for_the_template_are_passed_to_it(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ mood }}{{ tools | length if tools else '' }}" + CHAT_TEMPLATE
    scorer = PreferenceScorer(model, tokenizer)
    prompts, completions = [[user("Q")]] * 4, [[assistant(text)] for text in "abcd"]
    arguments = [{"mood": "happy"}, {"mood": "sad"}] * 2
    tools = [[{"name": "t"}]] * 4
    reward = PreferenceReward(scorer)
    rewards = reward(prompts, completions, chat_template_kwargs=arguments, tools=tools, answer=[1, 2, 3, 4])
    for first, given in enumerate(arguments[:2]):  # equal messages, but two prompts
        (expected,) = scorer.mean_preference(prompts[:1], [completions[first::2]], [{**given, "tools": tools[0]}])
        assert rewards[first::2] == expected.tolist()
    assert reward(prompts, completions) != pytest.approx(rewards, abs=1e-3)


def test_rewards_of_a_reward_model_are_less_their_mean(directory):
    reward = PreferenceReward(directory / "bt")
    rewards = reward(["Q"] * 4, ["a", "bb", "", "d d"])
    embedded = reward.scorer.embed(["Q"], [["a", "bb", "", "d d"]])[0].embeddings[:, 0]
    assert rewards == pytest.approx((embedded - embedded.mean()).tolist(), abs=1e-5)
    assert reward.__name__ == "bt"


def test_log_odds_are_those_of_consecutive_completions(scorer):
    reward = PreferenceReward(scorer)
    prompts = ["Q"] * 3 + ["R"] * 3 + ["Q"] * 3
    completions = ["a", "b", "", "c", "d", "e", "f", "g", "a"]
    log_odds = reward.log_odds(prompts, completions, 3)
    assert (log_odds.shape, log_odds.dtype, log_odds.requires_grad) == ((3, 3, 3), torch.float32, False)
    assert torch.equal(log_odds, -log_odds.transpose(-1, -2))
    groups = [completions[start : start + 3] for start in (0, 3, 6)]
    expected = torch.stack(scorer.matrix(["Q", "R", "Q"], groups)) / scorer.temperature
    torch.testing.assert_close(log_odds, expected, atol=1e-5, rtol=0)
    assert reward(prompts[:6], completions[:6]) == pytest.approx(log_odds[:2].mean(-1).flatten().tolist(), abs=1e-5)


@pytest.mark.parametrize(("prompts", "size"), [(["Q"] * 5, 2), (["Q", "R", "R", "Q"], 2), (["Q"] * 4, 0), ([], 2)])
def test_log_odds_of_incomplete_or_mixed_groups_are_refused(scorer, prompts, size):
    with pytest.raises(ValueError, match=r"do not make groups|another prompt"):
        PreferenceReward(scorer).log_odds(prompts, ["a"] * len(prompts), size)


# --- Long rows -------------------------------------------------------------------------------------------------------


def test_long_prompts_are_cut_as_the_scorer_cuts_them(model, tokenizer):
    reward = PreferenceReward(model, tokenizer, max_length=40)
    prompts, completions = ["0123456789" * 6] * 3 + ["short"], ["a" * 15, "", "ccc", "d"]
    scorer = PreferenceScorer(model, tokenizer, max_length=40, long_rows="truncate_prompt")
    (expected,) = scorer.mean_preference(prompts[:1], [completions[:3]])
    assert reward(prompts, completions)[:3] == expected.tolist()


@pytest.mark.parametrize("length", [60, 10])
def test_a_long_completion_leaves_the_prompt_half_of_the_row(model, tokenizer, length):
    reward = PreferenceReward(model, tokenizer, max_length=40)
    prompt, completions = ("0123456789" * 6)[:length], ["a" * 35, "bb"]
    ids = tokenizer(prompt).input_ids
    kept = ids[-20:]
    bodies = [tokenizer(text, add_special_tokens=False).input_ids for text in completions]
    rows = [[*body[: 40 - len(kept) - 1], tokenizer.eos_token_id] for body in bodies]
    embedded = PreferenceScorer(model, tokenizer).embed_encoded([EncodedGroup(kept, rows, False)])[0]
    expected = preference_matrix(*embedded).mean(-1) / reward.scorer.temperature
    assert reward([prompt] * 2, completions) == pytest.approx(expected.tolist(), abs=1e-6)


def test_long_rows_of_a_reward_model_are_cut_from_the_left(directory):
    reward = PreferenceReward(directory / "bt", max_length=20)
    texts = ["x" * 30 + "yes", "yes"]
    rewards = reward(["0123456789"] * 2, texts)
    row = reward.scorer.tokenizer("0123456789" + texts[0]).input_ids
    ids = [*row[-19:], reward.scorer.tokenizer.eos_token_id]
    other = [*reward.scorer.tokenizer("0123456789yes").input_ids, reward.scorer.tokenizer.eos_token_id]
    with torch.no_grad():
        first, second = (reward.scorer.model(torch.tensor([row])).logits.item() for row in (ids, other))
    assert rewards == pytest.approx([(first - second) / 2, (second - first) / 2], abs=1e-5)


def test_cutting_is_said_once(model, tokenizer, caplog):
    reward = PreferenceReward(model, tokenizer, max_length=41)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            reward(["Q" * 60] * 2, ["a", "b"])
            reward(["Q"] * 2, ["a", "b"])
    assert len([record for record in caplog.records if "more than 41 tokens" in record.message]) == 1


def test_nothing_is_cut_where_that_is_not_wanted(model, tokenizer):
    reward = PreferenceReward(model, tokenizer, max_length=40, long_rows="error")
    with pytest.raises(ValueError, match=r"Completion 1 of rank 0 .*'QQQ.*more than `max_length` = 40"):
        reward(["Q", "Q" * 60], ["a", "b"])


# --- What is taken and what is refused -------------------------------------------------------------------------------


def test_the_model_is_frozen_in_evaluation_mode_and_named(directory, tokenizer):
    model = tiny_model().train()
    for reward in (PreferenceReward(directory / "gpm"), PreferenceReward(model, tokenizer)):
        assert not any(parameter.requires_grad for parameter in reward.scorer.model.parameters())
        assert not any(module.training for module in reward.scorer.model.modules())
        reward(["Q"] * 2, ["a", "b"])
        assert all(parameter.grad is None for parameter in reward.scorer.model.parameters())
    assert PreferenceReward(f"{directory}/gpm/").__name__ == "gpm"
    assert PreferenceReward(PreferenceScorer.from_pretrained(directory / "gpm")).__name__ == "gpm"
    assert reward.__name__ == "PreferenceReward"


@pytest.mark.parametrize(
    "option", [{"max_length": 5}, {"batch_tokens": 5}, {"long_rows": "error"}, {"processing_class": byte_tokenizer()}]
)
def test_what_a_scorer_has_already_is_refused(scorer, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} would be ignored"):
        PreferenceReward(scorer, **option)


def test_lists_that_do_not_match_are_refused(scorer):
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        PreferenceReward(scorer)(["a", "b"], ["c"])


def test_embeddings_that_are_not_finite_are_refused_by_name(model, tokenizer):
    with torch.no_grad():
        model.embedding_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^Completion 0 of rank 0, 'first' to 'Q1'"):
        PreferenceReward(model, tokenizer)(["Q1", "Q2"], ["first", "second"])


def test_scores_that_are_not_finite_are_refused_by_name(tokenizer):
    reward = PreferenceReward(tiny_model(temperature=1e-300), tokenizer)
    for call in (reward, lambda *texts: reward.log_odds(*texts, num_generations=2)):
        with pytest.raises(ValueError, match=r"^Completion 0 of rank 0, 'a' to 'Q'. A score of response 0"):
            call(["Q", "Q"], ["a", "b"])


def test_a_partitioned_model_is_refused_with_a_remedy(model, tokenizer):
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="give `PreferenceReward` its path"):
        PreferenceReward(model, tokenizer)


class Zero3Config:
    config = {}

    def is_zero3(self):
        return True


def test_models_are_loaded_whole_under_zero3_and_fsdp(directory, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    config = Zero3Config()
    deepspeed_integration.set_hf_deepspeed_config(config)
    try:
        with whole_models():
            assert not deepspeed_integration.is_deepspeed_zero3_enabled()
            assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        assert deepspeed_integration.is_deepspeed_zero3_enabled()
        with pytest.raises(OSError):
            PreferenceReward(directory / "nothing")
        assert deepspeed_integration.is_deepspeed_zero3_enabled()
        assert PreferenceReward(directory / "gpm").scorer.model.embedding_head.weight.numel() > 0
        assert deepspeed_integration.deepspeed_config() is config.config
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    finally:
        deepspeed_integration.unset_hf_deepspeed_config()


# --- In trainers -----------------------------------------------------------------------------------------------------


class Recording(PreferenceReward):
    def __call__(self, prompts, completions, **kwargs):
        rewards = super().__call__(prompts, completions, **kwargs)
        self.calls = [*getattr(self, "calls", []), (prompts, completions, rewards)]
        return rewards


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "conversational"),
    [(GRPOTrainer, GRPOConfig, True), (RLOOTrainer, RLOOConfig, False)],
)
def test_trainers_of_trl_train_on_it(trainer_class, config_class, conversational, directory, chat_tokenizer, tmp_path):
    reward = Recording(directory / "gpm", chat_tokenizer)
    args = config_class(str(tmp_path), per_device_train_batch_size=8, num_generations=4, **QUICK)
    questions = [f"Question {index}" for index in range(6)]
    rows = Dataset.from_list([{"prompt": [user(text)] if conversational else text} for text in questions])
    policy = AutoModelForCausalLM.from_pretrained(directory / "policy")
    before = copy.deepcopy(policy.state_dict())
    trainer = trainer_class(policy, reward, args, rows, processing_class=chat_tokenizer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "rewards/gpm/mean" in log]
    assert len(logs) == len(reward.calls) == 2
    for log, (prompts, completions, rewards) in zip(logs, reward.calls, strict=True):
        assert log["rewards/gpm/mean"] == pytest.approx(0, abs=1e-5)
        assert log["rewards/gpm/std"] == pytest.approx(torch.tensor(rewards).std().item(), rel=1e-4)
        assert log["rewards/gpm/std"] > 0.1
        groups = [completions[start : start + 4] for start in (0, 4)]
        expected = reward.scorer.mean_preference(prompts[::4], groups)
        assert rewards == pytest.approx(torch.cat(expected).tolist(), abs=1e-5)
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


# --- Several processes -----------------------------------------------------------------------------------------------

GROUPED = {"prompts": ["Q"] * 4 + ["R"] * 4 + ["S"] * 4, "completions": ["a", "b", "", "a", *"cdeffghi"]}
LONG = {"prompts": ["0123456789" * 6] * 4, "completions": ["a", "bb", "c" * 12, "d"]}
DUPLICATES = {"prompts": ["Q"] * 6, "completions": ["a", "b", "c", "a", "cc", "b"]}
CASES = {
    "straddling": {**GROUPED, "bounds": [0, 6, 12], "num_generations": 4},
    "probability": {**GROUPED, "bounds": [0, 6, 12], "options": {"signal": "probability"}},
    "uneven": {**GROUPED, "bounds": [0, 3, 12], "num_generations": 4, "options": {"batch_tokens": 8}},
    "none": {**GROUPED, "bounds": [0, 0, 12], "num_generations": 4},
    "apart": {"prompts": PROMPTS, "completions": COMPLETIONS, "bounds": [0, 4, 7]},
    "duplicates": {**DUPLICATES, "bounds": [0, 3, 6], "num_generations": 6, "options": {"batch_tokens": 3}},
    "long": {**LONG, "bounds": [0, 2, 4], "num_generations": 4, "options": {"max_length": 40}},
    "long on the first": {**LONG, "bounds": [0, 3, 4], "num_generations": 4, "options": {"max_length": 40}},
}


def run(launcher: str | None, directory: Path, mode: str) -> list[dict]:
    config = sharding_config(launcher, directory) if launcher else None
    finished = launch(config, SCRIPT, directory, mode)
    assert finished.returncode == 0, finished.stderr
    count = 2 if launcher else 1
    return [json.loads(path.read_text()) for path in sorted(directory.glob(f"{mode}_*_of_{count}.json"))]


@pytest.fixture(scope="module")
def one_and_two(directory):
    (directory / "cases.json").write_text(json.dumps(CASES))
    return [run(launcher, directory, "score") for launcher in (None, "ddp")]


@pytest.mark.multiprocess
def test_two_ranks_score_like_one(one_and_two):
    (one,), two = one_and_two
    assert [report["world_size"] for report in two] == [2, 2]
    for name, case in CASES.items():
        parts = [report["rewards"][name] for report in two]
        assert [len(part) for part in parts] == [end - start for start, end in itertools.pairwise(case["bounds"])]
        assert [*parts[0], *parts[1]] == pytest.approx(one["rewards"][name], abs=5e-6), name
        assert max(one["rewards"][name]) - min(one["rewards"][name]) > 0.1
        if "num_generations" in case:
            assert two[0]["log_odds"][name] == two[1]["log_odds"][name]
            first, second = torch.tensor(one["log_odds"][name]), torch.tensor(two[0]["log_odds"][name])
            assert first.shape[1:] == (case["num_generations"],) * 2
            torch.testing.assert_close(second, first, atol=5e-6, rtol=0)
    rewards = [*two[0]["rewards"]["duplicates"], *two[1]["rewards"]["duplicates"]]
    assert (rewards[0], rewards[1]) == (rewards[3], rewards[5])


def test_equal_completions_of_two_ranks_have_one_embedding():
    """Ranks batch them with others, so that their last bits may differ."""
    first, second, other = [0.6, 0.8], [0.60000002, 0.79999998], [1.0, 0.0]
    ranks = [[(b"p", b"a", first, [1.0])], [(b"p", b"b", other, [1.0]), (b"p", b"a", second, [1.0])]]
    batch = rewards_module._join(ranks)
    assert torch.equal(batch.embeddings, torch.tensor([first, other, first]))
    assert batch.local == slice(0, 1)


@pytest.mark.multiprocess
def test_an_error_on_one_rank_is_raised_on_both(one_and_two):
    _, two = one_and_two
    for name, part in {
        "nan": "Completion 1 of rank 1, '~' to 'R'",
        "long": "Completion 0 of rank 0",
        "uneven": "1 prompts and 2 completions",
        "mixed": "Completion 1 of all ranks has another prompt",
        "not whole": "2 completions on all ranks do not make groups of 3",
    }.items():
        assert two[0][name] == two[1][name]
        assert part in two[0][name]


def check_sharded(reports: list[dict], name: str, reference: PreferenceReward) -> None:
    """That ranks made equally many passes, and scored as one process does."""
    expected = reference(["Q"] * 5, ["a" * (i + 1) for i in range(5)])
    assert [report[name]["rewards"] for report in reports] == [[], pytest.approx(expected, abs=1e-5)]
    first, second = (report[name]["passes"] for report in reports)
    assert first == second >= 3


@pytest.mark.multiprocess
def test_a_model_in_fsdp_shards(one_and_two, tokenizer):
    check_sharded(one_and_two[1], "fsdp", PreferenceReward(tiny_model(), tokenizer))


@pytest.mark.multiprocess
def test_zero3_on_two_ranks(directory, tokenizer):
    reports = run("zero3", directory, "zero3")
    assert [report["world_size"] for report in reports] == [2, 2]
    logs = [log for log in reports[0]["log_history"] if "rewards/gpm/mean" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["rewards/gpm/mean"] == pytest.approx(0, abs=1e-5)
        assert log["rewards/gpm/std"] > 0.1
    whole = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert [report["sizes"] for report in reports] == [[whole, 0]] * 2
    assert all("give `PreferenceReward` its path" in report["refused"] for report in reports)
    check_sharded(reports, "zero3", PreferenceReward(directory / "gpm"))
