"""Floating-point operations, bytes that are sent, seconds and GPU-hours."""

from .shapes import Batch, ModelShape, Precision, Sharding


def forward_flops(shape: ModelShape, batch: Batch, logit_tokens: int = 0) -> float:
    """
    Floating-point operations of a forward pass: two for each weight of the linear maps and token, four for each
    feature of a head and pair of a query and a key, two for each weight of the language-model head and logit token.

    Example:

    ```python
    >>> from gpm_trl.estimate import make_batch
    >>> shape = ModelShape(64, 2, 4, 2, 16, 128, 259, params=91_008, linear_params=73_728)
    >>> forward_flops(shape, make_batch(1, 1, 8, 8, packed=False))
    2424832.0

    ```
    """
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * batch.query_keys
    head = 2 * logit_tokens * shape.vocab_size * shape.hidden_size
    return 2 * shape.linear_params * batch.tokens + attention + head


def training_flops(shape: ModelShape, batch: Batch, checkpointing: bool, logit_tokens: int = 0) -> float:
    """
    Floating-point operations of a forward and a backward pass. The latter is twice the former, once for frozen
    weights, which need no gradient; gradient checkpointing computes the former again.
    """
    passes = 1 + (1 if shape.uses_adapters else 2) + checkpointing
    return passes * forward_flops(shape, batch, logit_tokens)


def sharding_traffic(
    shape: ModelShape,
    precision: Precision,
    sharding: Sharding,
    gradient_bytes: int,
    batches: int = 1,
    reductions: int = 1,
) -> float:
    """
    Bytes that a GPU sends for an optimizer's step.

    Where weights are divided, they are gathered for the forward and the backward pass of each batch, and gradients are
    sent to their owners. Else gradients are summed on all GPUs, which is twice that; ZeRO-1 and ZeRO-2 do so too
    (`use_multi_rank_bucket_allreduce`, DeepSpeed's default), and gather the weights after the step.

    Args:
        gradient_bytes (`int`): Of an element of the gradients, as it is sent.
        batches (`int`): Batches whose gradients are accumulated for the step.
        reductions (`int`): How often gradients are sent: once, or for each batch.
    """
    share = (sharding.num_gpus - 1) / sharding.num_gpus
    gradients = gradient_bytes * shape.trained * reductions
    if sharding.parts(3) > 1:
        return (2 * precision.compute * shape.params * batches + gradients) * share
    stepped = precision.compute * shape.trained if sharding.parts(1) > 1 else 0
    return (2 * gradients + stepped) * share


def decoding_seconds(shape: ModelShape, rows: int, prompt: int, tokens: int, bandwidth: float) -> float:
    """
    Seconds in which a GPU that holds the whole policy, in 16 bits, samples `tokens` tokens of each of `rows` rows:
    each token of all rows reads all weights once, and the keys and values so far, at `bandwidth` bytes a second. A
    lower bound: what a library does between the kernels is not in it.
    """
    cache = shape.kv_bytes(rows) * (prompt + tokens / 2)
    return tokens * (2 * shape.params + cache) / bandwidth


def gpu_hours(step_seconds: float, num_gpus: int, items: float) -> float:
    """
    GPU-hours for a million of what a step holds `items` of.

    Example:

    ```python
    >>> gpu_hours(step_seconds=3.6, num_gpus=8, items=32)
    250.0

    ```
    """
    return step_seconds * num_gpus / items * 1e6 / 3600
