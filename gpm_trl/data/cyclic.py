"""Cyclic preference data: no scalar reward can order it."""

from collections.abc import Iterator
from string import ascii_uppercase

__all__ = ["letter_cycles"]


def letter_cycles(length: int = 4) -> Iterator[dict[str, str]]:
    """
    Preference cycles over the letters of the alphabet, from the authors' slides: of `length` = 4 letters A, B, C and
    D, A is preferred to B, B to C, C to D and D to A, and so on with E to H, as long as the alphabet lasts.

    A Bradley-Terry model orders the letters of a prompt, so it gets at most `length - 1` of the `length` comparisons
    right.

    Args:
        length (`int`, defaults to `4`): Letters in a cycle, 3 to 26.

    Yields:
        Rows with `prompt`, `chosen` and `rejected`; 24 of them for the default, of six prompts.

    Raises:
        ValueError: If `length` is below 3 or above 26.

    Example:

    ```python
    >>> from gpm_trl.data import letter_cycles
    >>> next(letter_cycles())
    {'prompt': 'Which character do you prefer? Choose one from [A, B, C, D].', 'chosen': 'A', 'rejected': 'B'}

    ```
    """
    if not 3 <= length <= len(ascii_uppercase):
        raise ValueError(f"`length` is {length}, but a cycle has 3 to {len(ascii_uppercase)} letters.")
    for start in range(0, len(ascii_uppercase) - length + 1, length):
        letters = ascii_uppercase[start : start + length]
        prompt = f"Which character do you prefer? Choose one from [{', '.join(letters)}]."
        for index, letter in enumerate(letters):
            yield {"prompt": prompt, "chosen": letter, "rejected": letters[(index + 1) % length]}
