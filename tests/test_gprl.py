"""GPRLTrainer: GRPO with one block, the drift monitor, a planted hack, and what a user does."""

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import TRAINING, lively_model, tiny_reward_model
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer

from gpm_trl import GPRLConfig, GPRLTrainer, PreferenceReward
from gpm_trl.gprl import DriftMonitor
from gpm_trl.preference import block_advantages
from gpm_trl_cli import main as gpm_trl_main

QUICK = {**TRAINING, "max_steps": 4, "num_generations": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
QUICK |= {"max_completion_length": 8}
PROMPTS = Dataset.from_list([{"prompt": f"Question {index}"} for index in range(8)])
SETTINGS = {"threshold": 0.1, "shares": "scores", "baseline_steps": 2, "smoothing": 0.0}
SETTINGS |= {"weight_speed": 2.0, "beta_speed": 1.5, "limit": 4.0}

planted_trainer = runpy.run_path(str(Path(__file__).parents[1] / "recipes/drift_monitor/run.py"))["make_trainer"]


def judge(tokenizer, **settings):
    return PreferenceReward(lively_model(**settings), tokenizer)


def vowels(completions, **columns):
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in completions]


# --- Configuration and judges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rewards": "group"}, "`scale_rewards` is 'group', but each block is normalised already"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "each block is normalised already: leave it out"),
        ({"drift_threshold": 0.0}, "`drift_threshold` is 0.0 .* must be positive, or None"),
        ({"drift_threshold": math.nan}, "`drift_threshold` is nan"),
        ({"drift_baseline_steps": 0}, "`drift_baseline_steps` is 0, but must be at least 1"),
        ({"drift_smoothing": 1.0}, r"`drift_smoothing` 1.0, but .* in \[0, 1\)"),
        ({"drift_weight_speed": 0.9}, "`drift_weight_speed` is 0.9, but must be at least 1"),
        ({"drift_beta_speed": math.inf}, "`drift_beta_speed` is inf, but must be at least 1, and finite"),
        ({"drift_limit": 0.1}, "`drift_limit` is 0.1, but must be at least 1"),
        ({"drift_shares": "blocks"}, "`drift_shares` is 'blocks'; choose one of .*'scores'"),
        ({"beta": 0.0}, "`beta` is 0: for `drift_beta_speed` = 1.1 to act"),
        ({"drift_threshold": None, "drift_limit": 2.0}, "`drift_limit` is 2.0, but would be ignored: there is no mon"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1, but would be ignored"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPRLConfig(str(tmp_path), use_cpu=True, **options)


def test_a_monitor_is_left_out_and_beta_may_then_be_0(tmp_path):
    args = GPRLConfig(str(tmp_path), use_cpu=True, drift_threshold=None, beta=0.0, scale_rewards=False)
    assert (args.scale_rewards, args.bf16, args.num_generations, args.max_completion_length) == ("none", False, 8, 512)
    GPRLConfig(str(tmp_path), use_cpu=True, beta=0.0, drift_beta_speed=1.0)


@pytest.mark.parametrize("given", ["function", "Bradley-Terry", "reward model", "two"])
def test_judges_without_blocks_or_too_many_are_refused(given, decoder, chat_tokenizer, tmp_path):
    bradley_terry = {"reward_dim": 1, "embedding_dim": 0}
    reward_funcs = {
        "function": lambda: vowels,
        "Bradley-Terry": lambda: [judge(chat_tokenizer, **bradley_terry), vowels],
        "reward model": lambda: PreferenceReward(tiny_reward_model(), chat_tokenizer),
        "two": lambda: [judge(chat_tokenizer), judge(chat_tokenizer)],
    }[given]()
    with pytest.raises(ValueError, match=f"{2 if given == 'two' else 0} are general preference models: give one"):
        GPRLTrainer(str(decoder), reward_funcs, GPRLConfig(str(tmp_path), **QUICK), PROMPTS)


def test_completions_in_the_data_are_refused(decoder, tmp_path):
    rows = PROMPTS.map(lambda row: {"completions": ["a"] * 4})
    with pytest.raises(ValueError, match="`train_dataset` has `completions`"):
        GPRLTrainer(str(decoder), vowels, GPRLConfig(str(tmp_path), **QUICK), rows)


def test_columns_with_names_of_gpo_go_to_a_function(decoder, chat_tokenizer, tmp_path):
    told = []

    def scored(completions, scores, **kwargs):
        told.append(scores)
        return [0.0] * len(completions)

    rows = PROMPTS.map(lambda row, index: {"scores": [index]}, with_indices=True)
    args = GPRLConfig(str(tmp_path), **QUICK | {"reward_weights": [1.0, 0.0], "max_steps": 1})
    GPRLTrainer(str(decoder), [judge(chat_tokenizer), scored], args, rows).train()
    assert told
    assert all(len(values) == 1 for values in told[0])


# --- The advantages --------------------------------------------------------------------------------------------------


def run(trainer_class, config_class, decoder, reward_funcs, directory, **options):
    args = config_class(str(directory), **QUICK | options)
    trainer = trainer_class(str(decoder), reward_funcs, args, PROMPTS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a function"])
def test_with_one_block_it_is_grpo_on_the_preference_reward(beside, decoder, chat_tokenizer, tmp_path):
    """Beside a function of weight 0, too; padded, since packed rows are not shuffled, and so others are sampled."""
    model = judge(chat_tokenizer, embedding_dim=2)
    scaling = {"beta": 0.04, "scale_rewards": "group"}
    expected = run(GRPOTrainer, GRPOConfig, decoder, model, tmp_path / "grpo", **scaling)
    functions, weights = ([model, vowels], [1.0, 0.0]) if beside else (model, None)
    options = {"reward_weights": weights, "shared_prefix": False}
    found = run(GPRLTrainer, GPRLConfig, decoder, functions, tmp_path / "gprl", **options)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (expected, found)]
    assert max(map(abs, losses[0])) > 1e-4
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    before = load_file(decoder / "model.safetensors")
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=0, atol=1e-6)
    assert any(not torch.equal(found.model.state_dict()[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("settings", [{}, {"reward_dim": 1, "embedding_dim": 2}], ids=["GPM", "HRC"])
def test_a_model_of_several_blocks_trains_and_logs_them(settings, decoder, chat_tokenizer, tmp_path):
    options = {"drift_baseline_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2}
    args = GPRLConfig(str(tmp_path), **QUICK | options)
    trainer = GPRLTrainer(
        str(decoder), [judge(chat_tokenizer, **settings), vowels], args, PROMPTS, eval_dataset=PROMPTS
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.monitor.num_seen == len(logs) == 4  # evaluation is not looked at
    assert all(sum(entry[f"drift/share_{block}"] for block in (1, 2)) == pytest.approx(1) for entry in logs)
    assert ["drift/kl" in entry for entry in logs] == [False, False, True, True]
    assert logs[0]["beta"] == pytest.approx(0.04)
    assert any("eval_reward" in entry for entry in trainer.state.log_history)
    # What the parent gets is the sum over the blocks, with m.
    trainer.model.eval()
    trainer.monitor.penalties = [4.0, 1.0]
    texts = (["Why?"] * 4, ["Yes.", "No", "so", "?"])
    blocks, scales = trainer.judge.block_log_odds(*texts, 2)
    expected = block_advantages(blocks, scales, torch.tensor([0.25, 1.0])).sum(-1).flatten().tolist()
    assert trainer.reward_funcs[0](*texts, log_metric=None) == expected != [0.0] * 4
    assert trainer.reward_func_names == ["PreferenceReward", "vowels"]


# --- The drift monitor -----------------------------------------------------------------------------------------------


def watched(powers: list[list[float]], **settings) -> tuple[DriftMonitor, list[dict[str, float]]]:
    """A monitor that was fed with blocks of which the mean squares of u are `powers`, and what it logged."""
    monitor, logs = DriftMonitor(len(powers[0]), **SETTINGS | settings), []
    for values in powers:
        roots = torch.tensor(values).sqrt()
        blocks = torch.stack([roots, -roots])[:, None].expand(2, 2, -1)[None]  # u = +- the roots, (1, 2, 2, k)
        logs.append({})
        monitor.update(blocks, torch.ones(1, len(values)), logs[-1].__setitem__)
    return monitor, logs


def test_drift_is_the_divergence_of_the_shares_and_what_grew_is_lowered():
    monitor, logs = watched([[1.0, 3.0], [3.0, 1.0], [9.0, 1.0]])
    assert logs[1]["drift/share_1"] == pytest.approx(0.5)
    share, floor = 0.9, 1e-3
    share = (share + floor) / (1 + 2 * floor)
    expected = share * math.log(share / 0.5) + (1 - share) * math.log((1 - share) / 0.5)
    assert "drift/kl" not in logs[1]
    assert logs[2]["drift/kl"] == pytest.approx(expected)
    assert (logs[2]["drift/weight_1"], logs[2]["drift/weight_2"], monitor.beta_scale) == (0.5, 1.0, 1.5)


def test_it_goes_no_further_than_the_limit_and_comes_back():
    steps = [[1.0, 1.0]] * 2 + [[9.0, 1.0]] * 5
    monitor, _ = watched(steps)
    assert (monitor.weights.tolist(), monitor.beta_scale) == ([0.25, 1.0], 4.0)
    monitor, _ = watched([*steps, [1.0, 1.0]])
    assert (monitor.weights.tolist(), monitor.beta_scale) == ([0.5, 1.0], pytest.approx(4 / 1.5))
    monitor, _ = watched(steps + [[1.0, 1.0]] * 6)
    assert (monitor.weights.tolist(), monitor.beta_scale) == ([1.0, 1.0], 1.0)


def test_below_the_threshold_and_with_an_infinite_one_it_only_watches():
    for settings in ({"threshold": 1.0}, {"threshold": math.inf}):
        monitor, logs = watched([[1.0, 1.0]] * 2 + [[9.0, 1.0]] * 3, **settings)
        assert logs[-1]["drift/kl"] > 0.1
        assert (monitor.weights.tolist(), monitor.beta_scale) == ([1.0, 1.0], 1.0)


def test_shares_of_zero_are_finite_and_equal_completions_say_nothing():
    monitor, logs = watched([[0.0, 1.0]] * 2 + [[1.0, 0.0], [0.0, 0.0]])
    assert monitor.num_seen == 3
    assert logs[3]["drift/kl"] == logs[2]["drift/kl"] > 5
    assert all(map(math.isfinite, [*monitor.shares, *monitor.weights.tolist()]))
    monitor, logs = watched([[0.0, 0.0]])
    assert (monitor.num_seen, "drift/kl" in logs[0]) == (0, False)


def test_smoothing_is_an_exponential_mean_from_the_baseline():
    monitor, _ = watched([[1.0, 1.0]] * 2 + [[1.0, 0.0]], smoothing=0.75)
    assert monitor.shares[0] == pytest.approx(0.75 * 0.5 + 0.25, abs=1e-3)


@pytest.mark.parametrize("shares", ["weighted", "unweighted"])
def test_shares_of_normalised_parts_see_a_block_only_where_it_is_flat(shares):
    """What is normalised has the same variance whatever the policy does, unless it has none."""
    monitor, _ = watched([[1.0, 1.0]] * 2 + [[1e4, 1.0]], shares=shares)
    assert monitor.drift < 1e-6
    monitor, _ = watched([[1.0, 1.0]] * 2 + [[1.0, 0.0]], shares=shares)
    assert monitor.drift > 0.5


def test_shares_of_weighted_parts_have_the_weights_in_them():
    monitor, _ = watched([[1.0, 1.0]] * 2 + [[1.0, 0.0], [1.0, 1.0]], shares="weighted")
    assert monitor.shares[0] == pytest.approx(0.2, abs=1e-3)  # m_1 = 1/2


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Weights, logs, shares and beta, while the monitor acts."""
    options = {"max_steps": 10, "learning_rate": 2e-3, "per_device_train_batch_size": 16, "save_strategy": "steps"}
    options |= {"save_steps": 6, "drift_baseline_steps": 2}
    whole = planted_trainer(tmp_path, **options)
    whole.train()
    assert whole.monitor.beta_scale > 1
    for restores in (False, True):
        resumed = planted_trainer(tmp_path, **options, restore_callback_states_from_checkpoint=restores)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
        assert resumed.monitor.state() == whole.monitor.state()
        assert resumed.beta == whole.beta == 0.04 * whole.monitor.beta_scale
        names = ("loss", "drift/kl", "drift/weight_1", "beta", "kl")
        logs = [[[entry.get(name) for name in names] for entry in one.state.log_history] for one in (whole, resumed)]
        assert logs[1][:10] == logs[0][:10]
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], weight)


def test_a_generation_that_is_sampled_again_after_a_resume_is_counted_once(tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "steps_per_generation": 2, "save_strategy": "steps"}
    options |= {"save_steps": 3, "drift_baseline_steps": 1}
    whole = planted_trainer(tmp_path, **options)
    whole.train()
    resumed = planted_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.monitor.state() == whole.monitor.state()
    assert whole.monitor.num_seen == 2


def test_a_checkpoint_without_a_monitor_is_resumed_with_one(tmp_path):
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    none = {name: GPRLConfig.__dataclass_fields__[name].default for name in ("drift_baseline_steps",)}
    none |= {"drift_threshold": None, "drift_weight_speed": 1.1}
    planted_trainer(tmp_path, **options, **none).train()
    resumed = planted_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.monitor.num_seen == 1


def test_a_run_does_not_go_on_with_a_monitor_of_other_blocks():
    state = TrainerState(stateful_callbacks={"DriftMonitor": DriftMonitor(2, **SETTINGS).state()})
    with pytest.raises(ValueError, match="of 2 blocks, and this one 3: resume with the same"):
        DriftMonitor(3, **SETTINGS).on_train_begin(None, state, None)


@pytest.mark.slow
def test_a_planted_hack_is_caught_and_is_not_without_the_monitor(tmp_path):
    """The policy falls for the letter A that one block rewards, unless the monitor acts."""
    logs = {}
    for name, threshold in (("watched", math.inf), ("corrected", 0.05)):
        trainer = planted_trainer(tmp_path, drift_threshold=threshold, max_steps=40)
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    hacked, corrected = ([entry["rewards/letter/mean"] for entry in logs[name][-10:]] for name in logs)
    assert min(hacked) > 0.9
    assert max(corrected) < 0.5
    assert max(entry.get("drift/kl", 0) for entry in logs["watched"][:20]) > 0.1
    assert min(entry["drift/weight_1"] for entry in logs["corrected"]) == pytest.approx(0.1)
    assert max(entry["beta"] for entry in logs["corrected"]) > 0.1


# --- From start to end -----------------------------------------------------------------------------------------------


def command(decoder, directory, reward_model, *more):
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    options = {"model_name_or_path": decoder, "reward_model_path": reward_model, "use_cpu": True, "report_to": "none"}
    options |= {"dataset_name": directory / "prompts.jsonl", "output_dir": directory / "out", "max_steps": 2}
    options |= {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6}
    options |= {"save_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 1}
    return ["gprl", *(f"--{name}={value}" for name, value in options.items()), *more]


def test_the_command_trains_and_its_card_cites_the_paper(decoder, gpm, tmp_path, capsys):
    assert gpm_trl_main(command(decoder, tmp_path, gpm, "--drift_threshold=0.2")) == 0
    printed = capsys.readouterr().out
    assert f"Model saved to {tmp_path / 'out'}." in printed
    assert "drift/share_2" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"GPRL.*General Preference Reinforcement Learning.*2605\.18721", card, re.DOTALL)
    assert "author  = {Umer and Mohsin and Bilal" in card
    assert "- gprl" in card
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["DriftMonitor"]["attributes"]["num_seen"] == 2
