"""
The general preference model: a decoder backbone with an embedding head and a scale gate.

This file and the configuration's travel with every saved model, to load it where gpm_trl is not installed. What they
import relatively, transformers copies with them: nothing but each other.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ModelOutput, logging

from .configuration_gpm import GPMModelConfig

__all__ = ["GPMForPreference", "GPMOutput"]

logger = logging.get_logger(__name__)

HEAD_NAMES = ("embedding_head", "scale_gate", "learned_temperature")
# Factors by which some causal LMs scale their logits after the head; `GPMForPreference` knows only soft-capping.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
# What the attention implementations of packed rows are called.
SHARED_PREFIX = "gpm_shared_prefix"


@dataclass
class GPMOutput(ModelOutput):
    """
    Output of [`GPMForPreference`]. It has no field called `logits`: code that expects a scalar reward would read the
    first coordinate of an embedding as one.

    Args:
        embeddings (`torch.FloatTensor` of shape `(N, 2k)`): Preference embeddings of the N rows, in float32: two
            coordinates for each of the k blocks, a transitive one first ([r, 1] with a reward r).
        scales (`torch.FloatTensor` of shape `(N, k)`): What the blocks weigh in the score, in float32: C1 for a
            transitive one, C2 for a cyclic one, times the gate value of the row's prompt for those with a gate.
        gate (`torch.FloatTensor` of shape `(N, k)`, *optional*): The gate values alone, of the cyclic blocks or, in a
            model without any, of the rewards; `None` for a model without a gate.
        temperature (`torch.FloatTensor` of shape `()`): tau in `P(y_i > y_j | x) = sigmoid(s / tau)`.
        embedding_norms (`torch.FloatTensor` of shape `(N,)`): L2 norms of what the embedding head gave.
        lm_loss (`torch.FloatTensor` of shape `(N,)`, *optional*): With `lm_labels`: mean negative log-likelihood of
            the labelled tokens of each row, 0 for a row without any.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): The backbone's, with `output_hidden_states=True`.
        attentions (`tuple(torch.FloatTensor)`, *optional*): The backbone's, with `output_attentions=True`.
    """

    embeddings: torch.FloatTensor | None = None
    scales: torch.FloatTensor | None = None
    gate: torch.FloatTensor | None = None
    temperature: torch.FloatTensor | None = None
    embedding_norms: torch.FloatTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class Float32Head(nn.Module):
    """
    Linear map without bias, computed in float32 whatever the dtype of its input, its weight and the autocast context.

    It is no `nn.Linear` on purpose: PEFT's `target_modules="all-linear"` and the quantisers of transformers replace
    every `nn.Linear`, and a head must be trained as it is and kept in full precision.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        # The dtype is said, since models are built with the backbone's as default.
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class LearnedTemperature(nn.Module):
    """tau = exp(theta) > 0 with one trained parameter; a module, so that PEFT can train and save it."""

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        theta = self.log_temperature
        if isinstance(theta, DTensor):  # sharded by FSDP, and asked for outside of the model's forward
            theta = theta.full_tensor()
        return theta.float().exp().squeeze(0)


class GPMForPreference(PreTrainedModel):
    r"""
    General preference model (Zhang et al., ICML 2025, arXiv 2410.02197, Section 4).

    A response y to a prompt x has the embedding `v(x, y)`: the embedding head applied to the backbone's hidden state
    of the *last token of the response*, then L2-normalised (`normalize_embeddings`). The gate `lambda(x)` is a second
    head on the hidden state of the *last token of the prompt*, so it depends on x alone. Scores are those of
    [`~gpm_trl.preference.preference_score`]: K responses are compared with K embeddings.

    The backbone is any decoder of [`~transformers.AutoModel`], under the name `model`: the weights of a causal LM load
    as they are, and attention implementations, gradient checkpointing, ZeRO-3, quantisation and PEFT are transformers'
    own. Both heads work in float32 whatever the backbone's dtype.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig
    >>> from gpm_trl import GPMForPreference, GPMModelConfig
    >>> from gpm_trl.preference import preference_matrix, preference_probability
    >>> backbone = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, num_key_value_heads=2)
    >>> model = GPMForPreference(GPMModelConfig(text_config=backbone, embedding_dim=4))
    >>> rows = torch.tensor([[1, 5, 6, 7], [1, 5, 9, 8]])  # one prompt (1, 5), two responses
    >>> with torch.no_grad():
    ...     output = model(rows, prompt_lengths=torch.tensor([2, 2]))
    >>> scores = preference_matrix(output.embeddings, output.scales[0])
    >>> preference_probability(scores, output.temperature).diagonal()
    tensor([0.5000, 0.5000])

    ```
    """

    config_class = GPMModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = HEAD_NAMES

    def __init__(self, config: GPMModelConfig, new_heads: bool = False, of_causal_lm: bool = False):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.model = AutoModel.from_config(config.text_config)
        if not all(getattr(module, "is_causal", True) for module in self.model.modules()):
            raise ValueError(
                f"{config.text_config.model_type} is an encoder, whose gate would read responses: take a decoder."
            )
        self.embedding_head = Float32Head(hidden_size, config.reward_dim + config.embedding_dim)
        if config.use_scale_gate:
            self.scale_gate = Float32Head(hidden_size, config.gate_dim)
        if config.learn_temperature:
            self.learned_temperature = LearnedTemperature()
        if config.use_lm_head:
            self._add_lm_head()
        if new_heads:  # these differences are expected, and `from_pretrained` says so in one line
            self._keys_to_ignore_on_load_missing = [rf"^{name}\." for name in HEAD_NAMES]
        if of_causal_lm:
            self._keys_to_ignore_on_load_unexpected = [] if config.use_lm_head else [r"^(lm_head|embed_out)\."]
        self._takes_position_ids = "position_ids" in inspect.signature(self.model.forward).parameters
        self.post_init()

    def _add_lm_head(self) -> None:
        text_config = self.config.text_config
        scaled = [name for name in LOGIT_SCALES if getattr(text_config, name, None) not in (None, 1)]
        if scaled:
            raise ValueError(
                f"`use_lm_head=True` does not support {text_config.model_type}, which scales its logits ({scaled[0]})."
            )
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            embedding = self.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embedding)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only transformers' guarded initialisers: they leave loaded weights alone (transformers issue 46620).
        if isinstance(module, Float32Head):
            init.normal_(module.weight, mean=0.0, std=1 / (self.config.text_config.hidden_size + 1))
        elif isinstance(module, LearnedTemperature):
            init.constant_(module.log_temperature, torch.tensor(self.config.temperature).log().item())
        else:
            super()._init_weights(module)

    @property
    def temperature(self) -> torch.Tensor:
        """tau in `P(y_i > y_j | x) = sigmoid(s / tau)`, `()`: learned, or the configuration's."""
        if self.config.learn_temperature:
            return self.learned_temperature()
        return torch.tensor(self.config.temperature)  # on the CPU: weights that are offloaded are nowhere

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        lm_labels: torch.LongTensor | None = None,
        shared_prefix_layout: Any | None = None,
        **kwargs,
    ) -> GPMOutput:
        r"""
        Embed N rows, each a prompt followed by a response.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, L)`): Token ids of prompt and response.
            attention_mask (`torch.Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding, on either side.
                `None` is no padding. The padding id itself is never looked at.
            prompt_lengths (`torch.LongTensor` of shape `(N,)`): Number of prompt tokens of each row, padding not
                counted; the gate reads the last of them. Required by a model with a gate.
            position_ids (`torch.LongTensor` of shape `(N, L)`, *optional*): Defaults to a count of the row's tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(N, L, hidden)`, *optional*): Instead of `input_ids`.
            lm_labels (`torch.LongTensor` of shape `(N, L)`, *optional*): Token ids whose likelihood `lm_loss` is
                about, -100 elsewhere. Requires `use_lm_head`.
            shared_prefix_layout ([`~gpm_trl.models.shared_prefix.SharedPrefixLayout`], *optional*): `input_ids` of
                shape `(1, T)` hold the N rows packed, each prompt once, as this says; then no mask, prompt lengths,
                positions or labels are given, and the backbone has had
                [`~gpm_trl.models.shared_prefix.enable_shared_prefix`].
            kwargs: Passed to the backbone (`output_hidden_states`, `output_attentions`, ...).

        Returns:
            [`GPMOutput`]

        Raises:
            ValueError: If `prompt_lengths` is missing or out of range, or a row is empty, or `lm_labels` is given to a
                model without a language-model head.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("Pass either `input_ids` or `inputs_embeds`.")
        if shared_prefix_layout is not None:
            if any(given is not None for given in (attention_mask, prompt_lengths, position_ids, lm_labels)):
                raise ValueError(
                    "With `shared_prefix_layout`, leave out `attention_mask`, `prompt_lengths`, `position_ids` and "
                    "`lm_labels`."
                )
            if not self.model.config._attn_implementation.startswith(SHARED_PREFIX):
                raise ValueError("The backbone takes no packed rows yet: call `enable_shared_prefix(model.model)`.")
            last = torch.tensor(shared_prefix_layout.last_tokens, device=inputs.device)  # (N,)
            prompt_ends = torch.tensor(shared_prefix_layout.prompt_ends, device=inputs.device)  # (N,)
            kwargs |= shared_prefix_layout.model_inputs(inputs.device)
        else:
            if attention_mask is None:
                attention_mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
            last, prompt_ends = self._row_ends(attention_mask, prompt_lengths)
            if position_ids is None and self._takes_position_ids:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            if position_ids is not None:
                kwargs["position_ids"] = position_ids
            kwargs["attention_mask"] = attention_mask
        kwargs.setdefault("use_cache", False)

        outputs = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        hidden = outputs.last_hidden_state  # (N, L, hidden), or (1, T, hidden) if packed
        tokens = hidden.flatten(0, 1)
        last = last.to(hidden.device)  # of a model on several devices, not that of the inputs
        prompt_ends = prompt_ends.to(hidden.device) if self.config.use_scale_gate else None
        return GPMOutput(
            **self._read_heads(tokens[last], tokens[prompt_ends] if self.config.use_scale_gate else None),
            temperature=self.temperature.to(hidden.device),
            lm_loss=self._lm_loss(hidden, lm_labels) if lm_labels is not None else None,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _read_heads(self, ends: torch.Tensor, prompt_ends: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        """What [`GPMOutput`] has of blocks, from the hidden states `(N, hidden)` that end rows and prompts."""
        raw = self.embedding_head(ends)  # (N, R + 2k) with R rewards
        rewards, cyclic = raw.split([self.config.reward_dim, self.config.embedding_dim], dim=-1)
        if self.config.reward_clip is not None:
            rewards = rewards.clamp(-self.config.reward_clip, self.config.reward_clip)
        if self.config.normalize_embeddings:
            norms = cyclic.norm(dim=-1, keepdim=True)
            # NaN where `normalize` would give 0: for a length that is 0 or overflows, so without a direction.
            cyclic = F.normalize(cyclic, dim=-1) * (norms / norms).detach()
        gate = None
        if self.config.use_scale_gate:
            logits = self.scale_gate(prompt_ends)  # (N, k), or (N, R) without cyclic blocks
            gate = logits.softmax(-1) if self.config.gate_activation == "softmax" else F.softplus(logits)
        transitive = torch.stack([rewards, torch.ones_like(rewards)], dim=-1).flatten(1)  # [r, 1]
        weights = torch.full_like(rewards, self.config.reward_weight)
        scales = torch.cat([weights, torch.full_like(cyclic[:, ::2], self.config.cyclic_weight)], dim=-1)
        if gate is not None:
            scales = scales * F.pad(gate, (scales.shape[-1] - gate.shape[-1], 0), value=1.0)
        return {
            "embeddings": torch.cat([transitive, cyclic], dim=-1),
            "scales": scales,
            "gate": gate,
            "embedding_norms": raw.norm(dim=-1),
        }

    def _row_ends(
        self, attention_mask: torch.Tensor, prompt_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Indices, among the `N * L` tokens, of the last token of each row and, with a gate, of its prompt, `(N,)`."""
        mask = attention_mask.bool()
        lengths = mask.sum(-1)
        if (lengths == 0).any():
            raise ValueError("A row of `attention_mask` is all zeros: each row needs at least one token.")
        positions = torch.arange(mask.shape[-1], device=mask.device)
        starts = torch.arange(len(mask), device=mask.device) * mask.shape[-1]
        last = starts + (positions * mask).argmax(-1)
        if not self.config.use_scale_gate:
            return last, None
        if prompt_lengths is None:
            raise ValueError("The gate reads the prompt's last token: pass `prompt_lengths`, as `Renderer` does.")
        if ((prompt_lengths < 1) | (prompt_lengths > lengths)).any():
            given, most = prompt_lengths.tolist(), lengths.tolist()
            raise ValueError(f"`prompt_lengths` is {given}; each must be between 1 and its row's tokens, {most}.")
        return last, starts + mask.int().argmax(-1) + prompt_lengths - 1

    def _lm_loss(self, hidden: torch.Tensor, lm_labels: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of the labelled tokens of each row, `(N,)`."""
        if not self.config.use_lm_head:
            raise ValueError("`lm_labels` needs a language-model head: load a causal LM with `use_lm_head=True`.")
        lm_labels = lm_labels.to(hidden.device)
        predicted = lm_labels[:, 1:] != -100  # (N, L - 1)
        targets = lm_labels[:, 1:][predicted]  # (T,)
        logits = self.lm_head(hidden[:, :-1][predicted]).float()  # (T, vocabulary)
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        rows = predicted.nonzero()[:, 0]
        sums = logits.new_zeros(len(lm_labels)).index_add(0, rows, F.cross_entropy(logits, targets, reduction="none"))
        return sums / predicted.sum(-1).clamp(min=1)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        r"""
        Load a general preference model, or put new heads on a causal language model.

        Weights are read from safetensors only. No code of a checkpoint is run without `trust_remote_code=True`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A GPM (directory or Hub id), whose heads must be
                there and fit; an adapter of one, which is loaded on the base model that it names; one of the authors'
                released checkpoints, with its conventions; or a causal LM, which gets new heads.
            config ([`GPMModelConfig`] or `str`, *optional*): Used instead of the checkpoint's; or where that is.
            kwargs: Fields of [`GPMModelConfig`] (`embedding_dim=6`, `temperature=0.1`, ...) and everything that
                [`~transformers.PreTrainedModel.from_pretrained`] takes (`dtype`, `attn_implementation`,
                `quantization_config`, `device_map`, `revision`, ...). For an adapter also `is_trainable`, and
                `output_loading_info` is about its base. What a `renderer` leaves out is the checkpoint's, unless it
                names another `convention`.

        Returns:
            [`GPMForPreference`], for an adapter a [`~peft.PeftModel`] of one; in evaluation mode.

        Raises:
            ValueError: If a weight of the backbone, or a head of a GPM, is missing, damaged or of another shape.
            OSError: If there is no such model, or it has no safetensors.
        """
        loading = module_of_package("models.loading")
        if loading is not None:
            return loading.load(cls, pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        wants_loading_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained
        model, info = load_whole(load, pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        return (model, info) if wants_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        [`~transformers.PreTrainedModel.save_pretrained`], which takes the same arguments, so that each file has its
        name only once it is whole: an interrupted save leaves the model that was there before.
        """
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
        if not (args[0] if args else kwargs.get("is_main_process", True)):  # another process writes the files
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        saving = module_of_package("saving")
        text_config = self.config.text_config
        if (getattr(text_config, "pad_token_id", None) or 0) >= self.get_input_embeddings().num_embeddings:
            text_config.pad_token_id = None  # of no row; and no embedding can be made with it
        with saving.whole_files(save_directory) if saving else nullcontext(save_directory) as directory:
            for part in (text_config, self.model):
                if part._auto_class is not None:  # it has code of its own
                    custom_object_save(part, directory, config=text_config)
            super().save_pretrained(directory, *args, **kwargs)


def module_of_package(name: str) -> ModuleType | None:
    """A module of gpm_trl, or `None` where this file is a copy that came with a saved model."""
    return importlib.import_module(f"gpm_trl.{name}") if __package__ == "gpm_trl.models" else None


@contextmanager
def reading_weights(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Name the checkpoint if its weights are not what safetensors wrote, or no model can be made for them."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{name_or_path} has a damaged weight file (cut off or no safetensors): {error}") from error
    except AssertionError as error:  # of `nn.Embedding`, which `trl.RewardTrainer` does not ask before saving
        if "adding_idx" not in str(error):
            raise
        raise ValueError(f"{name_or_path} has a `pad_token_id` beyond its embedding: make it null.") from error


def load_whole(
    from_pretrained: Callable, name_or_path: str | os.PathLike, *args, replaced: frozenset[str] = frozenset(), **kwargs
) -> tuple[Any, dict]:
    """
    What a `from_pretrained` loads, and transformers' account of it. Raises `ValueError` for a weight that is missing
    (unless in `replaced`: an adapter brings it), empty or of another shape, and for a head that would be dropped.
    Other weights of no use are told in the log.
    """
    if not kwargs.setdefault("use_safetensors", True):
        raise ValueError("`use_safetensors=False` would load a pickle, which can run any code: leave it out.")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or a table of transformers would say that what is refused below was made up
    try:
        with reading_weights(name_or_path):
            # Weights of another shape are reported below, in one line with the remedy.
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = from_pretrained(name_or_path, *args, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    missing = [name for name in info["missing_keys"] if name not in replaced]
    mismatched = [(name, list(found), list(wanted)) for name, found, wanted in info["mismatched_keys"]]
    empty = [name for name, found, _ in mismatched if 0 in found]
    misshapen = [f"{name} {found}, expected {wanted}" for name, found, wanted in mismatched]
    heads = (*HEAD_NAMES, "lm_head") if isinstance(model, GPMForPreference) else ()
    dropped = [name for name in info["unexpected_keys"] if name.startswith(heads)]
    problems = {
        "lacks {}: the checkpoint is incomplete, or was saved with other settings (a GPM: `use_scale_gate`, "
        "`learn_temperature`, `use_lm_head`; new heads take them as arguments, without `config`).": missing,
        "has weights without values: {}. ZeRO-3 leaves such: save by the trainer's `save_model`.": empty,
        "has weights of another shape: {}. Leave out `embedding_dim` or `reward_dim`, or download it "
        "again.": misshapen,
        "holds {}, which the model would drop: load it with the settings it was saved with.": dropped,
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{name_or_path} {problem.format(abbreviate(sorted(names)))}")
    if info["unexpected_keys"]:
        logger.warning(f"{name_or_path} has weights of no use here: {abbreviate(sorted(info['unexpected_keys']))}.")
    return model, info


def abbreviate(names: list[str], most: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
