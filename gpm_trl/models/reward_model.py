"""A Bradley-Terry reward model as a general preference model."""

import os

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_gpm import GPMModelConfig
from .modeling_gpm import Float32Head, GPMForPreference

__all__ = ["gpm_from_reward_model"]


def gpm_from_reward_model(reward_model: PreTrainedModel, embedding_dim: int = 0) -> GPMForPreference:
    r"""
    The general preference model with the preferences of a Bradley-Terry reward model (Section 4 of the paper): k = 1,
    v = [r, 1], no gate, tau = 1, so that

        P(y_i > y_j | x) = sigmoid(r_i * 1 - 1 * r_j) = sigmoid(r_i - r_j)

    It has the weights of the reward model, which it shares. A bias of the score head is left out: it cancels. Texts
    are rendered as for the reward model, and rows end where that reads them, before its pad tokens.

    With an `embedding_dim`, it is the start of a hybrid reward-cyclic model (HRC): the reward and tau are those of the
    reward model, the cyclic blocks and their gate are new, and to be trained. As the gate reads prompts, texts are
    rendered as a GPM's.

    Args:
        reward_model ([`~transformers.PreTrainedModel`]): A sequence classifier of transformers with one label.
        embedding_dim (`int`, defaults to `0`): Width 2k of the cyclic part.

    Returns:
        [`GPMForPreference`], in evaluation mode.

    Raises:
        ValueError: If the model is no such classifier of a decoder.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForSequenceClassification
    >>> from gpm_trl.models.reward_model import gpm_from_reward_model
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_labels=1, pad_token_id=0)
    >>> model = gpm_from_reward_model(LlamaForSequenceClassification(config))
    >>> model.config.reward_dim, model.config.embedding_dim, model.config.temperature
    (1, 0, 1.0)

    ```
    """
    name = type(reward_model).__name__
    backbone, score, text_config = reward_model.base_model, getattr(reward_model, "score", None), reward_model.config
    is_decoder = backbone is not reward_model and text_config.get_text_config() is text_config
    if not is_decoder or not isinstance(score, nn.Linear):
        raise ValueError(f"{name} is not a decoder of text with one linear `score` head, as reward models are.")
    if score.out_features != 1:
        raise ValueError(f"{name} has {score.out_features} labels, but a reward model has one: the reward.")
    if os.path.isdir(text_config.name_or_path):
        text_config.name_or_path = ""  # it is saved with the model, and a local path is nobody else's business
    as_read = {"max_length": None, "convention": "reward_model", "pad_token_id": text_config.pad_token_id}
    settings = {"temperature": 1.0} if embedding_dim else {"renderer": as_read}
    config = GPMModelConfig(text_config=text_config, reward_dim=1, embedding_dim=embedding_dim, **settings)
    with torch.device("meta"):
        model = GPMForPreference(config)
    model.model = backbone
    for head in (module for module in model.children() if isinstance(module, Float32Head)):
        head.to_empty(device=score.weight.device)
        model._init_weights(head)
    model.embedding_head.weight.data[0] = score.weight.detach()[0].float()
    return model.eval()
