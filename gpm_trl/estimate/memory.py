"""Bytes on a GPU."""

from .shapes import FLOAT32, Batch, ModelShape, Optimizer, Precision, Sharding

GIB = 2**30
OVERHEAD = 2 * GIB  # assumed, not derived: CUDA context, NCCL's and cuBLAS's buffers, fragments
# Elements: defaults of `deepspeed.runtime.zero.config` 0.19, which accelerate's YAML files leave as they are.
ZERO_BUCKET = 500_000_000  # `reduce_bucket_size`, `allgather_bucket_size`
ZERO_LIVE_PARAMETERS = 1_000_000_000  # `stage3_max_live_parameters`
ZERO_SUB_GROUP = 1_000_000_000  # `sub_group_size`
# Of the fused language-model head of TRL (`trl.kernels.chunked_logprob`): tokens, at most, and vocabulary of a tile.
LOGIT_TILE = (4096, 32768)
# Blocks of 64 weights of bitsandbytes' NF4 share a float32 scale, or, nested, one byte of a quantised scale and a
# float32 for each 256 of these (QLoRA, arXiv 2305.14314, Section 3).
BYTES_4BIT, BYTES_4BIT_NESTED, BYTES_8BIT = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256), 1.0


def attention_matrix(shape: ModelShape, batch: Batch) -> float:
    """Elements of the attention matrices of a layer, what causality hides included."""
    return 2 * batch.query_keys * shape.num_heads


def layer_activations(shape: ModelShape, batch: Batch, precision: Precision, attention: str) -> float:
    """
    Bytes that a layer keeps for its backward pass.

    Counted off transformers' decoders, as Korthikanti et al. do for GPT (arXiv 2205.05198, Section 4.1), in bytes a
    token with hidden size h, c bytes a computed element and s of the residual stream:

    - a normalisation its input in float32, 4 h; if its weight is trained, what the weight is multiplied with, s h (4 h
      for Gemma); two of them feed linear maps, which keep their input if they are trained, c h;
    - attention queries, keys, values, its output, and a float32 for each head;
    - the MLP gate, activated gate, the other factor, and (if trained) the product, c f each;
    - adapters the input of each map, c, and what dropout keeps; without dropout, maps with one input keep it once.

    Rotary embeddings keep nothing. Written-out (`"eager"`) attention keeps its matrix, in float32 and in c bytes.
    """
    hidden, computed = shape.hidden_size, precision.compute
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    is_trained = not shape.uses_adapters
    token: float = shape.norms * FLOAT32 * hidden
    if is_trained:
        token += shape.norms * (FLOAT32 if shape.float32_norms else precision.stream) * hidden + 2 * computed * hidden
    if shape.normalizes_heads:
        token += (heads + kv_heads) * (FLOAT32 + is_trained * computed)
    token += FLOAT32 * shape.num_heads
    token += (3 + is_trained) * computed * shape.intermediate_size
    if shape.dropout_bytes:
        token += (computed + shape.dropout_bytes) * shape.adapted_features
    elif shape.uses_adapters:
        token += computed * (2 * hidden + shape.intermediate_size)
    total = token * batch.tokens
    if attention == "eager":
        total += attention_matrix(shape, batch) * (FLOAT32 + (computed if computed != FLOAT32 else 0))
    if batch.packed and attention == "sdpa":
        # Keys of each head; copies that put responses together, and the whole of which the prompt is a view.
        keys, queries, outputs = heads * (batch.tokens + batch.key_tokens), batch.response_tokens, 2
    else:
        keys, queries, outputs = kv_heads * batch.key_tokens, 0, 1
    return total + computed * (2 * keys + heads * (queries + (1 + outputs) * batch.tokens))


def layer_gradients(shape: ModelShape, batch: Batch, precision: Precision, attention: str) -> float:
    """
    Bytes of the gradients of activations at the worst moment of a layer's backward pass: of both factors in its MLP,
    or of its written-out attention's matrix, twice.
    """
    inputs = precision.stream * shape.hidden_size * batch.tokens
    mlp = precision.compute * shape.intermediate_size * batch.tokens
    gradients = 2 * mlp + 2 * inputs
    if attention != "eager":
        return gradients
    done = 4 * mlp + 3 * inputs  # the MLP and its norm
    return max(gradients, 2 * FLOAT32 * attention_matrix(shape, batch) - done)


def activations(shape: ModelShape, batch: Batch, precision: Precision, attention: str, checkpointing: bool) -> float:
    """
    Bytes of activations at the start of the backward pass, when they are most.

    With gradient checkpointing, the input of each layer, and one layer as it is computed again; else all that layers
    keep, and the 16-bit copies that autocast makes of float32 weights. To it come the final normalisation, and the
    gradients of the last layer's activations.
    """
    layer = layer_activations(shape, batch, precision, attention)
    inputs = precision.stream * shape.hidden_size * batch.tokens
    kept = shape.num_layers * inputs + layer if checkpointing else shape.num_layers * layer
    final_norm = (FLOAT32 + precision.stream) * shape.hidden_size * batch.tokens
    autocast_copies = 0 if checkpointing or precision.stream == precision.compute else precision.compute
    gradients = layer_gradients(shape, batch, precision, attention)
    return kept + final_norm + gradients + autocast_copies * shape.linear_params


def last_activations(shape: ModelShape, batch: Batch, precision: Precision, attention: str) -> float:
    """Bytes of activations at the end of the backward pass: those of the first layer, and their gradients."""
    layer = layer_activations(shape, batch, precision, attention)
    return layer + layer_gradients(shape, batch, precision, attention)


def last_gradients(shape: ModelShape, has_head: bool) -> float:
    """
    Share of the weights' gradients that are there at the end of the backward pass: all but those of the first layer
    and of the embeddings, which a language-model head may share.
    """
    if shape.uses_adapters:
        return 1 - 1 / shape.num_layers
    embeddings = 0 if has_head else shape.vocab_size * shape.hidden_size
    return 1 - (shape.linear_params / shape.num_layers + embeddings) / shape.params


def policy_logits(shape: ModelShape, tokens: int, precision: Precision) -> float:
    """
    Bytes of the language-model head in the backward pass of GPO, which TRL computes in tiles: a tile of logits, and in
    float32 the gradients of the hidden states and, if it is trained, of the whole head.
    """
    tile = min(tokens, LOGIT_TILE[0]) * LOGIT_TILE[1] * precision.compute
    head = 0 if shape.uses_adapters else FLOAT32 * shape.vocab_size * shape.hidden_size
    return tile + FLOAT32 * tokens * shape.hidden_size + head


def response_logits(shape: ModelShape, tokens: int, precision: Precision) -> float:
    """Bytes of whole logits: as computed, in float32, and the gradient of the latter."""
    return tokens * shape.vocab_size * (precision.compute + 2 * FLOAT32)


def frozen_weights(params: int, weights: int, sharding: Sharding) -> float:
    """Bytes, on a GPU, of a model that is not trained: divided where ZeRO-3 and FSDP2 divide."""
    return 0.0 if sharding.offloads_weights else weights * params / sharding.parts(3)


def training_states(
    shape: ModelShape, base_bytes: float, precision: Precision, sharding: Sharding, optimizer: Optimizer
) -> dict[str, float]:
    """
    Bytes of weights, gradients, optimizer states and the step's temporaries, on a GPU.

    Under DeepSpeed, for Adam, 2 + 2 + 12 bytes a trained parameter (Rajbhandari et al., arXiv 1910.02054, Section
    3.1), each divided by the number of GPUs from its stage on; otherwise the states have the dtype of the weights.

    Args:
        base_bytes (`float`): Of the weights that are not trained, before sharding.

    Example:

    ```python
    >>> from gpm_trl.estimate import OPTIMIZERS, make_precision
    >>> shape = ModelShape(64, 2, 4, 2, 16, 128, 259, params=1_000_000, linear_params=900_000)
    >>> zero3, precision = Sharding("zero", num_gpus=8, stage=3), make_precision("zero", 2, mixed=True)
    >>> states = training_states(shape, 0, precision, zero3, OPTIMIZERS["adamw_torch_fused"])
    >>> states["weights"], states["gradients"], states["optimizer"]
    (250000.0, 250000.0, 1500000.0)

    ```
    """
    trained, stepped = shape.trained, FLOAT32 if precision.has_master else precision.weights
    state = stepped if optimizer.state_bytes is None else optimizer.state_bytes
    weights = (precision.weights * trained + base_bytes) / sharding.parts(3)
    gradients = precision.weights * trained / sharding.parts(2)
    states = (FLOAT32 * precision.has_master + optimizer.states * state) * trained / sharding.parts(1)
    part = trained / sharding.parts(1)
    if sharding.backend == "zero":  # gradients are cast to float32, in ZeRO-3 a sub-group at a time
        part = min(part, ZERO_SUB_GROUP) if sharding.stage == 3 else part
        step = FLOAT32 * part * (1 + optimizer.temporaries)
    else:
        step = stepped * part * optimizer.temporaries
    on_gpu = {
        "weights": 0.0 if sharding.offloads_weights else weights,
        "gradients": 0.0 if sharding.offloads_optimizer else gradients,
        "optimizer": 0.0 if sharding.offloads_optimizer else states,
        "step": 0.0 if sharding.offloads_optimizer else step,
    }
    host = weights + gradients + states - sum(on_gpu[name] for name in ("weights", "gradients", "optimizer"))
    return {**on_gpu, "host": host}


def sharding_buffers(shape: ModelShape, precision: Precision, sharding: Sharding) -> float:
    """
    Bytes that dividing a model costs: DDP's buckets, a second copy of the gradients; DeepSpeed's buckets and, in stage
    3, the weights that it holds at a time; FSDP2's layer at work, the next one, and a layer's gradient, with the
    embeddings.
    """
    if sharding.backend == "ddp":
        return precision.weights * shape.trained
    if sharding.backend == "zero":
        live = min(shape.params, ZERO_LIVE_PARAMETERS) if sharding.stage == 3 else min(shape.params, ZERO_BUCKET)
        return precision.compute * (live + ZERO_BUCKET)
    if sharding.backend == "fsdp2":
        layer = shape.linear_params / shape.num_layers
        return precision.compute * (3 * layer + shape.params - shape.linear_params)
    return 0.0


def peak_memory(
    states: dict[str, float], fixed: float, work: float, last_work: float, last_gradients: float, held: float
) -> float:
    """
    Bytes at the worst moment: at the start of a backward pass, when activations are most; at its end, when nearly all
    gradients are there beside the activations of a layer; or in the optimizer's step.

    Args:
        states (`dict`): Of [`training_states`].
        fixed (`float`): Bytes that are there throughout, besides.
        work (`float`): Of activations and logits at the start of the backward pass.
        last_work (`float`): Of activations at its end.
        last_gradients (`float`): Share of the gradients that are there at its end.
        held (`float`): Of gradients before the backward pass: accumulated ones, or a buffer of them.
    """
    gradients = states["gradients"]
    start, end = work + held, last_work + max(held, last_gradients * gradients)
    return states["weights"] + states["optimizer"] + fixed + max(start, end, gradients + states["step"])
