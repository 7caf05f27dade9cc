"""GPOConfig: its defaults and where they come from, and the values that it refuses."""

import dataclasses
import fnmatch
import inspect
import logging
import re
from pathlib import Path

import pytest
import trl
from packaging.version import Version
from transformers import HfArgumentParser
from trl import GRPOConfig
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from gpm_trl import GPMConfig, GPOConfig
from gpm_trl.gpm.config import IGNORED as GPM_IGNORED
from gpm_trl.gpo import trainer as gpo_trainer
from gpm_trl.gpo.config import IGNORED
from gpm_trl.preference import LOSS_TYPES

CPU = {"output_dir": "output", "use_cpu": True, "bf16": False, "report_to": "none"}


def config(**settings):
    return GPOConfig(**{**CPU, **settings})


# --- Defaults --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_authors_run():
    args = config()
    assert (args.loss_type, args.pairing, args.length_normalize) == ("gpo", "all", False)
    assert (args.num_generations, args.temperature, args.top_p, args.max_completion_length) == (5, 0.7, 0.9, 2048)
    assert (args.beta, args.learning_rate, args.optim) == (0.001, 5e-7, "rmsprop")
    assert (args.lr_scheduler_type, args.warmup_steps, args.num_train_epochs) == ("linear", 0.1, 1)
    assert (args.sync_ref_model, args.ref_model_sync_steps, args.ref_model_mixup_alpha) == (True, None, 1.0)


@pytest.mark.parametrize(
    ("loss_type", "num_generations", "beta"),
    [("gpo", 5, 0.001), ("sppo", 5, 0.001), ("sigmoid", 2, 0.1), ("ipo", 2, 0.1), ("rebel", 5, 0.1)],
)
def test_defaults_depend_on_the_loss(loss_type, num_generations, beta):
    args = config(loss_type=loss_type, per_device_train_batch_size=10)
    assert (args.num_generations, args.beta) == (num_generations, beta)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, True),
        ({"num_train_epochs": 3}, False),
        ({"num_train_epochs": 3, "sync_ref_model": False}, True),
        ({"ref_model_sync_steps": 10}, False),
        ({"dsppo_iteration": 2}, False),
        ({"dsppo_lambda": 0.5}, False),
        ({"max_steps": 100}, False),  # of how many epochs, the data say
    ],
)
def test_dsppo_that_would_read_rewards_alone_says_so(settings, told, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpm_trl"), "propagate", True)
    config(loss_type="dsppo", **settings)
    assert ("DSPPO reads no cycles" in caplog.text) == told


def test_every_new_field_and_every_changed_default_is_documented():
    parents = {item.name: item for item in dataclasses.fields(GRPOConfig)}
    for item in dataclasses.fields(GPOConfig):
        if item.name not in parents or item.default != parents[item.name].default:
            listed = rf"\n        ([a-z_]+, )?{item.name}( \(|, [a-z_]+:|:)|`{item.name}`"
            assert re.search(listed, GPOConfig.__doc__), item.name


def test_every_field_has_a_help_text():
    own = inspect.get_annotations(GPOConfig)
    assert all(item.metadata["help"] for item in dataclasses.fields(GPOConfig) if item.name in own)


def test_the_command_line_sets_every_field():
    parser = HfArgumentParser(GPOConfig)
    arguments = "--output_dir x --use_cpu --loss_type ipo --beta 0.1 0.2 --num_generations 4 --max_new_tokens 9 "
    arguments += "--missing_eos_penalty 1 --length_normalize --pairing best_worst --report_to none --score_clip 2"
    (args,) = parser.parse_args_into_dataclasses(arguments.split())
    found = (args.loss_type, args.betas(), args.num_generations, args.max_completion_length)
    assert found == ("ipo", [0.1, 0.2], 4, 9)
    found = (args.missing_eos_penalty, args.length_normalize, args.pairing, args.score_clip)
    assert found == (1, True, "best_worst", 2)


@pytest.mark.parametrize(
    ("beta", "betas"), [(0.5, [0.5]), ([0.5], [0.5]), ([0.5, 0.25], [0.5, 0.25]), ((0.5, 0.25), [0.5, 0.25])]
)
def test_beta_is_a_number_or_one_for_each_epoch(beta, betas):
    assert config(beta=beta).betas() == betas


@pytest.mark.parametrize(
    ("size", "num_generations", "accumulation", "steps"),
    [(8, 4, 1, 1), (4, 5, 1, 5), (1, 3, 1, 3), (6, 4, 1, 2), (4, 5, 2, 10), (8, 4, 3, 3), (3, 2, 4, 4)],
)
def test_batches_generated_together_hold_whole_groups(size, num_generations, accumulation, steps):
    settings = {"num_generations": num_generations, "gradient_accumulation_steps": accumulation}
    args = config(per_device_train_batch_size=size, **settings)
    assert args.steps_per_generation == steps
    assert args.generation_batch_size % num_generations == 0
    assert steps % accumulation == 0


# --- OnlineDPOConfig -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(OnlineDPOConfig) if item.init])
def test_every_field_of_online_dpo_is_accepted_with_its_default(name):
    others = OnlineDPOConfig(**CPU)
    # The pair that OnlineDPOConfig has by default; each field alone would meet other defaults.
    lengths = {"max_new_tokens": others.max_new_tokens, "max_length": others.max_length}
    value = getattr(others, name)
    args = config(**{"loss_type": "sigmoid", **lengths, name: value})
    assert getattr(args, name) == value


def documented(heading):
    """The first table after some words on the page of GPO: the cells of each line by the first."""
    page = (Path(__file__).parent.parent / "docs" / "gpo_trainer.md").read_text()
    _, _, *lines = page.split(heading)[1].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): others for first, *others in cells}


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="the page is about TRL 1.16")
def test_the_page_lists_the_defaults_that_differ_from_online_dpo_and_its_other_metrics():
    settings = {"output_dir": "output", "use_cpu": True, "report_to": "none"}
    configs = OnlineDPOConfig(**settings), GPOConfig(**settings)
    pairs = {item.name: [getattr(each, item.name) for each in configs] for item in dataclasses.fields(OnlineDPOConfig)}
    differ = {name: [getattr(one, "value", one) for one in pair] for name, pair in pairs.items() if pair[0] != pair[1]}
    shown = documented("Defaults that differ")
    assert {name: [f"`{value!r}`" for value in pair] for name, pair in differ.items()} == {
        name: [re.match("`[^`]+`", cell)[0] for cell in cells] for name, cells in shown.items()
    }
    metrics = set(re.findall(r'self\.stats\["([^"]+)"\]', inspect.getsource(OnlineDPOTrainer)))
    source = inspect.getsource(gpo_trainer)
    assert set(documented("that are not logged")) == {name for name in metrics if f'"{name}"' not in source}


@pytest.mark.parametrize(
    ("num_generations", "num_generations_eval", "size"), [(2, None, 8), (5, None, 5), (5, 4, 8), (16, None, 16)]
)
def test_evaluation_batches_hold_whole_groups_by_default(num_generations, num_generations_eval, size):
    settings = {"num_generations": num_generations, "num_generations_eval": num_generations_eval}
    assert config(eval_strategy="epoch", **settings).per_device_eval_batch_size == size
    assert config(per_device_eval_batch_size=80, **settings).per_device_eval_batch_size == 80


def test_pairs_of_an_evaluation_are_in_the_batch_of_one_process(monkeypatch):
    def size(loss_type, given=None):
        args = config(loss_type=loss_type, num_generations=4, per_device_train_batch_size=4, eval_strategy="epoch")
        args.num_generations_eval, args.per_device_eval_batch_size = 16, given
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "4")
            args._check_batches()
        return args.per_device_eval_batch_size

    assert (size("gpo"), size("sigmoid"), size("gpo", given=4)) == (8, 16, 4)
    with pytest.raises(ValueError, match=r"is 8, which cuts groups of the 16 .* make it a multiple of 16"):
        size("sigmoid", given=8)
    with pytest.raises(ValueError, match=r"`num_generations_eval` is 1, .* at least 2"):
        config(num_generations_eval=1)


# --- Bad values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "`num_generations` is 1, but .* sample at least 2"),
        ({"loss_type": "grpo"}, "`loss_type` is 'grpo'; choose one of .*'rebel'"),
        ({"pairing": "worst"}, "`pairing` is 'worst'; choose one of .*'best_worst'"),
        ({"beta": 0.0}, "`beta` is 0.0, but must be positive and finite"),
        ({"beta": float("nan")}, "`beta` is nan, but must be positive"),
        ({"beta": [0.1, 0.0]}, r"`beta` is \[0.1, 0.0\], but must be positive"),
        ({"beta": []}, r"`beta` is \[\], but must be .* a list with one an epoch"),
        ({"beta": "0.1"}, "`beta` is '0.1', but must be positive"),
        ({"ref_model_sync_steps": 0}, "`ref_model_sync_steps` is 0, but an iteration has a step"),
        ({"score_clip": 0.0}, "`score_clip` is 0.0, but must be positive .* leave it out"),
        ({"missing_eos_penalty": -1.0}, "`missing_eos_penalty` is -1.0, but must be positive"),
        ({"ref_model_mixup_alpha": 1.5}, r"`ref_model_mixup_alpha` is 1.5; choose it in \(0, 1\]"),
        ({"sync_ref_model": False, "ref_model_sync_steps": 5}, "`ref_model_sync_steps` is 5, but would be ignored"),
        (
            {"max_new_tokens": 64, "max_completion_length": 512},
            "`max_new_tokens` is 64 and `max_completion_length` 512, which are two names of one option: leave out one",
        ),
        ({"max_completion_length": None}, "`max_completion_length` is None: give the most tokens of a completion"),
        ({"max_length": 2048}, "`max_length` is 2048 and `max_completion_length` 2048, .* raise the first or lower"),
        (
            {"per_device_train_batch_size": 4, "num_generations": 5, "steps_per_generation": 2},
            "8 completions are generated together, .* `num_generations` = 5: .* a multiple of 20",
        ),
        (
            {"per_device_train_batch_size": 8, "num_generations": 3, "loss_type": "rebel"},
            "= 8 is not a multiple of `num_generations` = 3: make it 9",
        ),
    ],
)
def test_bad_values_are_refused_with_the_value_the_rule_and_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("config_class", [GPOConfig, GPMConfig])
def test_options_that_would_be_ignored_are_refused_one_by_one(config_class):
    table = IGNORED if config_class is GPOConfig else GPM_IGNORED
    defaults = vars(config_class(**CPU))
    patterns = [pattern for patterns in table.values() for pattern in patterns.split()]
    assert len(patterns) == len(set(patterns))
    names = {name for pattern in patterns for name in fnmatch.filter(defaults, pattern)}  # TRL before 1.16 lacks some
    assert len(names) >= len(set(patterns) & set(defaults)) > 5
    for name in names:
        default = defaults[name]
        value = not default if isinstance(default, bool) else "group_by_length" if isinstance(default, str) else 0.75
        with pytest.raises(ValueError, match=f"`{name}` is .*, but would be ignored: .* Leave it out"):
            config_class(**CPU, **{name: value})


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_config_may_be_made_from_the_values_of_another(loss_type):
    args = config(loss_type=loss_type, per_device_train_batch_size=10)
    values = {item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.init}
    del values["generation_batch_size"]  # which GRPOConfig takes from `steps_per_generation`
    again = GPOConfig(**values)
    for name in ("beta", "num_generations", "steps_per_generation"):
        assert getattr(again, name) == getattr(args, name)
