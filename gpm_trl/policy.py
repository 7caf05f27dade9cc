"""Signals and losses of a policy that learns from preferences over its own samples, as pure functions of tensors.

Notation: the paper's (arXiv 2410.02197, Section 5). `G` is the number of prompts and `K` that of responses sampled for
each of them from `pi_t`, the policy at the start of iteration t and the reference of that iteration; `...` stands for
any leading dimensions.
"""

import math

import torch
import torch.nn.functional as F

from .preference import mean_preference

__all__ = ["best_and_worst", "entering_responses", "group_signal", "policy_loss", "response_loss"]

LOSS_TYPES = ("gpo", "sppo", "sigmoid", "ipo", "rebel")
PAIRINGS = ("all", "best_worst")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {choices}.")


def group_signal(log_odds: torch.Tensor, loss_type: str) -> torch.Tensor:
    r"""
    What a policy learns about each response from the group that was sampled with it (Equation 5.2, and SPPO's):

        s_hat(y_i > pi_t | x)       = (1/K) sum_k s(y_i > y_k | x)                 all losses but SPPO's
        P_hat(y_i > pi_t | x) - 1/2 = (1/K) sum_k sigmoid(s(y_i > y_k | x)) - 1/2  SPPO's (Wu et al. 2024)

    Rewards r of a Bradley-Terry model are the log-odds `r_i - r_j`, so that s_hat is `r_i - mean_k r_k`. Every
    response of the group is an opponent, also one that [`policy_loss`] leaves out: it was sampled from `pi_t` too.

    Args:
        log_odds (`torch.Tensor`): Scores of all pairs of a prompt divided by the temperature, `(..., K, K)`,
            antisymmetric: `preference_matrix(...) / temperature`.
        loss_type (`str`): The loss of [`policy_loss`] that the signal is for.

    Returns:
        `torch.Tensor`: Signals, `(..., K)`; those of a group add up to zero. In log-odds, and for `"sppo"` in
        probability, from -1/2 to 1/2.

    Raises:
        ValueError: If `loss_type` is unknown, or `log_odds` is not `(..., K, K)`.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.policy import group_signal
    >>> rewards = torch.tensor([3.0, 1.0, -1.0])
    >>> log_odds = rewards[:, None] - rewards[None, :]
    >>> group_signal(log_odds, "gpo"), group_signal(log_odds, "sppo")
    (tensor([ 2., 0., -2.]), tensor([ 0.2876, 0.0000, -0.2876]))

    ```
    """
    _check_choice("loss_type", loss_type, LOSS_TYPES)
    if loss_type == "sppo":
        # sigmoid(s) - 1/2, but exactly antisymmetric in floating point, so that opposite pairs cancel.
        return mean_preference(torch.tanh(log_odds / 2) / 2)
    return mean_preference(log_odds)


def _check_group(log_ratios: torch.Tensor, signals: torch.Tensor, valid: torch.Tensor) -> None:
    shape = tuple(log_ratios.shape)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"`log_ratios` has the shape {shape}, but must be (G, K), one row a prompt, with K >= 2: a response is "
            "compared with the others to the same prompt. Sample at least 2."
        )
    if signals.shape != log_ratios.shape:
        raise ValueError(
            f"`signals` has the shape {tuple(signals.shape)} and `log_ratios` {shape}, but there is one signal for "
            "each response: pass `group_signal(log_odds, loss_type)` with log-odds of (G, K, K)."
        )
    if valid.shape != log_ratios.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"`valid` has the shape {tuple(valid.shape)} and is {valid.dtype}, but must be {shape} and torch.bool, "
            "`True` for each response that takes part."
        )
    unusable = valid & ~signals.isfinite()
    if unusable.any():
        prompt, response = unusable.nonzero()[0].tolist()
        raise ValueError(
            f"`signals[{prompt}, {response}]` is {signals[prompt, response].item()}, but the signal of a response "
            "that takes part must be finite. If it could not be scored, leave it out: `valid` is `False` there."
        )


def entering_responses(signals: torch.Tensor, valid: torch.Tensor, pairing: str) -> torch.Tensor:
    """
    Which responses of each prompt enter the loss.

    Args:
        signals (`torch.Tensor`): Signals of the responses, `(G, K)`.
        valid (`torch.Tensor`): `False` for responses that enter in no case; boolean, `(G, K)`.
        pairing (`str`): `"all"` that are valid, or `"best_worst"`, see [`best_and_worst`].

    Returns:
        `torch.Tensor`: A mask, `(G, K)`.

    Raises:
        ValueError: If `pairing` is unknown.
    """
    _check_choice("pairing", pairing, PAIRINGS)
    if pairing == "all":
        return valid
    best, worst = best_and_worst(signals, valid)
    return best | worst


def best_and_worst(signals: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The first of the valid responses with the highest and the last of those with the lowest signal, as masks `(G, K)`:
    two different ones wherever two are valid.
    """
    positions = torch.arange(signals.shape[-1], device=signals.device)
    best = signals.masked_fill(~valid, -math.inf).argmax(-1, keepdim=True)
    worst = positions[-1] - signals.masked_fill(~valid, math.inf).flip(-1).argmin(-1, keepdim=True)
    return valid & (positions == best), valid & (positions == worst)


def response_loss(log_ratios: torch.Tensor, signals: torch.Tensor, beta: float) -> torch.Tensor:
    """
    Squared error of GPO and SPPO for each response, `(l - s / beta)^2` (Equation 5.3, log Z taken as 0).

    Args:
        log_ratios (`torch.Tensor`): Log-ratios l, `(...)`.
        signals (`torch.Tensor`): Signals s of [`group_signal`], `(...)`.
        beta (`float`): beta > 0.

    Returns:
        `torch.Tensor`: Losses, `(...)`.
    """
    return (log_ratios - signals / beta) ** 2


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

        "gpo", "sppo"  (l_i - s_i / beta)^2               for each response (Equation 5.3, log Z taken as 0)
        "sigmoid"      -log sigmoid(beta h)               for each pair with s_w > s_l (iterative DPO)
        "ipo"          (h - 1 / (2 beta))^2               for each pair with s_w > s_l
        "rebel"        (beta h - (s_w - s_l))^2           for each pair
        h = l_w - l_l

    GPO and SPPO differ in their signals only. The pairwise losses are those of Remark 5.2. The loss of a prompt is the
    mean over its terms, so that every prompt weighs the same however many of its responses and pairs enter, and 0,
    with a gradient of 0, if none does.

    A pair with equal signals has no winner: `"sigmoid"` and `"ipo"` leave it out, also from the mean, and `"rebel"`,
    which needs no order, regresses h on 0. Equal is meant bitwise: signals that differ by rounding have a winner.

    Args:
        log_ratios (`torch.Tensor`): Log-ratios l of the responses, summed over tokens, `(G, K)`. For the
            length-normalised losses (LN-GPO, Remark E.1) divided by `|y|`, in tokens.
        signals (`torch.Tensor`): Signals of the responses, `(G, K)`. Constants: no gradient flows into them.
        loss_type (`str`): `"gpo"`, `"sppo"`, `"sigmoid"`, `"ipo"` or `"rebel"`.
        beta (`float`): beta > 0, the weight of the KL divergence from `pi_t`. The authors' run has 0.001, with
            `"gpo"`.
        pairing (`str`, *optional*, defaults to `"all"`): Which responses enter, and in the pairwise losses all pairs
            of them: `"all"`, or `"best_worst"` as in the authors' run, see [`entering_responses`].
        valid (`torch.Tensor`, *optional*): `False` for responses that enter no term, whatever their values, e.g.
            truncated ones; boolean, `(G, K)`. `None` is all `True`.

    Returns:
        `torch.Tensor`: Losses of the prompts, `(G,)`.

    Raises:
        ValueError: If `loss_type` or `pairing` is unknown, `beta` is not positive and finite, a shape or the type of
            `valid` is wrong, K < 2, or the signal of a valid response is not finite.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl.policy import policy_loss
    >>> log_ratios, signals = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, -2.0]])
    >>> policy_loss(log_ratios, signals, "gpo", beta=1.0), policy_loss(log_ratios, signals, "rebel", beta=1.0)
    (tensor([2.6667]), tensor([8.]))
    >>> policy_loss(log_ratios, signals, "gpo", beta=1.0, pairing="best_worst")
    tensor([4.])

    ```
    """
    _check_choice("loss_type", loss_type, LOSS_TYPES)
    if not 0 < beta < math.inf:
        raise ValueError(f"`beta` is {beta}, but must be positive and finite; the paper's is 0.001.")
    valid = torch.ones_like(log_ratios, dtype=torch.bool) if valid is None else valid
    _check_group(log_ratios, signals, valid)
    signals = signals.detach()
    enters = entering_responses(signals, valid, pairing)
    # What does not enter is set to 0 before the losses, so that a NaN or an infinity there gives no NaN gradient.
    log_ratios, signals = log_ratios.masked_fill(~enters, 0), signals.masked_fill(~enters, 0)
    if loss_type in ("gpo", "sppo"):
        return _masked_mean(response_loss(log_ratios, signals, beta), enters)

    h = log_ratios.unsqueeze(-1) - log_ratios.unsqueeze(-2)  # (G, K, K), the first response over the second
    gaps = signals.unsqueeze(-1) - signals.unsqueeze(-2)
    pairs = enters.unsqueeze(-1) & enters.unsqueeze(-2)
    if loss_type == "rebel":  # the same for both orders of a pair
        return _masked_mean((beta * h - gaps).flatten(1) ** 2, pairs.triu(1).flatten(1))
    losses = -F.logsigmoid(beta * h) if loss_type == "sigmoid" else (h - 1 / (2 * beta)) ** 2
    return _masked_mean(losses.flatten(1), (pairs & (gaps > 0)).flatten(1))


def _masked_mean(terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of each row over the mask, 0 where it is empty: `(G, N)` to `(G,)`."""
    return terms.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)
