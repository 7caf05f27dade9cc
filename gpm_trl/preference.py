"""Scores, probabilities, group means and losses of a general preference model, as pure functions of tensors.

Notation: the paper's (arXiv 2410.02197). `k` is the number of 2x2 blocks of the preference operator, so an embedding
has `2k` coordinates; `tau` is the temperature; `...` stands for any leading (broadcastable) dimensions.
"""

import torch
import torch.nn.functional as F

__all__ = [
    "mean_preference",
    "preference_cross_entropy",
    "preference_matrix",
    "preference_probability",
    "preference_regression",
    "preference_score",
]


def _even_and_odd(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split `(..., 2k)` into its even and odd coordinates, `(..., k)` each."""
    width = embeddings.shape[-1]
    if width < 2 or width % 2:
        raise ValueError(
            f"An embedding has {width} coordinates, but the preference operator is made of 2x2 blocks: the last "
            "dimension must be even and at least 2."
        )
    # Contiguous, so that sums over blocks take the same order in every memory layout.
    return embeddings[..., 0::2].contiguous(), embeddings[..., 1::2].contiguous()


def _check_scales(scales: torch.Tensor | None, num_blocks: int) -> None:
    if scales is not None and scales.shape[-1] != num_blocks:
        raise ValueError(
            f"`scales` has {scales.shape[-1]} values in its last dimension, but the embeddings have {num_blocks} "
            "blocks: the gate gives one scale for each pair of coordinates."
        )


def preference_score(v_i: torch.Tensor, v_j: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Score of response i over response j to the same prompt (Definition 4.3, with the scale gate of Section 4.2):

        s(y_i > y_j | x) = v_i^T D R^T D v_j = sum_l lambda_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l])

    Antisymmetry is exact in floating point: `preference_score(a, b, g) == -preference_score(b, a, g)` and
    `preference_score(a, a, g) == 0` bitwise, outside of a compiler that fuses multiplications and additions.

    Args:
        v_i (`torch.Tensor`): Embeddings of the first responses, `(..., 2k)`.
        v_j (`torch.Tensor`): Embeddings of the second responses, `(..., 2k)`.
        scales (`torch.Tensor`, *optional*): Gate values lambda(x) >= 0 of the prompts, `(..., k)`. `None` is no gate,
            i.e. all ones.

    Returns:
        `torch.Tensor`: Scores, `(...)`, in units of tau: divide by the temperature to get log-odds.

    Raises:
        ValueError: If the embedding width is odd, or `scales` does not have one value per block.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import preference_score
    >>> rock, paper = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> preference_score(rock, paper).item(), preference_score(paper, rock).item()
    (1.0, -1.0)

    ```
    """
    even_i, odd_i = _even_and_odd(v_i)
    even_j, odd_j = _even_and_odd(v_j)
    _check_scales(scales, even_i.shape[-1])
    if scales is not None:
        even_i, even_j = even_i * scales, even_j * scales
    return (even_i * odd_j).sum(-1) - (even_j * odd_i).sum(-1)


def preference_matrix(embeddings: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Scores of all pairs among the K responses to one prompt: `S[..., i, j] = s(y_i > y_j | x)`, see
    [`preference_score`].

    With the even and odd halves E and O of the embeddings, `M = (E * lambda) O^T` and `S = M - M^T`. So `S` is exactly
    antisymmetric with a zero diagonal, and equal bitwise to the pairwise scores. M is summed block by block rather
    than by a matrix product: a BLAS product changes the order of its sum with K, and then adding a response to the
    group would change the last bit of other scores.

    Args:
        embeddings (`torch.Tensor`): Embeddings of the responses to a prompt, `(..., K, 2k)`.
        scales (`torch.Tensor`, *optional*): Gate values of the prompt, `(..., k)`. `None` is no gate.

    Returns:
        `torch.Tensor`: Score matrices, `(..., K, K)`.

    Raises:
        ValueError: If the embedding width is odd, or `scales` does not have one value per block.

    Example:

    ```python
    >>> import math, torch
    >>> from gpm_trl.preference import preference_matrix
    >>> angles = torch.arange(3) * 2 * math.pi / 3  # rock-paper-scissors on the unit circle
    >>> matrix = preference_matrix(torch.stack([angles.cos(), angles.sin()], dim=-1))
    >>> matrix.sign().int().tolist()
    [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]

    ```
    """
    even, odd = _even_and_odd(embeddings)
    _check_scales(scales, even.shape[-1])
    if scales is not None:
        even = even * scales.unsqueeze(-2)
    products = (even.unsqueeze(-2) * odd.unsqueeze(-3)).sum(-1)  # (..., K, K)
    return products - products.transpose(-1, -2)


def preference_probability(scores: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    r"""
    Probability that the first response is preferred (Equation 3.1): `P(y_i > y_j | x) = sigmoid(s / tau)`.

    Args:
        scores (`torch.Tensor`): Scores of [`preference_score`] or [`preference_matrix`], any shape.
        temperature (`float` or `torch.Tensor`): tau > 0; the model's, `model.config.temperature`, or the one in its
            output, which is also right where it is learned.

    Returns:
        `torch.Tensor`: Probabilities, of the shape of `scores`.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import preference_probability
    >>> preference_probability(torch.tensor([0.0, 0.1, -0.1]), temperature=0.1)
    tensor([0.5000, 0.7311, 0.2689])

    ```
    """
    return torch.sigmoid(scores / temperature)


def mean_preference(matrix: torch.Tensor) -> torch.Tensor:
    r"""
    Mean preference of each response over the group it was sampled with (Equation 5.2):
    `s_hat(y_i > pi | x) = (1/K) sum_k s(y_i > y_k | x)`, over all K responses, the self term included (it is 0).

    The paper's s is in log-odds: pass `preference_matrix(...) / temperature`. With a matrix of probabilities the
    result is SPPO's `P_hat`, whose self term is 1/2.

    Args:
        matrix (`torch.Tensor`): Scores (log-odds) or probabilities of all pairs of a prompt, `(..., K, K)`.

    Returns:
        `torch.Tensor`: Mean preferences, `(..., K)`. Those of an antisymmetric matrix add up to zero.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import mean_preference
    >>> mean_preference(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([ 0.5000, -0.5000])

    ```
    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"`matrix` must be (..., K, K), one row and one column a response, got {tuple(matrix.shape)}."
        )
    return matrix.mean(-1)


def _log_odds(scores: torch.Tensor, temperature: float | torch.Tensor, margins: torch.Tensor | None) -> torch.Tensor:
    return (scores if margins is None else scores - margins) / temperature


def preference_cross_entropy(
    scores: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor,
    margins: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Cross entropy between given and modelled preferences (Equation A.1), per comparison:

        loss = -[p log sigmoid(z) + (1 - p) log sigmoid(-z)],   z = (s - margin) / tau

    Use [`preference_regression`] where the data gives scores (log-odds) rather than probabilities.

    Args:
        scores (`torch.Tensor`): Scores s of the first response over the second, `(C,)`.
        labels (`torch.Tensor`): `p = P_D(y_i > y_j)` in [0, 1], `(C,)`; 1 where the first is simply preferred, 0.5 a
            tie.
        temperature (`float` or `torch.Tensor`): tau > 0.
        margins (`torch.Tensor`, *optional*): What the score must exceed, `(C,)`, in the units of the score.

    Returns:
        `torch.Tensor`: Losses, `(C,)`. The caller takes the mean, so that it can be one over several batches and
        ranks.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import preference_cross_entropy
    >>> preference_cross_entropy(torch.tensor([0.2, 0.2]), torch.tensor([1.0, 0.5]), temperature=0.1)
    tensor([0.1269, 1.1269])

    ```
    """
    log_odds = _log_odds(scores, temperature, margins)
    return F.binary_cross_entropy_with_logits(log_odds, labels.to(log_odds.dtype), reduction="none")


def preference_regression(
    scores: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor,
    margins: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Squared error to given scores (Appendix A.2), per comparison: `loss = ((s - margin) / tau - s_D)^2`.

    Use [`preference_cross_entropy`] where the data gives winners or probabilities.

    Args:
        scores (`torch.Tensor`): Scores s of the first response over the second, `(C,)`.
        targets (`torch.Tensor`): Given scores s_D, `(C,)`, in log-odds.
        temperature (`float` or `torch.Tensor`): tau > 0.
        margins (`torch.Tensor`, *optional*): What the score must exceed, `(C,)`, in the units of the score.

    Returns:
        `torch.Tensor`: Losses, `(C,)`.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import preference_regression
    >>> preference_regression(torch.tensor([0.2]), torch.tensor([1.5]), temperature=0.1)
    tensor([0.2500])

    ```
    """
    log_odds = _log_odds(scores, temperature, margins)
    return (log_odds - targets.to(log_odds.dtype)) ** 2
