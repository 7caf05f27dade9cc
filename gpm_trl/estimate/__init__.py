"""
Memory and time of a training step, on paper: formulas of plain numbers, for `gpm-trl estimate`.

Memory is in bytes, time in seconds, on one GPU. What is counted is what the libraries keep by design; what a run adds
(the allocator's fragments, the buffers of NCCL and the CUDA context) is the constant `OVERHEAD`. Tests hold the terms
for weights, gradients, optimizer and activations against what training steps of small models allocate.
"""

from .memory import (
    BYTES_4BIT,
    BYTES_4BIT_NESTED,
    BYTES_8BIT,
    GIB,
    OVERHEAD,
    activations,
    frozen_weights,
    last_activations,
    last_gradients,
    peak_memory,
    policy_logits,
    response_logits,
    sharding_buffers,
    training_states,
)
from .shapes import (
    OPTIMIZERS,
    Batch,
    ModelShape,
    Optimizer,
    Precision,
    Sharding,
    make_batch,
    make_precision,
)
from .time import (
    decoding_seconds,
    forward_flops,
    gpu_hours,
    sharding_traffic,
    training_flops,
)

__all__ = [
    "BYTES_4BIT",
    "BYTES_4BIT_NESTED",
    "BYTES_8BIT",
    "GIB",
    "OPTIMIZERS",
    "OVERHEAD",
    "Batch",
    "ModelShape",
    "Optimizer",
    "Precision",
    "Sharding",
    "activations",
    "decoding_seconds",
    "forward_flops",
    "frozen_weights",
    "gpu_hours",
    "last_activations",
    "last_gradients",
    "make_batch",
    "make_precision",
    "peak_memory",
    "policy_logits",
    "response_logits",
    "sharding_buffers",
    "sharding_traffic",
    "training_flops",
    "training_states",
]
