"""What results of several test files are checked against."""

import numpy as np


def duality_gap(scores, policy) -> float:
    """
    What the best responses to a policy that plays against itself gain on both sides (Theorem 5.1), of scores or
    probabilities `(n, n)`: `max_i sum_j s[i, j] p[j] - min_j sum_i p[i] s[i, j]`; 0 for a von Neumann winner alone.
    """
    scores, policy = np.asarray(scores, dtype=float), np.asarray(policy, dtype=float)
    return float((scores @ policy).max() - (policy @ scores).min())
