"""The estimate of memory and time: against measured steps, against numbers worked out by hand, and as a command."""

import copy
import json
import runpy
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from transformers import LlamaConfig

from gpm_trl.cli import estimate
from gpm_trl.cli.main import main as gpm_trl_main
from gpm_trl.estimate import (
    OPTIMIZERS,
    ModelShape,
    Sharding,
    decoding_seconds,
    forward_flops,
    make_batch,
    make_precision,
    sharding_buffers,
    sharding_traffic,
    training_flops,
    training_states,
)
from gpm_trl.models import GPMModelConfig

ROOT = Path(__file__).parent.parent
BENCHMARK = runpy.run_path(str(ROOT / "tests/benchmarks/estimate.py"))
# Those in float32 whose every activation is counted; the others depend on kernels, or on when what is freed.
COUNTED = ("padded", "packed", "longer", "deeper", "wider", "eager")
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate_configs")


@pytest.mark.parametrize("case", BENCHMARK["CASES"])
def test_peak_memory_is_what_a_training_step_allocates(case, tmp_path):
    measured, expected = BENCHMARK["measured_and_estimated"](case, tmp_path)
    assert expected == pytest.approx(measured, rel=0.05 if case.endswith(COUNTED) else 0.1)


def real_shape(name: str, is_policy: bool = True) -> ModelShape:
    return estimate.read_shape(estimate.build_model(copy.deepcopy(BENCHMARK["SIZES"][name]), None, is_policy))


# What the model cards say, to the parameter.
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("Gemma-2B", 2_506_172_416),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Gemma-2-27B", 27_227_128_320),
        ("Llama-3.1-70B", 70_553_706_496),
    ],
)
def test_parameters_of_real_sizes_are_exact(name, params):
    assert real_shape(name).params == params


def test_a_preference_model_has_heads_instead_of_the_language_models():
    config = BENCHMARK["SIZES"]["Llama-3.1-8B"]
    with_head, without = real_shape("Llama-3.1-8B"), real_shape("Llama-3.1-8B", is_policy=False)
    assert with_head.params - without.params == (config.vocab_size - 9) * config.hidden_size  # 2k + k = 6 + 3


def test_features_of_architectures_are_read():
    shapes = {name: real_shape(name) for name in ("Gemma-2-27B", "Llama-3.1-8B")}
    assert (shapes["Gemma-2-27B"].norms, shapes["Gemma-2-27B"].float32_norms) == (4, True)
    assert (shapes["Llama-3.1-8B"].norms, shapes["Llama-3.1-8B"].float32_norms) == (2, False)
    assert not shapes["Llama-3.1-8B"].normalizes_heads


SHAPE = ModelShape(64, 2, 4, 2, 16, 128, 259, params=1_000_000, linear_params=800_000)
ADAM = OPTIMIZERS["adamw_torch_fused"]


@pytest.mark.parametrize(
    ("sharding", "weights", "bytes_a_parameter"),
    [
        # weights, gradients, optimizer: Adam has two states, DeepSpeed a float32 copy as a third.
        (Sharding("single"), 4, (4, 4, 8)),
        (Sharding("single"), 2, (2, 2, 4)),
        (Sharding("ddp", 8), 2, (2, 2, 4)),
        (Sharding("zero", 8, stage=1), 2, (2, 2, 12 / 8)),
        (Sharding("zero", 8, stage=2), 2, (2, 2 / 8, 12 / 8)),
        (Sharding("zero", 8, stage=3), 2, (2 / 8, 2 / 8, 12 / 8)),
        (Sharding("zero", 8, stage=3), 4, (2 / 8, 2 / 8, 12 / 8)),
        (Sharding("zero", 8, 3, offloads_optimizer=True, offloads_weights=True), 2, (0, 0, 0)),
        (Sharding("fsdp2", 8, stage=3), 2, (4 / 8, 4 / 8, 8 / 8)),
    ],
)
def test_states_are_those_of_the_strategy(sharding, weights, bytes_a_parameter):
    states = training_states(SHAPE, 0, make_precision(sharding.backend, weights, mixed=True), sharding, ADAM)
    expected = [count * SHAPE.params for count in bytes_a_parameter]
    assert [states["weights"], states["gradients"], states["optimizer"]] == pytest.approx(expected)
    if sharding.offloads_weights:
        assert states["host"] == pytest.approx(16 / 8 * SHAPE.params)


def test_ddp_has_its_gradients_twice():
    assert sharding_buffers(SHAPE, make_precision("ddp", 2, mixed=True), Sharding("ddp", 8)) == 2 * SHAPE.params


def test_floating_point_operations_are_those_of_the_matrix_products():
    batch = make_batch(1, 2, 6, 4, packed=False)
    pairs = 2 * 10 * 10 / 2
    forward = 2 * 20 * SHAPE.linear_params + 4 * 2 * 4 * 16 * pairs + 2 * 8 * 259 * 64
    assert forward_flops(SHAPE, batch, logit_tokens=8) == forward
    assert training_flops(SHAPE, batch, checkpointing=False, logit_tokens=8) == 3 * forward
    assert training_flops(SHAPE, batch, checkpointing=True, logit_tokens=8) == 4 * forward


def test_packed_rows_have_each_prompt_once():
    packed, padded = (make_batch(3, 4, 100, 10, packed) for packed in (True, False))
    assert (packed.tokens, padded.tokens) == (3 * 140, 3 * 440)
    assert packed.key_tokens == 3 * (100 + 440)
    assert packed.query_keys == 3 * (100**2 / 2 + 4 * (100 * 10 + 10**2 / 2))


# Bytes a parameter, before the share of the others: gathered weights, and gradients, which a sum sends twice.
@pytest.mark.parametrize(
    ("sharding", "gradient_bytes", "reductions", "sent"),
    [
        (Sharding("zero", 8, stage=3), 2, 1, 2 * 2 + 2),
        (Sharding("zero", 8, stage=2), 2, 1, 2 * 2 + 2),
        (Sharding("zero", 8, stage=0), 2, 1, 2 * 2),
        (Sharding("ddp", 8), 4, 1, 2 * 4),
        (Sharding("zero", 8, stage=3), 2, 4, 4 * (2 * 2 + 2)),
        (Sharding("zero", 8, stage=2), 2, 4, 4 * 2 * 2 + 2),
        (Sharding("fsdp2", 8, stage=3), 4, 1, 2 * 2 + 4),
    ],
)
def test_what_is_sent_depends_on_what_is_divided(sharding, gradient_bytes, reductions, sent):
    precision = make_precision(sharding.backend, 2, mixed=True)
    traffic = sharding_traffic(SHAPE, precision, sharding, gradient_bytes, reductions, reductions)
    assert traffic == sent * SHAPE.params * 7 / 8


def test_sampling_reads_the_weights_for_each_token():
    assert decoding_seconds(SHAPE, 1, 0, 10, bandwidth=2e6) == pytest.approx(10, rel=1e-3)


@pytest.fixture(scope="module")
def preference_model(tmp_path_factory):
    """A configuration alone: no weights are needed."""
    directory = tmp_path_factory.mktemp("gpm")
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("accelerate_config", [None, "zero3", "ddp"])
def test_every_recipe_is_estimated(recipe, accelerate_config, preference_model, capsys):
    command = ["estimate", "--config", str(recipe), f"--model_name_or_path={preference_model}", "--price=2"]
    if "reward_model_path" in yaml.safe_load(recipe.read_text()):
        command.append(f"--reward_model_path={preference_model}")
    if recipe.name == "bt.yaml":
        command.append("--trainer=reward")
    if accelerate_config is not None:
        command.append(f"--accelerate_config={accelerate_config}")
    assert gpm_trl_main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Estimated, not measured.")
    assert "peak" in printed
    assert "GPU-hours" in printed
    assert "at 2 a GPU-hour" in printed


def report_of(*arguments: str):
    return BENCHMARK["estimated"](list(arguments), 64, 64)[1]


def test_what_saves_memory_does(preference_model):
    model = f"--model_name_or_path={preference_model}"
    plain = report_of(model, "--gradient_checkpointing=False").peak
    assert report_of(model).peak < plain
    assert report_of(model, "--gradient_checkpointing=False", "--use_peft=True").peak < plain
    assert report_of(model, "--gradient_checkpointing=False", "--per_device_train_batch_size=1").peak < plain


ACCUMULATING = "--gradient_accumulation_steps=4"
SYNC_EACH_BATCH = '--accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": true}}'
WHOLE = "gradients, whole until they are sent"


def test_fsdp2_accumulates_whole_gradients(preference_model):
    model, fsdp2 = f"--model_name_or_path={preference_model}", "--accelerate_config=fsdp2"
    run, report = BENCHMARK["estimated"]([model, fsdp2, ACCUMULATING], 64, 64)
    once, synced = report_of(model, fsdp2), report_of(model, fsdp2, ACCUMULATING, SYNC_EACH_BATCH)
    assert report.memory[WHOLE] == 4 * run.shape.params  # `GPMTrainer` has FSDP2 add up in float32
    assert WHOLE not in once.memory
    assert WHOLE not in synced.memory
    # Held throughout the backward pass, instead of what is divided.
    assert report.peak - synced.peak == pytest.approx(report.memory[WHOLE] - report.memory["gradients"])
    policy = [f"--reward_model_path={preference_model}", "--num_generations=4"]
    run, report = BENCHMARK["estimated"]([model, fsdp2, ACCUMULATING, *policy], 64, 64)
    assert report.memory[WHOLE] == 2 * run.shape.params


def sending(*arguments: str) -> float:
    return report_of(*arguments).seconds["sending"]


def test_gradients_are_sent_in_their_own_dtype(preference_model):
    ddp = (f"--model_name_or_path={preference_model}", "--accelerate_config=ddp")
    assert sending(*ddp, "--dtype=float32") == pytest.approx(2 * sending(*ddp, "--dtype=bfloat16"))


@pytest.mark.parametrize(
    ("accelerate_config", "times"), [("ddp", 1), ("zero2", (4 * 4 + 2) / 6), ("zero3", 4), ("fsdp2", (4 * 4 + 4) / 8)]
)
def test_accumulation_saves_sending_where_gradients_are_whole(accelerate_config, times, preference_model):
    command = (f"--model_name_or_path={preference_model}", f"--accelerate_config={accelerate_config}")
    assert sending(*command, ACCUMULATING) == pytest.approx(times * sending(*command))


@pytest.mark.parametrize("further", ["--pad_to_multiple_of=8", "--torch_compile=True", "--sft_loss_coef=0.1"])
def test_rows_are_padded_where_the_trainer_pads(further, preference_model):
    model = f"--model_name_or_path={preference_model}"
    assert report_of(model).batch.packed
    assert not report_of(model, further).batch.packed


def test_fp16_is_taken(preference_model, tmp_path):
    fp16 = (f"--model_name_or_path={preference_model}", "--dtype=float16")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fp16: true\nembedding_dim: 6\n")
    for given in (["--fp16", "true"], ["--fp16=True"], ["--fp16"], ["--config", str(recipe)]):
        run = BENCHMARK["estimated"]([*fp16, *given], 64, 64)[0]
        assert (run.training_args.fp16, run.training_args.bf16) == (True, False)
    assert BENCHMARK["estimated"]([*fp16, "--fp16=false"], 64, 64)[0].training_args.bf16


LORA = ("--use_peft=True", "--lora_r=8", "--lora_target_modules", "q_proj", "v_proj")


@pytest.mark.parametrize("policy", [False, True])
def test_an_adapter_is_what_is_trained(policy, preference_model, tmp_path):
    adapter = LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], inference_mode=True)
    adapter.base_model_name_or_path = str(preference_model)
    adapter.save_pretrained(tmp_path)
    further = [f"--reward_model_path={preference_model}"] if policy else []
    run, report = BENCHMARK["estimated"]([f"--model_name_or_path={tmp_path}", *further], 64, 64)
    as_new = [f"--model_name_or_path={preference_model}", *further, *LORA]
    new_run, new_report = BENCHMARK["estimated"](as_new, 64, 64)
    assert run.shape == new_run.shape
    assert 0 < run.shape.trained < run.shape.params / 2
    assert report.peak == new_report.peak


def test_an_adapters_heads_are_those_of_the_configuration_beside_it(preference_model, tmp_path):
    adapter = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["embedding_head", "scale_gate"])
    adapter.base_model_name_or_path = str(preference_model)
    adapter.save_pretrained(tmp_path)
    base = LlamaConfig.from_pretrained(preference_model)
    GPMModelConfig(text_config=base, embedding_dim=14).to_json_file(tmp_path / "config.json")
    shape = BENCHMARK["estimated"]([f"--model_name_or_path={tmp_path}"], 64, 64)[0].shape
    # Both layers' adapters of 32 x 32 maps, the embedding of 14 dimensions, and the gate of its 7 blocks.
    assert shape.trained == 2 * 8 * (32 + 32) + 32 * (14 + 7)


@pytest.mark.parametrize(("further", "reason"), [(LORA, "use_peft"), (("--trainer=reward",), "RewardTrainer")])
def test_an_adapter_that_would_not_be_trained_is_refused(further, reason, preference_model, tmp_path, capsys):
    adapter = LoraConfig(target_modules=["q_proj"])
    adapter.base_model_name_or_path = str(preference_model)
    adapter.save_pretrained(tmp_path)
    assert gpm_trl_main(["estimate", f"--model_name_or_path={tmp_path}", *further]) == 2
    assert reason in capsys.readouterr().err


def test_iterations_sample_and_train_apart(preference_model):
    models = [f"--model_name_or_path={preference_model}", f"--reward_model_path={preference_model}"]
    together, apart = report_of(*models), report_of(*models, "--iterations=3")
    assert together.memory["preference model"] == apart.memory["preference model, in sampling"] > 0
    assert apart.peak < together.peak


def test_tokens_of_a_batch_bound_its_prompts(preference_model):
    model = f"--model_name_or_path={preference_model}"
    assert report_of(model, "--max_tokens_per_batch=1000").items == 1000 // (3 * 64)


ERRORS = {
    "no model": ([], "model_name_or_path"),
    "a model that cannot be read": (["--model_name_or_path=meta-llama/none"], "config.json"),
    "a field that is not known": (["--model_name_or_path={model}", "--embeding_dim=4"], "embeding_dim"),
    "no such accelerate configuration": (["--model_name_or_path={model}", "--accelerate_config=zero9"], "zero9"),
    "GPUs that machines do not share": (
        ["--model_name_or_path={model}", "--num_processes=8", "--num_machines=3"],
        "8 GPUs",
    ),
    "an optimizer of unknown memory": (["--model_name_or_path={model}", "--optim=adafactor"], "adafactor"),
    "one response": (["--model_name_or_path={model}", "--responses=1"], "at least 2 responses"),
    "no length": (["--model_name_or_path={model}", "--max_length=None"], "prompt_tokens"),
    "a batch too small": (["--model_name_or_path={model}", "--max_tokens_per_batch=9"], "max_tokens_per_batch"),
    "no file": (["--config", "none.yaml"], "none.yaml"),
    "no GPUs": (["--model_name_or_path={model}", "--num_processes=0"], "`--num_processes` is 0"),
    "no machines": (["--model_name_or_path={model}", "--num_machines=0"], "`--num_machines` is 0"),
    "no prompt": (["--model_name_or_path={model}", "--prompt_tokens=0"], "`--prompt_tokens` is 0"),
    "no response": (["--model_name_or_path={model}", "--response_tokens=0"], "`--response_tokens` is 0"),
    "no use of the GPU": (["--model_name_or_path={model}", "--mfu=0"], "`--mfu` is 0"),
    "more use than there is": (["--model_name_or_path={model}", "--mfu=40"], "at most 1"),
    "no link": (["--model_name_or_path={model}", "--link_bandwidth=0"], "`--link_bandwidth` is 0"),
    "no batch": (
        ["--model_name_or_path={model}", "--per_device_train_batch_size=0"],
        "`per_device_train_batch_size` is 0",
    ),
    "no batch of GPO": (
        ["--model_name_or_path={model}", "--reward_model_path={model}", "--per_device_train_batch_size", "0"],
        "`per_device_train_batch_size` is 0",
    ),
    "rows that are too long": (
        ["--model_name_or_path={model}", "--prompt_tokens=3000", "--response_tokens=3000"],
        "`max_length` leaves 2048",
    ),
    "completions that are too long": (
        ["--model_name_or_path={model}", "--reward_model_path={model}", "--response_tokens=3000"],
        "`max_completion_length` leaves",
    ),
    "prompts that are cut": (
        [
            *("--model_name_or_path={model}", "--reward_model_path={model}", "--max_completion_length=64"),
            *("--max_length=128", "--prompt_tokens=65"),
        ],
        "leaves 64",
    ),
    "prefixes that cannot be shared": (
        ["--model_name_or_path={model}", "--shared_prefix=true", "--pad_to_multiple_of=8"],
        "`shared_prefix` is True",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_estimated_is_said_in_one_line(name, preference_model, capsys):
    arguments, reason = ERRORS[name]
    assert gpm_trl_main(["estimate", *(part.format(model=preference_model) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpm-trl estimate: error: ")
    assert error.count("\n") == 1
    assert reason in error


def test_what_is_not_timed_is_said(preference_model, capsys):
    models = [f"--model_name_or_path={preference_model}", f"--reward_model_path={preference_model}"]
    assert gpm_trl_main(["estimate", *models, "--use_vllm=True", "--vllm_mode=server"]) == 0
    printed = capsys.readouterr().out
    assert "not timed: sampling" in printed
    assert "sampling (a lower bound)" not in printed
    assert gpm_trl_main(["estimate", models[0], "--accelerate_config=zero3_offload"]) == 0
    assert "not timed: moving what is offloaded" in capsys.readouterr().out


def test_experts_are_refused(preference_model, tmp_path, capsys):
    config = json.loads((preference_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mixtral", "num_local_experts": 4}))
    assert gpm_trl_main(["estimate", f"--model_name_or_path={tmp_path}"]) == 2
    assert "experts" in capsys.readouterr().err


def test_tables_of_the_document_are_those_of_the_calculator(capsys):
    BENCHMARK["tables"]()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    document = (ROOT / "docs/scaling.md").read_text()
    assert len(printed) > 15
    assert [line for line in printed if line not in document] == []


def test_a_recipe_that_may_be_of_two_trainers_is_not_guessed(capsys):
    recipe = ROOT / "recipes" / "gemma-2b-it" / "bt.yaml"
    assert gpm_trl_main(["estimate", "--config", str(recipe)]) == 2
    assert "`--trainer gpm` or `--trainer reward`" in capsys.readouterr().err
