"""Training and evaluation metrics of comparisons, summed so that their means are right over batches and ranks."""

import torch

from ..models import GPMOutput

__all__ = ["group_statistics", "mean_metrics"]

# The columns of the statistics: sums, and the count that the mean of each is over. Counts have none.
STATISTICS = {
    "comparisons": None,
    "loss": "comparisons",
    "tie_rate": "comparisons",
    "probability": "comparisons",
    "margin": "comparisons",
    "abs_score": "comparisons",
    "decided": None,  # comparisons that the data decides: all but labels of exactly 0.5
    "accuracy": "decided",
    "responses": None,
    "embedding_norm": "responses",
    "gated": None,  # groups, of a model with a gate
    "gate_entropy": "gated",
    "num_tokens": None,
}


@torch.no_grad()
def group_statistics(
    batch: dict[str, torch.Tensor],
    output: GPMOutput,
    groups: torch.Tensor,
    scores: torch.Tensor,
    losses: torch.Tensor,
    preferred: torch.Tensor,
) -> torch.Tensor:
    """
    Sums over each group of a batch, one column for each of `STATISTICS`: `(G, len(STATISTICS))`, in float32.

    One row a group, so that [`~accelerate.Accelerator.gather_for_metrics`] can drop the groups that a sampler repeated
    to give every rank as many. `batch` is one of [`~gpm_trl.data.DataCollatorForGroups`], `output` the model's for it.
    Of its comparisons, `(C,)` each, are the `groups`, the `scores`, the `losses`, and `preferred`: 1 where the data
    prefers the first response, -1 the second, 0 neither.
    """
    log_odds = scores / output.temperature
    per_comparison = {
        "comparisons": torch.ones_like(scores),
        "loss": losses,
        "tie_rate": (scores == 0).float(),
        "probability": torch.sigmoid(log_odds),
        "margin": log_odds,
        "abs_score": scores.abs(),
        "decided": (preferred != 0).float(),
        "accuracy": (scores * preferred > 0).float(),
    }
    layout = batch.get("shared_prefix_layout")
    lengths = batch["attention_mask"].sum(-1) if layout is None else scores.new_tensor(layout.row_lengths)
    rows = batch["response_rows"]  # a row that several groups have counts for each, as in other batches
    per_response = {
        "responses": torch.ones_like(output.embedding_norms[rows]),
        "embedding_norm": output.embedding_norms[rows],
        "num_tokens": lengths[rows].float(),
    }
    zeros = scores.new_zeros(len(batch["group_rows"]))
    sums = {"gated": zeros, "gate_entropy": zeros}
    if output.gate is not None:
        gate = output.gate[batch["group_rows"]]
        gate = gate / gate.sum(-1, keepdim=True)
        sums = {"gated": zeros + 1, "gate_entropy": torch.special.entr(gate).sum(-1)}
    for values, owners in ((per_comparison, groups), (per_response, batch["response_groups"])):
        sums |= {name: zeros.index_add(0, owners, value.to(zeros.dtype)) for name, value in values.items()}
    return torch.stack([sums[name] for name in STATISTICS], dim=-1)


def mean_metrics(sums: torch.Tensor) -> dict[str, float]:
    """
    Means from the sums of [`group_statistics`] over groups, batches and ranks, `(len(STATISTICS),)`.

    - `loss`: mean over comparisons;
    - `accuracy`: comparisons whose score has the sign of the data's preference, of those with a preference (a score of
      exactly 0 is no hit); absent if there is none;
    - `tie_rate`: comparisons with a score of exactly 0;
    - `probability`, `margin`, `abs_score`: mean `P(chosen > rejected)`, log-odds `s / tau` and `|s|`;
    - `embedding_norm`: mean L2 norm of what the embedding head gives;
    - `gate_entropy`: mean entropy of the normalised gate values, in nats, at most `log k`; absent without a gate.
    """
    total = dict(zip(STATISTICS, sums.tolist(), strict=True))
    return {name: total[name] / total[count] for name, count in STATISTICS.items() if count and total[count] > 0}
