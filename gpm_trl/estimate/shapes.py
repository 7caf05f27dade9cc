"""What an estimate depends on: a model, a batch, a precision, how the model is divided, and an optimizer."""

from dataclasses import dataclass

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class ModelShape:
    """
    What a decoder is made of.

    Args:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size (`int`):
            As in transformers' configurations.
        params (`int`): Parameters, shared ones once.
        linear_params (`int`): Those of the linear maps in the layers, which a token is multiplied with.
        trained_params (`int`): Those that are trained, adapters included.
        norms (`int`): Normalisations of the residual stream in a layer.
        normalizes_heads (`bool`): Whether queries and keys are normalised.
        float32_norms (`bool`): Whether normalisations multiply with their weight in float32 (Gemma's).
        adapted_features (`int`): Input features of a layer's linear maps that have adapters, added up.
        dropout_bytes (`int`): Bytes that dropout keeps of an element that it drops or not; 0 without dropout.

    Example:

    ```python
    >>> ModelShape(64, 2, 4, 2, 16, 128, 259, params=91_008, linear_params=73_728).kv_bytes(tokens=10)
    2560

    ```
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    params: int
    linear_params: int
    trained_params: int | None = None
    norms: int = 2
    normalizes_heads: bool = False
    float32_norms: bool = False
    adapted_features: int = 0
    dropout_bytes: int = 0

    @property
    def trained(self) -> int:
        return self.params if self.trained_params is None else self.trained_params

    @property
    def uses_adapters(self) -> bool:
        return self.adapted_features > 0

    def kv_bytes(self, tokens: int, element: int = 2) -> int:
        """Keys and values of all layers, as generation keeps them."""
        return 2 * tokens * self.num_layers * self.num_kv_heads * self.head_dim * element


@dataclass(frozen=True)
class Batch:
    """
    What a GPU computes at once.

    Args:
        tokens (`int`): Tokens, padding counted.
        key_tokens (`int`): Keys that attention keeps; more than tokens where responses share a prompt.
        query_keys (`float`): Pairs of a query and a key that it sees.
        response_tokens (`int`): Tokens of the responses.
        packed (`bool`): Whether each prompt is there once.
    """

    tokens: int
    key_tokens: int
    query_keys: float
    response_tokens: int
    packed: bool


def make_batch(groups: int, responses: int, prompt: int, response: int, packed: bool) -> Batch:
    """
    `groups` prompts of `prompt` tokens with `responses` responses of `response` tokens each.

    Example:

    ```python
    >>> make_batch(4, 2, 1024, 1024, packed=True).tokens, make_batch(4, 2, 1024, 1024, packed=False).tokens
    (12288, 16384)

    ```
    """
    rows, length = groups * responses, prompt + response
    if not packed:
        return Batch(rows * length, rows * length, rows * length**2 / 2, rows * response, packed)
    query_keys = groups * prompt**2 / 2 + rows * (prompt * response + response**2 / 2)
    return Batch(
        groups * prompt + rows * response, groups * prompt + rows * length, query_keys, rows * response, packed
    )


@dataclass(frozen=True)
class Precision:
    """
    Bytes of an element.

    Args:
        weights (`int`): Of the weights that are kept, before any sharding.
        compute (`int`): Of what linear maps and attention take and give.
        stream (`int`): Of the residual stream. Four if weights are float32 and only autocast computes in two.
        has_master (`bool`): Whether trained weights have a float32 copy, as under DeepSpeed.
    """

    weights: int
    compute: int
    stream: int
    has_master: bool = False


def make_precision(backend: str, weights: int, mixed: bool, trained: bool = True) -> Precision:
    """
    What weights of a dtype become in a run.

    DeepSpeed casts all weights to the 16-bit type and keeps a float32 copy of the trained ones; accelerate's FSDP2
    makes the trained ones float32 and gathers them in 16 bits; otherwise weights stay as they were loaded, and
    optimizer states have their dtype. Without mixed precision nothing changes.

    Args:
        backend (`str`): `"single"`, `"ddp"`, `"zero"` or `"fsdp2"`.
        weights (`int`): Bytes of an element as loaded.
        mixed (`bool`): Whether `bf16` or `fp16` is set.
        trained (`bool`): Whether the weights are.

    Example:

    ```python
    >>> make_precision("zero", weights=2, mixed=True)
    Precision(weights=2, compute=2, stream=2, has_master=True)
    >>> make_precision("single", weights=4, mixed=True)
    Precision(weights=4, compute=2, stream=4, has_master=False)

    ```
    """
    if not mixed:
        return Precision(weights, weights, weights)
    if backend == "zero":
        return Precision(2, 2, 2, has_master=trained)
    if backend == "fsdp2":
        return Precision(FLOAT32 if trained else weights, 2, 2)
    return Precision(weights, 2, weights)


@dataclass(frozen=True)
class Sharding:
    """
    How a model is divided among GPUs.

    Args:
        backend (`str`): `"single"`, `"ddp"`, `"zero"` (DeepSpeed) or `"fsdp2"`.
        num_gpus (`int`): GPUs in all.
        stage (`int`): DeepSpeed's: 1 divides optimizer states, 2 gradients too, 3 weights too.
        offloads_optimizer, offloads_weights (`bool`): Whether these are in the machine's memory.
        num_nodes (`int`): Machines.
    """

    backend: str = "single"
    num_gpus: int = 1
    stage: int = 0
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    num_nodes: int = 1

    def parts(self, stage: int) -> int:
        """Into how many parts is divided what DeepSpeed divides from `stage` on."""
        is_divided = self.backend == "fsdp2" or (self.backend == "zero" and self.stage >= stage)
        return self.num_gpus if is_divided else 1

    @property
    def gathers_weights(self) -> bool:
        return self.parts(3) > 1 or self.offloads_weights


@dataclass(frozen=True)
class Optimizer:
    """
    An optimizer's memory.

    Args:
        states (`int`): States of a parameter.
        state_bytes (`int`, *optional*): Bytes of a state; `None` is those of the weights it steps on.
        temporaries (`int`): Copies of all parameters that a step makes.
    """

    states: int
    state_bytes: int | None = None
    temporaries: int = 0


ADAM_8BIT = Optimizer(2, state_bytes=1)
# By transformers' names. Those of torch that are not fused work on lists of all parameters, with a copy of them.
OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(2),
    "adamw_torch": Optimizer(2, temporaries=1),
    "rmsprop": Optimizer(1, temporaries=1),
    "sgd": Optimizer(0),
    "adamw_8bit": ADAM_8BIT,
    "adamw_bnb_8bit": ADAM_8BIT,
    "paged_adamw_8bit": ADAM_8BIT,
}
