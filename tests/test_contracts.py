"""
What is relied on of TRL, transformers, accelerate, PEFT and DeepSpeed that they do not document, one line each.

When a new version fails here: read the entry's last column, see in the library's source what became of the name, mend
that file of ours, then this line, and try both ends of the admitted versions (`make test-lowest test-latest`). A name
that is used and not listed fails, and so does one that is listed and no longer used.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import trl
from packaging.version import Version

import gpm_trl
from gpm_trl import GPMTrainer, GPOTrainer, GPRLTrainer

LIBRARIES = ("trl", "transformers", "accelerate", "peft", "deepspeed")
# Of these, public names are taken as documented.
DOCUMENTED = {*LIBRARIES, "transformers.utils", "accelerate.utils"}
PACKAGE = Path(gpm_trl.__file__).parent
getsource = functools.cache(inspect.getsource)

# What our classes override, methods and flags: a parent has each, and ours takes the parameters of the parent's.
OVERRIDDEN = {
    "gpm_trl.cli.training.TrainingParser": "set_defaults_with_config",
    "gpm_trl.gpm.trainer.GPMTrainer": (
        "_get_grad_norm _init_training_state _maybe_log_save_evaluate _prepare_dataset _push_from_checkpoint _save "
        "_save_checkpoint _save_rng_state _tag_names compute_loss create_model_card evaluation_loop log train "
        "training_step"
    ),
    "gpm_trl.gpo.trainer.GPOTrainer": (
        "_calculate_rewards _compute_loss _generate_and_score_completions _generate_single_turn _get_grad_norm "
        "_get_train_sampler _init_training_state _load_from_checkpoint _load_optimizer_and_scheduler "
        "_maybe_log_save_evaluate _name _paper _prepare_inputs _save_checkpoint _save_optimizer_and_scheduler "
        "_save_rng_state _tag_names _tokenize_prompts log train training_step "
        "_get_per_token_logps_and_entropies compute_loss evaluation_loop"
    ),
    "gpm_trl.gprl.trainer.GPRLTrainer": (
        "_get_grad_norm _get_train_sampler _init_training_state _maybe_log_save_evaluate _name _paper "
        "_save_checkpoint _save_rng_state _tag_names train training_step "
        "_get_per_token_logps_and_entropies _prepare_inputs compute_loss"
    ),
    "gpm_trl.gprl.drift_monitor.DriftMonitor": "on_train_begin state",
    "gpm_trl.gpo.reference.ReferenceUpdate": "on_epoch_begin on_step_begin on_train_begin",
    "gpm_trl.evaluation.callback.EvaluationCallback": "on_evaluate",
    "gpm_trl.models.modeling_gpm.GPMForPreference": (
        "_auto_class _init_weights _keep_in_fp32_modules_strict _skip_keys_device_placement from_pretrained "
        "_supports_attention_backend _supports_flash_attn _supports_flex_attn _supports_sdpa save_pretrained"
    ),
    "gpm_trl.models.configuration_gpm.GPMModelConfig": "_auto_class from_dict",
    "gpm_trl.pipeline.PreferenceRankingPipeline": (
        "_forward _load_feature_extractor _load_image_processor _load_processor _load_tokenizer _sanitize_parameters "
        "get_iterator postprocess preprocess"
    ),
}

# Name, what is assumed, the file to mend. Assumed is that it is there (""), that the source of its class or module has
# it ("source"), what it is set to ("= ..."), its first parameters ("(...") or what it returns ("-> ...").
USED = [
    ("argparse.ArgumentParser._actions", "source", "cli/arguments.py: those of subcommands"),
    ("argparse.ArgumentParser._option_string_actions", "source", "cli: the options there are"),
    ("argparse._SubParsersAction", "", "cli/arguments.py: subcommands"),
    ("trl.GRPOTrainer._buffered_inputs", "= None", "gpo/shared_prefix.py, gpo/layers.py: a generation's batches"),
    ("trl.GRPOTrainer._generate", "-> prompt_ids, completion_ids, tool_mask, completions", "gpo/layers.py: unpacked"),
    ("trl.GRPOTrainer._generate_single_turn", "-> completion_ids, logprobs", "gpo/layers.py: gives given completions"),
    ("trl.GRPOTrainer._get_per_token_logps_and_entropies", "(self, model", "gpo: called with four more"),
    ("trl.GRPOTrainer._is_vlm", "source", "gpo/shared_prefix.py, gpo/trainer.py: whether there are images"),
    ("trl.GRPOTrainer._metrics", '= {"train": defaultdict(list), "eval": defaultdict(list)}', "gpo"),
    ("trl.GRPOTrainer._step", "= 0", "gpo/shared_prefix.py, gpo/layers.py: where in a generation a run is"),
    ("trl.GRPOTrainer._tokenize_prompts", "-> prompt_ids, images, multimodal_fields", "gpo/trainer.py: unpacked"),
    ("trl.RewardTrainer._tag_names", "", "gpm/model_card.py: the card's tags"),
    ("trl.models.prepare_deepspeed", "(model, accelerator", "gpo/reference.py and gpo/reward.py"),
    ("trl.models.prepare_fsdp", "(model, accelerator", "gpo/reference.py"),
    ("trl.trainer.callbacks.SyncRefModelCallback", "", "gpo/reference.py: mixes the policy into the reference"),
    ("trl.trainer.callbacks.SyncRefModelCallback.sync_target_model", "(model, target_model", "gpo/reference.py"),
    ("trl.trainer.utils.RepeatSampler", "(data_source, mini_repeat_count, batch_size, repeat_count", "gpo/layers.py"),
    ("trl.trainer.utils.add_fused_lm_head", "(model, temperature, cast_lm_head_to_fp32", "gpo/reference.py"),
    (
        "trl.trainer.utils.create_model_from_path",
        "(model_id, architecture, kwargs",
        "gpm/preparation.py, gpo/trainer.py",
    ),
    ("trl.trainer.utils.disable_dropout_in_model", "(model", "gpo/reference.py"),
    ("trl.trainer.utils.get_callable_name", "(func", "gpo/judges.py, gprl: a reward function's name in the logs"),
    ("trl.trainer.utils.get_config_model_id", "(config", "gpm, gpo, gprl: where a model is from"),
    ("trl.trainer.utils.start_event_loop_in_daemon", "(name", "gpo/judges.py: runs asynchronous functions"),
    ("trl.trainer.utils.split_tensor_dict", "(tensor_dict, num_chunks", "gpo/shared_prefix.py"),
    ("trl.trainer.utils.use_adapter", "(model, adapter_name", "gpo/layers.py: samples of the reference"),
    ("transformers.PreTrainedConfig._attn_implementation", "", "models/shared_prefix: what attention it has"),
    ("transformers.PreTrainedModel._keys_to_ignore_on_load_missing", "", "models/modeling_gpm.py: the LM head"),
    ("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected", "", "models/modeling_gpm.py: the LM head"),
    ("transformers.PreTrainedModel._tied_weights_keys", "", "models/modeling_gpm.py: a tied LM head"),
    ("transformers.Trainer._get_output_dir", "(self, trial", "saving.py: where checkpoints are"),
    (
        "transformers.Trainer._init_training_state",
        "-> epochs_trained, steps_trained_in_current_epoch",
        "saving.py, gpo/layers.py",
    ),
    ("transformers.Trainer._signature_columns", "= None", "gpm/trainer.py: columns that are kept"),
    ("transformers.Trainer.loss_is_scaled_for_ga", "source", "gpm/trainer.py: says that the loss is"),
    ("transformers.core_model_loading._weight_conversions", "source", "models/loading.py: undone in saving"),
    ("transformers.dynamic_module_utils.custom_object_save", "(obj, folder, config", "models/modeling_gpm.py"),
    ("transformers.dynamic_module_utils.get_class_from_dynamic_module", "(class_reference", "models/loading.py"),
    ("transformers.integrations.get_reporting_integration_callbacks", "(report_to", "cli/training.py: are they there"),
    ("transformers.integrations.deepspeed", "", "models/loading.py: hides ZeRO-3 from `from_pretrained`"),
    ("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", "", "models/loading.py: hides ZeRO-3"),
    ("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", "(", "gpo/reference.py"),
    ("transformers.integrations.flash_attention.get_target_dtype", "(query, module", "models/shared_prefix"),
    ("transformers.integrations.is_fsdp_enabled", "(", "models/loading.py, gpm/trainer.py"),
    ("transformers.integrations.sdpa_attention.repeat_kv", "(hidden_states, n_rep", "models/shared_prefix"),
    ("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS", "", "models/shared_prefix/attention.py"),
    ("transformers.modeling_flash_attention_utils._flash_attention_forward", "(query_states", "models/shared_prefix"),
    ("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "", "models/shared_prefix/attention.py"),
    ("transformers.pipelines.PIPELINE_REGISTRY", "", "pipeline.py: `preference-ranking` is a task"),
    ("transformers.trainer.TRAINER_STATE_NAME", "", "saving.py: a checkpoint's last file"),
    ("transformers.trainer_callback.ExportableState", "", "gprl/drift_monitor.py: a checkpoint holds its state"),
    ("transformers.trainer_callback.TrainerState", "", "gpm/model_card.py"),
    ("transformers.trainer_utils.get_last_checkpoint", "(folder", "models/loading.py: names one"),
    ("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR", "", "saving.py, gpm/preparation.py"),
    ("accelerate.commands.config.config_args.load_config_from_file", "(config_file", "cli/launch.py"),
    ("accelerate.commands.launch.launch_command", "(args", "cli/launch.py"),
    ("accelerate.commands.launch.launch_command_parser", "(", "cli/launch.py"),
    ("deepspeed.runtime.zero.parameter_offload.ds_inflight_param_registry", "source", "gpo/reward.py: has an engine"),
    ("deepspeed.runtime.zero.partition_parameters.ds_id", "source", "gpo/reward.py: is partitioned"),
]


# Names that the package does without before these versions of TRL.
SINCE = {"trl.trainer.utils.add_fused_lm_head": "1.15"}


def found(name: str) -> Any:
    """What a dotted name is of."""
    parts = name.split(".")
    if importlib.util.find_spec(parts[0]) is None:
        pytest.skip(f"{parts[0]} is not installed")
    thing, rest = importlib.import_module(parts[0]), parts[1:]
    for index, part in enumerate(rest):
        if not hasattr(thing, part):  # a submodule that nothing has imported yet
            importlib.import_module(".".join(parts[: index + 2]))
        thing = getattr(thing, part)
    return thing


def is_as_assumed(name: str, assumed: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    if assumed == "source":
        return re.search(rf"\b{attribute}\b", getsource(found(owner))) is not None
    if assumed.startswith("="):
        return f"self.{attribute} {assumed}\n" in getsource(found(owner))
    thing = found(name)
    if assumed.startswith("->"):
        tree = ast.parse(textwrap.dedent(getsource(thing)))
        returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
        return any(ast.unparse(value).strip("()").startswith(assumed.removeprefix("-> ")) for value in returned)
    parameters = list(inspect.signature(thing).parameters) if assumed else []
    expected = [parameter for parameter in assumed.strip("(").split(", ") if parameter]
    return parameters[: len(expected)] == expected


@pytest.mark.parametrize(("name", "assumed", "remedy"), USED, ids=lambda value: value if "." in value else None)
def test_what_is_used_is_as_assumed(name, assumed, remedy):
    if Version(trl.__version__) < Version(SINCE.get(name, "0")):
        pytest.skip(f"TRL has it since {SINCE[name]}")
    try:
        holds = is_as_assumed(name, assumed)
    except (AttributeError, ImportError):  # it is gone
        holds = False
    assert holds, f"{name} is not as assumed ({assumed}): mend {remedy}"


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner in OVERRIDDEN for name in OVERRIDDEN[owner].split()]
)
def test_what_is_overridden_is_a_parents_and_takes_its_parameters(owner, name):
    own = found(owner)
    parent = next((base for base in parents(own) if name in vars(base)), None)
    assert parent is not None, f"No parent of {owner} has `{name}`, so nothing calls it: see what replaced it."
    if inspect.isroutine(getattr(own, name)):
        theirs = [value for value in inspect.signature(getattr(parent, name)).parameters.values() if value.kind < 2]
        required = [None for parameter in theirs if parameter.default is parameter.empty]
        others = {parameter.name: None for parameter in theirs[len(required) :]}
        inspect.signature(getattr(own, name)).bind(*required, **others)  # or it raises: take the parent's parameters


# --- Whether the lists are whole -------------------------------------------------------------------------------------


def parents(own: type) -> list[type]:
    """Classes of the libraries that a class of ours is a subclass of."""
    return [base for base in own.__mro__ if base.__module__.split(".")[0] in LIBRARIES]


@functools.cache
def classes() -> list[type]:
    """Of the package, those with a parent in a library."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages([PACKAGE], "gpm_trl.")]
    members = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    return [value for value in members if value.__module__.startswith("gpm_trl.") and parents(value)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_abc_impl"


def overrides(own: type) -> set[str]:
    """Methods and private flags of a class, or of a mixin of ours in it, that one of its parents has too."""
    ours = [base for base in own.__mro__ if base.__module__.startswith("gpm_trl.")]
    members = [(name, value) for base in ours for name, value in vars(base).items() if not name.startswith("__")]
    names = {name for name, value in members if inspect.isroutine(value) or is_private(name)}
    return {name for name in names if any(name in vars(parent) for parent in parents(own))}


@functools.cache
def names_of(own: type) -> set[str]:
    """Private names that the library's parents of a class have, or set on themselves."""
    names = {name for parent in parents(own) for name in vars(parent) if is_private(name)}
    return names.union(*(re.findall(r"self\.(_[a-z]\w*)", getsource(parent)) for parent in parents(own)))


def private_attributes(module: ast.Module) -> set[str]:
    """Private attributes that a module reads or sets of what is a library's."""
    mixed = {base.__name__: own for own in classes() for base in own.__mro__ if base.__module__.startswith("gpm_trl.")}
    everywhere: set[str] = set().union(*map(names_of, classes()))
    names = set()
    for scope in [module, *(node for node in ast.walk(module) if isinstance(node, ast.ClassDef))]:
        theirs = names_of(mixed[scope.name]) if getattr(scope, "name", None) in mixed else set()
        nodes = [node for node in ast.walk(scope) if isinstance(node, ast.Attribute) and is_private(node.attr)]
        on_self = {node.attr for node in nodes if ast.unparse(node.value) in ("self", "cls", "super()")}
        others = {node.attr for node in nodes} - on_self
        names |= (on_self & theirs) | (others & everywhere) | (others - own_names())
    return names


@functools.cache
def own_names() -> set[str]:
    """Names that the package defines: functions, classes, and attributes that it sets on `self`."""
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return stored | {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def undocumented_imports(module: ast.Module) -> set[str]:
    nodes = [node for node in ast.walk(module) if isinstance(node, ast.ImportFrom) and not node.level]
    taken = {(node.module, alias.name) for node in nodes for alias in node.names}
    taken = {(source, name) for source, name in taken if source.split(".")[0] in LIBRARIES}
    return {f"{source}.{name}" for source, name in taken if source not in DOCUMENTED or is_private(name)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_private_name_that_a_module_uses_is_listed(path):
    module = ast.parse(path.read_text())
    assert undocumented_imports(module) <= {name for name, *_ in USED}, "add the import to `USED`, or do without"
    listed = {name.rpartition(".")[2] for name, *_ in USED}.union(*map(str.split, OVERRIDDEN.values()))
    assert private_attributes(module) <= listed, "add the attribute to `USED`, or do without"


def test_every_override_is_listed_and_every_listed_one_is_there():
    now = {f"{own.__module__}.{own.__qualname__}.{name}" for own in classes() for name in overrides(own)}
    listed = {f"{owner}.{name}" for owner, names in OVERRIDDEN.items() for name in names.split()}
    assert (now - listed, listed - now) == (set(), set()), "not listed, and no longer there"


def test_every_listed_name_is_used():
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    unused = [name for name, *_ in USED if not re.search(rf"\b{name.rpartition('.')[2]}\b", source)]
    assert not unused


@pytest.mark.parametrize("trainer", [GPMTrainer, GPOTrainer, GPRLTrainer])
def test_docstring_names_every_overridden_method(trainer):
    methods = {
        name for name in vars(trainer) if name in overrides(trainer) and inspect.isfunction(vars(trainer)[name])
    }
    assert {name for name in methods if f"`{name}`" not in trainer.__doc__} == set()
