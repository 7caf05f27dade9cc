"""Scores and losses of preference models, signals and losses of policies that learn from them: functions of tensors.

Notation: the paper's (arXiv 2410.02197). `k` is the number of 2x2 blocks of the preference operator, so an embedding
has `2k` coordinates; `tau` is the temperature. `G` is the number of prompts and `K` that of responses sampled for each
of them from `pi_t`, the policy at the start of iteration t and the reference of that iteration. `...` stands for any
leading (broadcastable) dimensions.
"""

import math

import torch
import torch.nn.functional as F

__all__ = [
    "block_advantages",
    "block_scores",
    "dsppo_weights",
    "group_signal",
    "mean_preference",
    "policy_loss",
    "preference_cross_entropy",
    "preference_matrix",
    "preference_probability",
    "preference_regression",
    "preference_score",
]


def _even_and_odd(embeddings: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The even coordinates of `(..., 2k)`, scaled block by block, and the odd ones, `(..., k)` each."""
    width = embeddings.shape[-1]
    if width < 2 or width % 2:
        raise ValueError(f"An embedding has {width} coordinates, but is made of pairs: give an even number of them.")
    # Contiguous, so that sums over blocks take the same order in every memory layout.
    even, odd = embeddings[..., 0::2].contiguous(), embeddings[..., 1::2].contiguous()
    if scales is None:
        return even, odd
    if scales.shape[-1] != width // 2:
        raise ValueError(f"`scales` has {scales.shape[-1]} values, but there is one for each of {width // 2} blocks.")
    return even * scales, odd


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
    even_i, odd_i = _even_and_odd(v_i, scales)
    even_j, odd_j = _even_and_odd(v_j, scales)
    return (even_i * odd_j).sum(-1) - (even_j * odd_i).sum(-1)


def preference_matrix(embeddings: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Scores of all pairs among the K responses to one prompt: `S[..., i, j] = s(y_i > y_j | x)`, see
    [`preference_score`]. It is the sum of [`block_scores`] over the blocks, up to rounding.

    With the even and odd halves E and O of the embeddings, `M = (E * lambda) O^T` and `S = M - M^T`. So `S` is exactly
    antisymmetric with a zero diagonal, and equal bitwise to the pairwise scores. M is summed block by block rather
    than by a matrix product: a BLAS product changes the order of its sum with K, and then adding a response to the
    group would change the last bit of other scores.

    Args:
        embeddings (`torch.Tensor`): Embeddings of the responses to a prompt, `(..., K, 2k)`.
        scales (`torch.Tensor`, *optional*): Gate values of the prompt, `(..., k)`. `None` is no gate.

    Returns:
        `torch.Tensor`: Score matrices, `(..., K, K)`. Errors as of [`preference_score`].

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
    products = _block_products(embeddings, scales).sum(-1)  # (..., K, K)
    return products - products.transpose(-1, -2)


def block_scores(embeddings: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    What each of the k blocks adds to the scores of all pairs among the K responses to one prompt:

        S[..., i, j, l] = lambda_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l])

    Each block is exactly antisymmetric. Of a hybrid reward-cyclic model (HRC) the first is the transitive part,
    `C1 (r_i - r_j)`, and the sum of the others the cyclic part.

    Args:
        embeddings (`torch.Tensor`): Embeddings of the responses to a prompt, `(..., K, 2k)`.
        scales (`torch.Tensor`, *optional*): Weights of the blocks for the prompt, `(..., k)`. `None`
            is 1 for all.

    Returns:
        `torch.Tensor`: `(..., K, K, k)`, in units of tau. Errors as of [`preference_score`].

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import block_scores
    >>> embeddings = torch.tensor([[3.0, 1.0, 1.0, 0.0], [2.0, 1.0, 0.0, 1.0]])  # rewards of 3 and 2, and one block
    >>> block_scores(embeddings)[0, 1]
    tensor([1., 1.])

    ```
    """
    products = _block_products(embeddings, scales)
    return products - products.transpose(-2, -3)


def _block_products(embeddings: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The products M of [`preference_matrix`], not yet summed over blocks, `(..., K, K, k)`."""
    even, odd = _even_and_odd(embeddings, None if scales is None else scales.unsqueeze(-2))
    return even.unsqueeze(-2) * odd.unsqueeze(-3)


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

    Raises:
        ValueError: If `matrix` is not `(..., K, K)`.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import mean_preference
    >>> mean_preference(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([ 0.5000, -0.5000])

    ```
    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"`matrix` has the shape {tuple(matrix.shape)}, but must be (..., K, K).")
    return matrix.mean(-1)


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
    log_odds = (scores if margins is None else scores - margins) / temperature
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
    log_odds = (scores if margins is None else scores - margins) / temperature
    return (log_odds - targets.to(log_odds.dtype)) ** 2


# Policies

REGRESSIONS = ("gpo", "sppo", "dsppo")
LOSS_TYPES = (*REGRESSIONS, "sigmoid", "ipo", "rebel")
PAIRINGS = ("all", "best_worst")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {choices}.")


def group_signal(log_odds: torch.Tensor, loss_type: str) -> torch.Tensor:
    r"""
    What a policy learns about each response from the group that was sampled with it (Equation 5.2, and SPPO's):

        s_hat(y_i > pi_t | x)       = (1/K) sum_k s(y_i > y_k | x)                 all losses but the next two
        P_hat(y_i > pi_t | x) - 1/2 = (1/K) sum_k sigmoid(s(y_i > y_k | x)) - 1/2  "sppo" (Wu et al. 2024), "dsppo"

    DSPPO differs from SPPO in its log-odds, whose parts are weighted by [`dsppo_weights`].

    Rewards r of a Bradley-Terry model are the log-odds `r_i - r_j`, so that s_hat is `r_i - mean_k r_k`. Every
    response of the group is an opponent, also one that [`policy_loss`] leaves out: it was sampled from `pi_t` too.

    Args:
        log_odds (`torch.Tensor`): Scores of all pairs of a prompt divided by the temperature, `(..., K, K)`,
            antisymmetric: `preference_matrix(...) / temperature`.
        loss_type (`str`): The loss of [`policy_loss`] that the signal is for.

    Returns:
        `torch.Tensor`: Signals, `(..., K)`; those of a group add up to zero. In log-odds, and for `"sppo"` and
        `"dsppo"` in probability, from -1/2 to 1/2.

    Raises:
        ValueError: If `loss_type` is unknown, or `log_odds` is not `(..., K, K)`.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import group_signal
    >>> rewards = torch.tensor([3.0, 1.0, -1.0])
    >>> log_odds = rewards[:, None] - rewards[None, :]
    >>> group_signal(log_odds, "gpo"), group_signal(log_odds, "sppo")
    (tensor([ 2., 0., -2.]), tensor([ 0.2876, 0.0000, -0.2876]))

    ```
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if loss_type in ("sppo", "dsppo"):
        # sigmoid(s) - 1/2, but exactly antisymmetric in floating point, so that opposite pairs cancel.
        return mean_preference(torch.tanh(log_odds / 2) / 2)
    return mean_preference(log_odds)


def dsppo_weights(iteration: int, strength: float = 1.0) -> tuple[float, float]:
    r"""
    Weights of the transitive and the cyclic part of the log-odds in iteration t = 1, 2, ... of DSPPO (Huang et al.
    2026, arXiv 2605.17342):

        s_t = (1 + lambda / sqrt(t)) s_T + (1 - lambda / sqrt(t)) s_C

    Args:
        iteration (`int`): t, at least 1.
        strength (`float`, *optional*, defaults to `1.0`): lambda, the best of the paper's nine from -2 to 2; 0 is
            SPPO.

    Returns:
        `tuple[float, float]`: The weights of s_T and of s_C.

    Raises:
        ValueError: If t is below 1, or lambda is not finite.

    Example:

    ```python
    >>> from gpm_trl.preference import dsppo_weights
    >>> dsppo_weights(1), dsppo_weights(4)
    ((2.0, 0.0), (1.5, 0.5))

    ```
    """
    if iteration < 1 or not math.isfinite(strength):
        raise ValueError(f"t is {iteration} and lambda {strength}, but t counts from 1, and lambda must be finite.")
    return 1 + strength / math.sqrt(iteration), 1 - strength / math.sqrt(iteration)


def block_advantages(blocks: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The parts of the advantages of GPRL (Umer et al. 2026, arXiv 2605.18721), which add up to them:

        A_i = sum_l m_l lambda_l(x) A_l,i,   A_l,i = (u_l,i - mean_i u_l,i) / (std_i u_l,i + 1e-4)
        u_l,i = (1/K) sum_j s_l(y_i > y_j)

    Each block is normalised within the group, as GRPO does it with a reward (in TRL: the standard deviation has K - 1
    in its denominator). So no block outweighs the others by the size of its scores.

    Args:
        blocks (`torch.Tensor`): Log-odds by block, without gate: `block_scores(embeddings) / tau`, `(..., K, K, k)`.
        scales (`torch.Tensor`): Gate values lambda(x) of the prompt, `(..., k)`.
        weights (`torch.Tensor`, *optional*): m of the drift monitor, `(k,)`. `None` is 1 for all.

    Returns:
        `torch.Tensor`: Parts of the advantages, `(..., K, k)`; sum over the last dimension.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import block_advantages, block_scores
    >>> embeddings = torch.tensor([[3.0, 1.0, 1.0, 0.0], [2.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    >>> block_advantages(block_scores(embeddings), torch.tensor([0.5, 0.5])).sum(-1)
    tensor([ 1.0772, -0.2886, -0.7886])

    ```
    """
    u = blocks.mean(-2)  # (..., K, k)
    std = u.std(-2, correction=min(1, u.shape[-2] - 1), keepdim=True)
    normalised = (u - u.mean(-2, keepdim=True)) / (std + 1e-4)
    return normalised * (scales if weights is None else weights * scales).unsqueeze(-2)


def best_and_worst(signals: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The first of the valid responses with the highest and the last of those with the lowest signal, as masks `(G, K)`:
    two different ones wherever two are valid.
    """
    positions = torch.arange(signals.shape[-1], device=signals.device)
    best = signals.masked_fill(~valid, -math.inf).argmax(-1, keepdim=True)
    worst = positions[-1] - signals.masked_fill(~valid, math.inf).flip(-1).argmin(-1, keepdim=True)
    return valid & (positions == best), valid & (positions == worst)


def entering_responses(signals: torch.Tensor, valid: torch.Tensor, pairing: str) -> torch.Tensor:
    """
    Which responses of each prompt enter the loss, as a mask `(G, K)`: with the pairing `"all"` those that are valid
    (boolean, `(G, K)`), with `"best_worst"` two of these, by their signals `(G, K)`: see `best_and_worst`.
    """
    check_choice("pairing", pairing, PAIRINGS)
    if pairing == "all":
        return valid
    best, worst = best_and_worst(signals, valid)
    return best | worst


def response_loss(log_ratios: torch.Tensor, signals: torch.Tensor, beta: float) -> torch.Tensor:
    """
    Squared error of GPO and SPPO for each response, `(l - s / beta)^2` (Equation 5.3, log Z taken as 0): of log-ratios
    and signals `(...)`, and beta > 0, losses `(...)`.
    """
    return (log_ratios - signals / beta) ** 2


def _check_group(log_ratios: torch.Tensor, signals: torch.Tensor, valid: torch.Tensor) -> None:
    shape = tuple(log_ratios.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"`log_ratios` has the shape {shape}, but must be (G, K), K >= 2 responses a prompt.")
    for name, tensor in (("signals", signals), ("valid", valid)):
        if tensor.shape != shape:
            raise ValueError(f"`{name}` has the shape {tuple(tensor.shape)}, but must be {shape}, as `log_ratios`.")
    unusable = valid & ~signals.isfinite()
    if unusable.any():
        prompt, response = unusable.nonzero()[0].tolist()
        raise ValueError(
            f"`signals[{prompt}, {response}]` is {signals[prompt, response].item()}, but must be finite where `valid`."
        )


def _masked_mean(terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of each row over the mask, 0 where it is empty: `(G, N)` to `(G,)`."""
    return terms.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def policy_loss(
    log_ratios: torch.Tensor,
    signals: torch.Tensor,
    loss_type: str,
    beta: float,
    pairing: str = "all",
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Loss of a policy on the K responses to each prompt, from the log-ratios
    `l_i = log(pi_theta(y_i|x) / pi_t(y_i|x))` and the signals `s_i` of [`group_signal`]:

        "gpo", "sppo", "dsppo"  (l_i - s_i / beta)^2      for each response (Equation 5.3, log Z taken as 0)
        "sigmoid"               -log sigmoid(beta h)      for each pair with s_w > s_l (iterative DPO)
        "ipo"                   (h - 1 / (2 beta))^2      for each pair with s_w > s_l
        "rebel"                 (beta h - (s_w - s_l))^2  for each pair
        h = l_w - l_l

    GPO, SPPO and DSPPO differ in their signals only. The pairwise losses are those of Remark 5.2. The loss of a prompt
    is the mean over its terms, so that every prompt weighs the same however many of its responses and pairs enter, and
    0, with a gradient of 0, if none does.

    A pair with equal signals has no winner: `"sigmoid"` and `"ipo"` leave it out, also from the mean, and `"rebel"`,
    which needs no order, regresses h on 0. Equal is meant bitwise: signals that differ by rounding have a winner.

    Args:
        log_ratios (`torch.Tensor`): Log-ratios l of the responses, summed over tokens, `(G, K)`. For the
            length-normalised losses (LN-GPO, Remark E.1) divided by `|y|`, in tokens.
        signals (`torch.Tensor`): Signals of the responses, `(G, K)`. Constants: no gradient flows into them.
        loss_type (`str`): `"gpo"`, `"sppo"`, `"dsppo"`, `"sigmoid"`, `"ipo"` or `"rebel"`.
        beta (`float`): beta > 0, the weight of the KL divergence from `pi_t`; the paper's is 0.001, with `"gpo"`.
        pairing (`str`, *optional*, defaults to `"all"`): Which responses enter, and in the pairwise losses all pairs
            of them: `"all"`, or `"best_worst"` as in the authors' run, see `entering_responses`.
        valid (`torch.Tensor`, *optional*): `False` for responses that enter no term, whatever their values, e.g.
            truncated ones; boolean, `(G, K)`. `None` is all `True`.

    Returns:
        `torch.Tensor`: Losses of the prompts, `(G,)`.

    Raises:
        ValueError: If `loss_type` or `pairing` is unknown, `beta` is not positive and finite, a shape is wrong, K < 2,
            or the signal of a valid response is not finite.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.preference import policy_loss
    >>> log_ratios, signals = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, -2.0]])
    >>> policy_loss(log_ratios, signals, "gpo", beta=1.0), policy_loss(log_ratios, signals, "rebel", beta=1.0)
    (tensor([2.6667]), tensor([8.]))
    >>> policy_loss(log_ratios, signals, "gpo", beta=1.0, pairing="best_worst")
    tensor([4.])

    ```
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta` is {beta}, but must be positive and finite; the paper's is 0.001.")
    valid = torch.ones_like(log_ratios, dtype=torch.bool) if valid is None else valid
    _check_group(log_ratios, signals, valid)
    signals = signals.detach()
    enters = entering_responses(signals, valid, pairing)
    # What does not enter is set to 0 before the losses, so that a NaN or an infinity there gives no NaN gradient.
    log_ratios, signals = log_ratios.masked_fill(~enters, 0), signals.masked_fill(~enters, 0)
    if loss_type in REGRESSIONS:
        return _masked_mean(response_loss(log_ratios, signals, beta), enters)

    h = log_ratios.unsqueeze(-1) - log_ratios.unsqueeze(-2)  # (G, K, K), the first response over the second
    gaps = signals.unsqueeze(-1) - signals.unsqueeze(-2)
    pairs = enters.unsqueeze(-1) & enters.unsqueeze(-2)
    if loss_type == "rebel":  # the same for both orders of a pair
        return _masked_mean((beta * h - gaps).flatten(1) ** 2, pairs.triu(1).flatten(1))
    losses = -F.logsigmoid(beta * h) if loss_type == "sigmoid" else (h - 1 / (2 * beta)) ** 2
    return _masked_mean(losses.flatten(1), (pairs & (gaps > 0)).flatten(1))
