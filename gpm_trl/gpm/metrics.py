"""Training and evaluation metrics of comparisons, summed so that their means are right over batches and ranks."""

import torch

from ..models import GPMOutput

__all__ = ["group_statistics", "mean_metrics"]

# The columns of the statistics; each but the counts is a sum over what the count beside it counts.
STATISTICS = (
    "comparisons",
    "loss",
    "tie_rate",
    "probability",
    "margin",
    "abs_score",
    "decided",  # comparisons that the data decides: all but labels of exactly 0.5
    "accuracy",
    "responses",
    "embedding_norm",
    "groups",
    "gate_entropy",
    "num_tokens",
)
DENOMINATORS = {"accuracy": "decided", "embedding_norm": "responses", "gate_entropy": "groups"}
COUNTS = ("comparisons", "decided", "responses", "groups", "num_tokens")


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
    Sums over each group of a batch, one column for each of `STATISTICS`.

    One row a group, so that [`~accelerate.Accelerator.gather_for_metrics`] can drop the groups that a sampler repeated
    to give every rank as many.

    Args:
        batch (`dict`): A batch of [`~gpm_trl.data.DataCollatorForGroups`].
        output ([`GPMOutput`]): The model's output for it.
        groups (`torch.Tensor`): The group of each comparison, `(C,)`.
        scores (`torch.Tensor`): Scores of the comparisons, `(C,)`.
        losses (`torch.Tensor`): Losses of the comparisons, `(C,)`.
        preferred (`torch.Tensor`): 1 where the data prefers the first response, -1 the second, 0 neither, `(C,)`.

    Returns:
        `torch.Tensor`: Sums, `(G, len(STATISTICS))`, in float32.
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
    sums = scores.new_zeros(len(batch["group_rows"]), len(STATISTICS))
    for values, owners in ((per_comparison, groups), (per_response, batch["response_groups"])):
        for name, value in values.items():
            sums[:, STATISTICS.index(name)].index_add_(0, owners, value.to(sums.dtype))
    gate = output.scales[batch["group_rows"]]
    gate = gate / gate.sum(-1, keepdim=True)
    sums[:, STATISTICS.index("gate_entropy")] = torch.special.entr(gate).sum(-1)
    sums[:, STATISTICS.index("groups")] = 1
    return sums


def mean_metrics(sums: torch.Tensor, has_gate: bool) -> dict[str, float]:
    """
    Means from the sums of [`group_statistics`] over groups, batches and ranks, `(len(STATISTICS),)`.

    - `loss`: mean over comparisons;
    - `accuracy`: comparisons whose score has the sign of the data's preference, of those with a preference (a score of
      exactly 0 is no hit); absent if there is none;
    - `tie_rate`: comparisons with a score of exactly 0;
    - `probability`, `margin`, `abs_score`: mean `P(chosen > rejected)`, log-odds `s / tau` and `|s|`;
    - `embedding_norm`: mean L2 norm of the embeddings before normalisation;
    - `gate_entropy`: mean entropy of the normalised gate values, in nats, at most `log k`; absent without a gate.
    """
    total = dict(zip(STATISTICS, sums.tolist(), strict=True))
    names = [name for name in STATISTICS if name not in COUNTS and (has_gate or name != "gate_entropy")]
    counts = {name: total[DENOMINATORS.get(name, "comparisons")] for name in names}
    return {name: total[name] / counts[name] for name in names if counts[name] > 0}
