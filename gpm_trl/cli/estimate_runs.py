"""What `gpm-trl estimate` adds up: the formulas of [`gpm_trl.estimate`] over a run of GPM or of GPO."""

import math
from dataclasses import dataclass
from typing import Any

from trl import ModelConfig

from ..estimate import (
    BYTES_4BIT,
    BYTES_4BIT_NESTED,
    BYTES_8BIT,
    OVERHEAD,
    Batch,
    ModelShape,
    Optimizer,
    Precision,
    Sharding,
    activations,
    decoding_seconds,
    forward_flops,
    frozen_weights,
    last_activations,
    last_gradients,
    make_batch,
    make_precision,
    peak_memory,
    policy_logits,
    response_logits,
    sharding_buffers,
    sharding_traffic,
    training_flops,
    training_states,
)
from ..estimate.shapes import FLOAT32
from ..trainer import GPMConfig

__all__ = ["Hardware", "Report", "Rows", "Run", "estimate_gpm", "estimate_gpo"]

DTYPES = {FLOAT32: "float32", 2: "16-bit"}


@dataclass(frozen=True)
class Hardware:
    """A GPU: bytes of memory; and a second's floating-point operations that are used, bytes read, and bytes sent."""

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float


@dataclass(frozen=True)
class Rows:
    """Tokens of a prompt and of a response, responses of a prompt, and whether its tokens are there once."""

    prompt: int
    response: int
    responses: int
    packed: bool


@dataclass(frozen=True)
class Run:
    """All that an estimate depends on. `judge` is the preference model of GPO."""

    shape: ModelShape
    judge: ModelShape | None
    sharding: Sharding
    optimizer: Optimizer
    weight_bytes: int
    model_args: ModelConfig
    training_args: Any
    attention: str
    iterations: int | None
    rows: Rows
    hardware: Hardware

    @property
    def is_mixed(self) -> bool:
        return bool(self.training_args.bf16 or self.training_args.fp16)

    @property
    def is_quantized(self) -> bool:
        return self.model_args.load_in_4bit or self.model_args.load_in_8bit

    @property
    def precision(self) -> Precision:
        """Of the model as a whole, which activations depend on."""
        trained = not self.shape.uses_adapters
        return make_precision(self.sharding.backend, self.weight_bytes, self.is_mixed, trained)

    @property
    def trained_precision(self) -> Precision:
        """Of what is trained: PEFT makes adapters float32, but TRL keeps those of quantised models in 16 bits."""
        if not self.shape.uses_adapters:
            return self.precision
        return make_precision(self.sharding.backend, 2 if self.is_quantized else 4, self.is_mixed)

    @property
    def accumulates(self) -> bool:
        return self.training_args.gradient_accumulation_steps > 1

    @property
    def sends_each_batch(self) -> bool:
        """Whether gradients are sent for each batch that is accumulated, or once a step."""
        if self.sharding.backend == "zero":
            return self.sharding.stage >= 2
        options = self.training_args.accelerator_config.gradient_accumulation_kwargs or {}
        return bool(options.get("sync_each_batch", False))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an element of the gradients, as it is sent: `GPMTrainer` makes FSDP2 add up in float32."""
        precision = self.trained_precision
        if self.sharding.backend == "fsdp2" and self.is_mixed and isinstance(self.training_args, GPMConfig):
            return FLOAT32
        return precision.weights if self.sharding.backend == "ddp" else precision.compute

    @property
    def whole_gradients(self) -> float:
        """Bytes of gradients that are not divided: FSDP2 accumulates them so, until it sends them."""
        is_whole = self.sharding.backend == "fsdp2" and self.accumulates and not self.sends_each_batch
        return float(self.gradient_bytes * self.shape.trained) if is_whole else 0.0


@dataclass
class Report:
    """What is printed. `items` is how many of what a step holds, on all GPUs."""

    memory: dict[str, float]
    peak: float
    host: float
    seconds: dict[str, float]
    step_seconds: float
    items: float
    item: str
    unit: str
    not_timed: list[str]
    batch: Batch
    backend: str
    precision: str


def base_weights(run: Run) -> tuple[float, float]:
    """Bytes of what is not trained: what is divided among GPUs, and what is whole on each."""
    shape, bytes_of_others = run.shape, run.precision.weights
    if not shape.uses_adapters:
        return 0.0, 0.0
    frozen = shape.params - shape.trained
    if not run.is_quantized:
        return frozen * bytes_of_others, 0.0
    four = BYTES_4BIT_NESTED if run.model_args.use_bnb_nested_quant else BYTES_4BIT
    quantized = shape.linear_params * (four if run.model_args.load_in_4bit else BYTES_8BIT)
    others = (frozen - shape.linear_params) * bytes_of_others
    # Only a floating-point storage can be divided; neither FSDP2 nor ZeRO-3 takes the default, uint8.
    is_divided = run.model_args.bnb_4bit_quant_storage not in (None, "uint8")
    return (others + quantized, 0.0) if is_divided else (others, quantized)


def describe_precision(run: Run) -> str:
    """What weights are kept in, and computed in, in words."""
    kept, trained = run.precision, run.trained_precision
    master = " with a float32 master copy" if trained.has_master else ""
    if run.is_quantized:
        bits = 4 if run.model_args.load_in_4bit else 8
        return f"layers in {bits} bits, adapters in {DTYPES[trained.weights]}{master}"
    adapters = f", adapters in {DTYPES[trained.weights]}" if run.shape.uses_adapters else ""
    return f"weights in {DTYPES[kept.weights]}{adapters}{master}, computing in {DTYPES[kept.compute]}"


def describe_backend(sharding: Sharding) -> str:
    """How a model is divided, in words."""
    names = {"single": "nothing divided", "ddp": "DDP", "zero": f"ZeRO-{sharding.stage}", "fsdp2": "FSDP2"}
    offloaded = [name for name in ("optimizer", "weights") if getattr(sharding, f"offloads_{name}")]
    return names[sharding.backend] + (f", {' and '.join(offloaded)} offloaded" if offloaded else "")


def _training(
    run: Run, batch: Batch, work: dict[str, float], fixed: dict[str, float]
) -> tuple[dict[str, float], float, float]:
    """
    Memory by what it is for, its peak, and the machine's memory. `work` is what a batch needs, `fixed` what is there
    throughout.
    """
    divided, whole = base_weights(run)
    states = training_states(run.shape, divided, run.trained_precision, run.sharding, run.optimizer)
    states["weights"] += whole
    buffers = sharding_buffers(run.shape, run.trained_precision, run.sharding)
    if run.is_quantized:  # the largest map, as it is multiplied with
        buffers += 2 * run.shape.hidden_size * run.shape.intermediate_size
    fixed = {"buffers for dividing and casting": buffers, **fixed, "context, NCCL, fragments (assumed)": OVERHEAD}
    memory = {name: states[name] for name in ("weights", "gradients", "optimizer")}
    memory = {"weights": memory["weights"], "gradients": memory["gradients"], "optimizer states": memory["optimizer"]}
    if run.whole_gradients:
        memory["gradients, whole until they are sent"] = run.whole_gradients
    if states["step"]:
        memory["temporaries of the optimizer's step"] = states["step"]
    memory |= fixed
    last_work = last_activations(run.shape, batch, run.precision, run.attention)
    last = last_gradients(run.shape, has_head=len(work) > 1)  # logits beside the activations
    held = run.whole_gradients or (states["gradients"] if run.accumulates or run.sharding.backend == "zero" else 0.0)
    peak = peak_memory(states, sum(fixed.values()), sum(work.values()), last_work, last, held)
    per_machine = run.sharding.num_gpus // run.sharding.num_nodes
    return memory, peak, states["host"] * per_machine


def _step_seconds(run: Run, flops: float, steps: int) -> dict[str, float]:
    reductions = steps if run.sends_each_batch else 1
    traffic = sharding_traffic(run.shape, run.precision, run.sharding, run.gradient_bytes, steps, reductions)
    return {"computing": flops * steps / run.hardware.flops, "sending": traffic / run.hardware.link_bandwidth}


def _not_timed(run: Run) -> list[str]:
    not_timed = []
    if run.sharding.offloads_optimizer or run.sharding.offloads_weights:
        not_timed.append("moving what is offloaded, and the optimizer's step on CPUs")
    if samples_elsewhere(run):
        not_timed.append("sampling, by a vLLM server on GPUs that are not counted here")
    return not_timed


def samples_elsewhere(run: Run) -> bool:
    """Whether a vLLM server samples, on GPUs of its own."""
    args = run.training_args
    return getattr(args, "use_vllm", False) and args.vllm_mode == "server"


def estimate_gpm(run: Run) -> Report:
    """A training step of `GPMTrainer`, or with padded rows of `trl.RewardTrainer`."""
    args, rows, shape = run.training_args, run.rows, run.shape
    groups = args.per_device_train_batch_size
    budget = getattr(args, "max_tokens_per_batch", None)
    if budget is not None:
        groups = budget // make_batch(1, rows.responses, rows.prompt, rows.response, rows.packed).tokens
        if groups < 1:
            raise ValueError(
                f"`max_tokens_per_batch` is {budget}, which holds no prompt with its responses: raise it."
            )
    batch = make_batch(groups, rows.responses, rows.prompt, rows.response, rows.packed)
    logits = batch.response_tokens // 2 if getattr(args, "sft_loss_coef", 0) else 0  # of the preferred responses
    kept = activations(shape, batch, run.precision, run.attention, args.gradient_checkpointing)
    work = {"activations": kept}
    if logits:
        work["logits"] = response_logits(shape, logits, run.precision)
    memory, peak, host = _training(run, batch, work, {})
    steps = args.gradient_accumulation_steps
    seconds = _step_seconds(run, training_flops(shape, batch, args.gradient_checkpointing, logits), steps)
    pairs = rows.responses * (rows.responses - 1) // 2
    return Report(
        memory=memory | work,
        peak=peak,
        host=host,
        seconds=seconds,
        step_seconds=max(seconds.values()),
        items=groups * pairs * steps * run.sharding.num_gpus,
        item="comparison",
        unit=f"{groups} x {rows.responses} responses",
        not_timed=_not_timed(run),
        batch=batch,
        backend=describe_backend(run.sharding),
        precision=describe_precision(run),
    )


def sampled_rows(run: Run) -> int:
    """Completions that a GPU samples together."""
    args = run.training_args
    if run.iterations is None:
        return args.per_device_train_batch_size * args.steps_per_generation
    whole = args.num_generations // math.gcd(args.num_generations, run.sharding.num_gpus)
    return max(args.per_device_eval_batch_size // whole, 1) * whole


def _sampling_memory(run: Run) -> dict[str, float]:
    args, rows, shape = run.training_args, run.rows, run.shape
    if args.use_vllm:
        share = args.vllm_gpu_memory_utilization if args.vllm_mode == "colocate" else 0.0
        return {"vLLM": share * run.hardware.memory}
    sampled = sampled_rows(run)
    memory = {"keys and values of sampling": float(shape.kv_bytes(sampled * (rows.prompt + rows.response)))}
    gathers = args.ds3_gather_for_generation if run.sharding.backend == "zero" else True
    if run.sharding.gathers_weights and gathers:
        memory["weights gathered for sampling"] = 2.0 * shape.params
    return memory


def _scoring_seconds(run: Run, completions: float) -> dict[str, float]:
    """Of forward passes over what a GPU sampled in a step: the reference's, and the preference model's."""
    rows = run.rows
    row = make_batch(1, 1, rows.prompt, rows.response, packed=False)
    flops = {"reference": forward_flops(run.shape, row, rows.response) * completions}
    if run.judge is not None:
        group = make_batch(1, rows.responses, rows.prompt, rows.response, packed=True)
        flops["preference model"] = forward_flops(run.judge, group) * completions / rows.responses
    return {name: count / run.hardware.flops for name, count in flops.items()}


def estimate_gpo(run: Run) -> Report:
    """A training step of `GPOTrainer`, with its share of sampling and scoring."""
    args, rows, shape, sharding = run.training_args, run.rows, run.shape, run.sharding
    batch = make_batch(args.per_device_train_batch_size, 1, rows.prompt, rows.response, packed=False)
    reference, judge = 0.0, 0.0
    if not shape.uses_adapters:  # else it is the policy without its adapter
        kept = make_precision(sharding.backend, run.weight_bytes, run.is_mixed, trained=False)
        reference = frozen_weights(shape.params, kept.weights, sharding)
    if run.judge is not None:  # which only ZeRO-3 divides; 16 bits are assumed
        judge = frozen_weights(run.judge.params, 2, sharding if sharding.backend == "zero" else Sharding())
    fixed = {"reference": reference, "preference model": judge}
    work = {
        "activations": activations(shape, batch, run.precision, run.attention, args.gradient_checkpointing),
        "logits and their gradients": policy_logits(shape, batch.response_tokens, run.precision),
    }
    sampling = _sampling_memory(run)
    if run.iterations is not None:  # sampling and training are runs of their own
        sampling["preference model, in sampling"] = fixed.pop("preference model")
    # vLLM's share is taken throughout, the rest is freed before a batch is trained on.
    if args.use_vllm and run.iterations is None:
        fixed |= sampling
    memory, peak, host = _training(run, batch, work, fixed)
    if run.iterations is not None:
        peak = max(peak, memory["weights"] + OVERHEAD + sum(sampling.values()))
    elif not args.use_vllm:
        always = sum(fixed.values()) + OVERHEAD + memory["weights"] + memory["optimizer states"]
        always += memory["buffers for dividing and casting"]
        # DeepSpeed's buffer of gradients stays; others have none, but where sampling interrupts an accumulation.
        if sharding.backend == "zero" or args.steps_per_generation % args.gradient_accumulation_steps:
            always += run.whole_gradients or memory["gradients"]
        peak = max(peak, always + sum(sampling.values()))
    steps = args.gradient_accumulation_steps
    completions = args.per_device_train_batch_size * steps / args.num_iterations
    flops = training_flops(shape, batch, args.gradient_checkpointing, batch.response_tokens)
    seconds = _step_seconds(run, flops, steps)
    sampled = sampled_rows(run)
    decoding = decoding_seconds(shape, sampled, rows.prompt, rows.response, run.hardware.memory_bandwidth)
    other = {} if samples_elsewhere(run) else {"sampling (a lower bound)": decoding * completions / sampled}
    other |= _scoring_seconds(run, completions)
    return Report(
        memory=memory | work | sampling,
        peak=peak,
        host=host,
        seconds=seconds | other,
        step_seconds=max(seconds.values()) + sum(other.values()),
        items=completions * sharding.num_gpus,
        item="completion",
        unit=f"{args.per_device_train_batch_size} completions",
        not_timed=_not_timed(run),
        batch=batch,
        backend=describe_backend(sharding),
        precision=describe_precision(run),
    )
