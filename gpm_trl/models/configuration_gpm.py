"""Configuration of a general preference model."""

import math
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

__all__ = ["GPMModelConfig"]

# Of `config.json`. Raise it by one with a change that older versions would misread, and read the older ones here.
FORMAT_VERSION = 2
GATE_ACTIVATIONS = ("softmax", "softplus")
LONG_ROWS = ("filter", "truncate_prompt", "error", "truncate_end")
CONVENTIONS = ("gpm", "released", "reward_model")
RENDERER_KEYS = ("conversational", "convention", "long_rows", "max_length", "pad_token_id")
DEFAULT_RENDERER = {"max_length": 2048, "long_rows": "filter"}
# What the fields that are `None` become: with cyclic blocks, and without any, as in a Bradley-Terry model.
CYCLIC_DEFAULTS = {"use_scale_gate": True, "normalize_embeddings": True, "temperature": 0.1}
SCALAR_DEFAULTS = {"normalize_embeddings": False, "temperature": 1.0}


class GPMModelConfig(PreTrainedConfig):
    r"""
    Configuration of a [`GPMForPreference`]: a decoder backbone with an embedding head and a scale gate.

    A score is a sum over blocks. `reward_dim` and `embedding_dim` say which: a general preference model (GPM, the
    default) has cyclic ones, a Bradley-Terry model a transitive one (`reward_dim=1, embedding_dim=0`), the hybrid
    reward-cyclic model (HRC, arXiv 2605.17342) both (`reward_dim=1, embedding_dim=2` is "HRC 2+1" there).

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone, any decoder that [`~transformers.AutoModel`] knows. Defaults to a Llama.
        embedding_dim (`int`, *optional*, defaults to `6`):
            Width 2k of the cyclic part, k blocks; even. The paper's Table 2 has 2, 4, 6 and 8. 0 is none.
        reward_dim (`int`, *optional*, defaults to `0`):
            1 for a transitive block before the cyclic ones: [r, 1] with a reward r, which adds `r_i - r_j` to scores.
            More are for a Bradley-Terry model with a gate, `r = sum_l lambda_l(x) r_l`: the fair baseline of a GPM,
            with a gate and a head of the same size and yet no cycles.
        reward_clip (`float`, *optional*):
            delta > 0 that rewards are cut to, `clip(r, -delta, delta)`. `None` is no limit.
        reward_weight, cyclic_weight (`float`, *optional*, defaults to `1.0`):
            C1 and C2 > 0, the weights of the two parts in the score.
        use_scale_gate (`bool`, *optional*, defaults to `True`):
            Whether the k cyclic blocks or, without any, the rewards are scaled by a gate that reads the prompt
            (Section 4.2 of the paper). Defaults to `False` with one reward alone.
        gate_activation (`str`, *optional*, defaults to `"softmax"`):
            Positive map of the gate: `"softmax"` over the k blocks, or `"softplus"`.
        normalize_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the cyclic part of an embedding has unit length (L2).
        temperature (`float`, *optional*, defaults to `0.1`, to `1.0` without cyclic blocks):
            tau > 0 in `P(y_i > y_j | x) = sigmoid(s / tau)` (Table 8, where it is called beta). The start value where
            it is learned.
        learn_temperature (`bool`, *optional*, defaults to `False`):
            Whether tau is a trained parameter of the model.
        use_lm_head (`bool`, *optional*, defaults to `False`):
            Whether the model keeps the backbone's language-model head, which `sft_loss_coef` of the trainer needs.
        renderer (`dict`, *optional*):
            How texts become tokens, so that scoring does what training did: `max_length` (tokens of prompt and
            response; `None` for no limit; default 2048, Table 8) and `long_rows`, what is done with longer rows:
            `"filter"` (default), `"truncate_prompt"` or `"error"`; and, once trained, `conversational`, whether texts
            were messages. See [`~gpm_trl.data.Renderer`]. Checkpoints that were trained elsewhere have a `convention`,
            which is `"gpm"` if left out: `"released"` is that of the authors' checkpoints (with one more `long_rows`,
            `"truncate_end"`), `"reward_model"` that of Bradley-Terry reward models (with the `pad_token_id` that those
            read past). See [`~gpm_trl.data.renderer.make_renderer`].
        format_version (`int`, *optional*, defaults to `2`):
            Version of these fields. Those of version 1 are read: it had `bradley_terry` instead of `reward_dim`.

    Raises:
        ValueError: If a value is outside of its range, or `renderer` has an unknown key.

    Example:

    ```python
    >>> from transformers import Qwen3Config
    >>> from gpm_trl import GPMModelConfig
    >>> config = GPMModelConfig(text_config=Qwen3Config(hidden_size=64, num_hidden_layers=2), embedding_dim=4)
    >>> config.text_config.hidden_size, config.embedding_dim, config.temperature
    (64, 4, 0.1)

    ```
    """

    model_type = "gpm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    embedding_dim: int = 6
    reward_dim: int = 0
    reward_clip: float | None = None
    reward_weight: float = 1.0
    cyclic_weight: float = 1.0
    use_scale_gate: bool | None = None
    gate_activation: str = "softmax"
    normalize_embeddings: bool | None = None
    temperature: float | None = None
    learn_temperature: bool = False
    use_lm_head: bool = False
    renderer: dict | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.format_version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"`format_version` is {self.format_version}, but this version of gpm_trl reads 1 to {FORMAT_VERSION}: "
                "run `pip install --upgrade gpm-trl`."
            )
        self.format_version = FORMAT_VERSION
        if kwargs.pop("bradley_terry", False):  # of version 1, where the width was that of [r, 1]
            self.reward_dim, self.embedding_dim = 1, 0
        if not isinstance(self.text_config, PreTrainedConfig):
            fields = {"model_type": "llama", **(self.text_config or {})}
            # A model with code of its own gets the class of its configuration when it is loaded, if that is trusted.
            is_own = "auto_map" in fields and fields["model_type"] not in CONFIG_MAPPING
            self.text_config = PreTrainedConfig(**fields) if is_own else AutoConfig.for_model(**fields)
        self.renderer = {**DEFAULT_RENDERER, **(self.renderer or {})}
        if self.embedding_dim == 0 and self.use_scale_gate is None:
            self.use_scale_gate = self.reward_dim > 1
        for name, default in (CYCLIC_DEFAULTS if self.embedding_dim else SCALAR_DEFAULTS).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        self._check_values()
        # `trl.RewardTrainer` refuses a model with another number of labels, which is none of the head's.
        kwargs["num_labels"] = 1
        # Only a model that keeps its language-model head has anything to tie.
        self.tie_word_embeddings = self.use_lm_head and bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "GPMModelConfig":
        # The parent sets overridden fields one by one, after the construction that checks and completes them.
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__annotations__}
        if "renderer" in fields:
            fields["renderer"] = merge_renderers(config_dict.get("renderer") or {}, fields["renderer"])
        return super().from_dict({**config_dict, **fields}, **kwargs)

    @property
    def num_blocks(self) -> int:
        """Blocks of the score; an embedding has twice as many coordinates. `reward_dim` come first."""
        return self.reward_dim + self.embedding_dim // 2

    @property
    def gate_dim(self) -> int:
        """Blocks that a gate scales: the cyclic ones or, without any, the rewards."""
        return self.embedding_dim // 2 or self.reward_dim

    @property
    def kind(self) -> str:
        """What the model is called."""
        kinds = {(True, True): "hybrid reward-cyclic model", (True, False): "Bradley-Terry model"}
        return kinds.get((self.reward_dim > 0, self.embedding_dim > 0), "general preference model")

    def _check_values(self) -> None:
        if not isinstance(self.embedding_dim, int) or self.embedding_dim < 0 or self.embedding_dim % 2:
            raise ValueError(
                f"`embedding_dim` is {self.embedding_dim}; 2k must be an even number, or 0 for no cycles."
            )
        is_gated = self.embedding_dim == 0 and self.use_scale_gate
        if not isinstance(self.reward_dim, int) or self.reward_dim < 0 or (self.reward_dim > 1 and not is_gated):
            raise ValueError(
                f"`reward_dim` is {self.reward_dim}; it is 1 with a transitive block and 0 without. Several rewards "
                "add up to one, but where a gate weighs them: `embedding_dim=0, use_scale_gate=True`."
            )
        if not self.num_blocks:
            raise ValueError("`embedding_dim` is 0 and `reward_dim` too: a Bradley-Terry model has `reward_dim=1`.")
        if not self.embedding_dim and (self.normalize_embeddings or self.cyclic_weight != 1):
            raise ValueError(
                "`embedding_dim=0` has no cyclic blocks for `normalize_embeddings` and `cyclic_weight`: leave them "
                "out."
            )
        if not self.reward_dim and (self.reward_clip is not None or self.reward_weight != 1):
            raise ValueError("`reward_clip` and `reward_weight` need `reward_dim=1`: give it, or leave them out.")
        if self.gate_activation not in GATE_ACTIVATIONS:
            raise ValueError(f"`gate_activation` is {self.gate_activation!r}; choose one of {GATE_ACTIVATIONS}.")
        for name in ("temperature", "reward_weight", "cyclic_weight", "reward_clip"):
            value = getattr(self, name)
            if value is None and name == "reward_clip":
                continue
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; it must be positive and finite.")
        unknown = sorted(set(self.renderer) - set(RENDERER_KEYS))
        if unknown:
            raise ValueError(f"`renderer` has unknown keys {unknown}; it takes {list(RENDERER_KEYS)}.")
        convention = self.renderer.get("convention", "gpm")
        if convention not in CONVENTIONS:
            raise ValueError(f"The `convention` of `renderer` is {convention!r}; choose one of {CONVENTIONS}.")
        if "pad_token_id" in self.renderer and convention != "reward_model":
            raise ValueError(f"`renderer` has a `pad_token_id`, which the convention {convention!r} does not use.")
        check_row_limits(self.renderer["max_length"], self.renderer["long_rows"], convention)


# What `GPMForPreference.from_pretrained` takes as keyword arguments.
GPM_FIELDS = frozenset(GPMModelConfig.__annotations__) - {"sub_configs", "text_config", "format_version"}


def merge_renderers(renderer: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
    """
    Settings of a renderer with `changes`. What they leave out is kept, unless they name another convention: its
    settings are its own.
    """
    convention, changes = renderer.get("convention", "gpm"), changes or {}
    return {**renderer, **changes} if changes.get("convention", convention) == convention else {**changes}


def check_row_limits(max_length: int | None, long_rows: str, convention: str = "gpm") -> None:
    """Raise `ValueError` for settings of a renderer that are out of range."""
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ValueError(f"`max_length` is {max_length}; give a number of tokens, at least 2, or None for no limit.")
    choices = LONG_ROWS if convention == "released" else LONG_ROWS[:-1]  # only the authors cut responses
    if long_rows not in choices:
        raise ValueError(f"`long_rows` is {long_rows!r}; choose one of {choices}.")
