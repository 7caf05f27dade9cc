"""A hybrid reward-cyclic model through everything that a general preference model goes through."""

import json
import math

import pytest
import torch
from conftest import byte_tokenizer, lively_model, tiny_model
from datasets import Dataset
from matplotlib.colors import to_hex
from peft import LoraConfig
from test_convert import save_reward_model
from test_gpm_trainer import K_WAY, QUICK, SGD
from test_gpo_trainer import tiny_policy

from gpm_trl import GPMConfig, GPMTrainer, GPOConfig, GPOTrainer, PreferenceReward, PreferenceScorer
from gpm_trl.gpo.judges import check_parts
from gpm_trl.plots import plot_embedding_discs
from gpm_trl.preference import block_scores, dsppo_weights
from gpm_trl_cli import main

HRC = {"embedding_dim": 2, "reward_dim": 1}
ROW = {"prompt": "Red?", "responses": ["r", "gg", "bbb", "gg"]}


def trained(directory, model, peft_config=None, **settings):
    """Two steps on rows of several responses, with soft labels; saved."""
    trainer = GPMTrainer(
        model,
        GPMConfig(str(directory), **{**QUICK, **SGD, **HRC, **settings}),
        Dataset.from_list(K_WAY),
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def test_packed_is_padded_and_a_saved_adapter_is_the_trained_model_and_merges(tmp_path, decoder):
    scored = []
    for name, shared in (("packed", True), ("padded", False)):
        trainer = trained(tmp_path / name, str(decoder), shared_prefix=shared)
        assert (trainer.model.config.kind, trainer.model.config.temperature) == ("hybrid reward-cyclic model", 0.1)
        scored.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert scored[0] == pytest.approx(scored[1], abs=1e-4)
    trainer = trained(tmp_path / "lora", str(decoder), LoraConfig(r=2))
    expected = PreferenceScorer(trainer.model, byte_tokenizer()).rank(ROW["prompt"], ROW["responses"])
    assert main(["merge", str(tmp_path / "lora"), str(tmp_path / "merged"), "--device", "cpu"]) == 0
    for directory in ("lora", "merged"):
        ranking = PreferenceScorer.from_pretrained(tmp_path / directory, "cpu").rank(ROW["prompt"], ROW["responses"])
        for part in ("scores", "transitive", "cyclic"):
            torch.testing.assert_close(getattr(ranking, part), getattr(expected, part), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [HRC, {"embedding_dim": 4}, {"embedding_dim": 0, "reward_dim": 1}], ids=str)
def test_parts_are_those_of_the_blocks_and_written_if_asked_for(tmp_path, settings, capsys):
    model = lively_model(**settings)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    scorer = PreferenceScorer(model, byte_tokenizer())
    ranking = scorer.rank(ROW["prompt"], ROW["responses"])
    ((embeddings, scales),) = scorer.embed([ROW["prompt"]], [ROW["responses"]])
    rewards = embeddings[:, 0] if settings.get("reward_dim") else torch.zeros(4)
    assert torch.equal(ranking.transitive, rewards[:, None] - rewards)
    blocks = block_scores(embeddings, scales)[..., settings.get("reward_dim", 0) :]
    torch.testing.assert_close(ranking.cyclic, blocks.sum(-1), rtol=0, atol=1e-6)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    for name, options in (("plain", []), ("parts", ["--parts"])):
        files = ["--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / name)]
        assert main(["score", "--model", str(tmp_path / "model"), *files, *options]) == 0
    plain, parts = (json.loads((tmp_path / name).read_text()) for name in ("plain", "parts"))
    assert parts.keys() - plain.keys() == {"transitive", "cyclic"}
    for name in ("transitive", "cyclic"):
        torch.testing.assert_close(torch.tensor(parts.pop(name)), getattr(ranking, name), rtol=0, atol=1e-6)
    assert parts == plain
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROW, "cyclic": 1}) + "\n")
    files[-1] = str(tmp_path / "refused")
    assert main(["score", "--model", str(tmp_path / "model"), *files, "--parts"]) == 2
    assert "cyclic, which the output would overwrite" in capsys.readouterr().err


def test_rewards_are_bars_beside_the_discs():
    embeddings = [[2.0, 1.0, 1.0, 0.0], [-1.0, 1.0, 0.0, 1.0], [0.5, 1.0, -1.0, 0.0]]
    bars, disc = plot_embedding_discs(embeddings, [1.0, 0.7], "ABC", reward_dim=1).axes
    assert [bar.get_width() for bar in bars.patches] == [2.0, -1.0, 0.5]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["A", "B", "C"]
    assert (bars.get_title(), disc.get_title()) == ("reward r", "block 1, λ = 0.7")
    assert len([text for text in disc.texts if text.arrow_patch]) == 2  # A > B > C
    (alone,) = plot_embedding_discs([[2.0, 1.0], [0.0, 1.0]], labels="AB", reward_dim=1).axes
    assert to_hex(alone.patches[0].get_facecolor()) == to_hex(bars.patches[0].get_facecolor())


def test_a_reward_model_is_the_start_of_a_hybrid_model(tmp_path, capsys):
    """Its rewards are there; the cyclic part and the gate are new, and are trained."""
    source = save_reward_model(tmp_path / "rm")
    assert main(["convert", str(source), str(tmp_path / "hrc"), "--from-bt", "--embedding_dim", "4"]) == 0
    assert "hybrid reward-cyclic model, embedding_dim 4, reward_dim 1, with a scale gate" in capsys.readouterr().out
    bt, hrc = (PreferenceScorer.from_pretrained(directory, "cpu") for directory in (source, tmp_path / "hrc"))
    assert (hrc.temperature, hrc.renderer.max_length) == (1.0, 512)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        output = hrc.model(ids, prompt_lengths=torch.tensor([2, 2]))
        torch.testing.assert_close(output.embeddings[:, :1], bt.model(ids).logits)
    assert hrc.model.embedding_head.weight[1:].std() > 0 < hrc.model.scale_gate.weight.std()
    before = hrc.model.embedding_head.weight.detach().clone()
    trained(tmp_path / "trained", hrc.model, embedding_dim=4)
    assert (hrc.model.embedding_head.weight != before).any(1).all()


# DSPPO


@pytest.mark.parametrize("strength", [-2.0, 0.0, 1.0])
def test_the_weights_of_the_parts_follow_their_schedule(strength):
    for t in (1, 2, 3, 100):
        assert dsppo_weights(t, strength) == pytest.approx((1 + strength * t**-0.5, 1 - strength * t**-0.5))
    for bad in ((0, 1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="t counts from 1, and lambda must be finite"):
            dsppo_weights(*bad)


def dsppo_trainer(tmp_path, model, tokenizer, policy, **settings):
    rows = [{"prompt": f"p{index}", "completions": ["a", "bb", "a c"]} for index in range(4)]
    arguments = {**QUICK, **SGD, "num_generations": 3, "per_device_train_batch_size": 12, "loss_type": "dsppo"}
    arguments |= {"bf16": False, "shuffle_dataset": False, "max_completion_length": 6, **settings}
    return GPOTrainer(
        policy,
        reward_funcs=PreferenceReward(model, tokenizer),
        args=GPOConfig(str(tmp_path), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({}, [0, 1, 2, 3]),  # an epoch is a step, of 4 prompts
        ({"ref_model_sync_steps": 2}, [0, 0, 1, 1]),
        ({"sync_ref_model": False}, [0, 0, 0, 0]),
    ],
    ids=str,
)
def test_dsppo_weights_the_parts_of_its_judge_by_the_updates_of_the_reference(tmp_path, tokenizer, settings, updates):
    """In float64 from the judge's parts: sigmoid of the weighted log-odds, t counted from `dsppo_iteration`."""
    judge = lively_model(**HRC)
    arguments = {"max_steps": 4, "dsppo_iteration": 2, "dsppo_lambda": 0.5, "learning_rate": 1e-4, **settings}

    def signals(checkpoint=None):
        saving = {"save_strategy": "steps", "save_steps": 3}
        trainer = dsppo_trainer(tmp_path, judge, tokenizer, tiny_policy(), **saving, **arguments)
        seen, signal = [], trainer.signal
        trainer.reward_funcs[0] = lambda **columns: seen.append(signal(**columns)) or seen[-1]
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.create_model_card()
        return seen

    scorer = PreferenceScorer(judge, tokenizer)
    rankings = [scorer.rank(f"p{index}", ["a", "bb", "a c"]) for index in range(4)]
    whole = signals()
    for values, number in zip(whole, updates, strict=True):
        shift = 0.5 / math.sqrt(2 + number)
        expected = []
        for ranking in rankings:
            weighted = (1 + shift) * ranking.transitive.double() + (1 - shift) * ranking.cyclic.double()
            expected += (torch.sigmoid(weighted / scorer.temperature).mean(-1) - 0.5).tolist()
        assert max(map(abs, expected)) > 0.01
        assert values == pytest.approx(expected, abs=1e-5)
    assert signals(str(tmp_path / "checkpoint-3")) == whole[3:]
    assert "arxiv.org/abs/2605.17342" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("settings", [{"embedding_dim": 4}, {"embedding_dim": 0, "reward_dim": 1}], ids=str)
def test_dsppo_needs_a_judge_with_both_parts(tmp_path, tokenizer, settings):
    model = tiny_model(**settings)
    with pytest.raises(ValueError, match=f"a {model.config.kind}: give a hybrid reward-cyclic model, or take .sppo"):
        dsppo_trainer(tmp_path, model, tokenizer, tiny_policy())
    with pytest.raises(ValueError, match="is a function: give a hybrid"):
        check_parts([len])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sppo", "dsppo_lambda": 1.0}, "are not of 'sppo': leave them out"),
        ({"loss_type": "gpo", "dsppo_iteration": 3}, "are not of 'gpo': leave them out"),
        ({"loss_type": "dsppo", "dsppo_lambda": math.inf}, "lambda must be finite"),
        ({"loss_type": "dsppo", "dsppo_iteration": 0}, "t counts from 1"),
    ],
)
def test_options_of_dsppo_out_of_range_or_of_no_use_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GPOConfig("output", use_cpu=True, **settings)
    defaults = GPOConfig("output", use_cpu=True, loss_type="dsppo")
    assert (defaults.dsppo_lambda, defaults.beta) == (1.0, 0.001)
