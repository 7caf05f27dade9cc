"""Cyclic preference data, which no scalar reward can order: UltraFeedback's (Section 6.2, Appendix F), letters."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from string import ascii_uppercase
from typing import Any

__all__ = ["ASPECTS", "RatedPrompt", "letter_cycles", "ultrafeedback_cycles"]

# In the paper's cyclic order: the last is followed by the first.
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
RATINGS = {str(rating): rating for rating in range(1, 6)}


@dataclass(frozen=True)
class RatedPrompt:
    """A row of UltraFeedback: a prompt, its responses, and how each was rated."""

    prompt: str
    responses: list[str]
    ratings: list[dict[str, int]]  # of each response, from 1 to 5, by aspect; aspects without one are absent

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "RatedPrompt":
        """
        Read a row of openbmb/UltraFeedback: `instruction` and `completions`, each with `response` and `annotations`.
        The annotation of an aspect has a `Rating`, "1" to "5" (or such an integer), or "N/A"; what is missing is no
        rating. Raises `ValueError` if the row is of another form.
        """
        prompt, completions = row.get("instruction"), row.get("completions")
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(completions, list):
            raise ValueError("The row has no `instruction` that is a text, or no list of `completions`.")
        responses, ratings = [], []
        for index, completion in enumerate(completions):
            if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
                raise ValueError(f"Completion {index} has no `response` that is a text.")
            responses.append(completion["response"])
            ratings.append({})
            for aspect in ASPECTS:
                try:
                    rating = ((completion.get("annotations") or {}).get(aspect) or {}).get("Rating")
                    if rating not in (None, "N/A"):
                        ratings[-1][aspect] = RATINGS[str(rating)]
                except (AttributeError, KeyError) as error:
                    found = f"Completion {index} has the annotations {completion.get('annotations')!r:.300}"
                    raise ValueError(f'{found}, but the `Rating` of {aspect} is "1" to "5", or "N/A".') from error
        return cls(prompt, responses, ratings)

    def cycles(self, omit: str) -> list[tuple[int, int, int]]:
        """
        All cycles of three distinct responses, see [`ultrafeedback_cycles`], as indices (A, B, C) in lexicographic
        order. Where (B, C, A) or (C, A, B) is one, too, it is the same cycle, and only the first is returned.
        """
        found: dict[tuple[int, ...], tuple[int, int, int]] = {}
        for a, b, c in permutations(range(len(self.responses)), 3):
            if len({self.responses[index].strip() for index in (a, b, c)}) < 3:
                continue
            steps = _steps((a, b, c), omit)
            # Without a rating, a response is neither better nor worse.
            if all(self.ratings[i].get(aspect, 0) > self.ratings[j].get(aspect, 6) for i, j, aspect in steps):
                found.setdefault(min((a, b, c), (b, c, a), (c, a, b)), (a, b, c))
        return list(found.values())

    def comparisons(self, cycle: tuple[int, int, int], omit: str) -> list[dict[str, Any]]:
        """The rows A > B, B > C and C > A of a cycle (A, B, C): `prompt`, `chosen`, `rejected` and the `aspect`."""
        return [
            {"prompt": self.prompt, "chosen": self.responses[i], "rejected": self.responses[j], "aspect": aspect}
            for i, j, aspect in _steps(cycle, omit)
        ]


def _steps(cycle: tuple[int, int, int], omit: str) -> Iterator[tuple[int, int, str]]:
    """(A, B, a1), (B, C, a2), (C, A, a3) of a cycle (A, B, C): the aspects but `omit`, in the order of [`ASPECTS`]."""
    if omit not in ASPECTS:
        raise ValueError(f"`omit` is {omit!r}, but the aspects are {', '.join(ASPECTS)}.")
    a, b, c = cycle
    return zip((a, b, c), (b, c, a), (aspect for aspect in ASPECTS if aspect != omit), strict=True)


def ultrafeedback_cycles(rows: Iterable[dict[str, Any]], omit: str) -> Iterator[dict[str, Any]]:
    """
    Preference cycles among the responses of a prompt, from the ratings of UltraFeedback.

    The aspects instruction following, honesty, truthfulness and helpfulness, in this order and without one of them,
    are a1, a2 and a3. Three responses A, B and C of a prompt are a cycle if A is rated above B on a1, B above C on a2
    and C above A on a3. A prompt gives one cycle: its first, in lexicographic order of the indices of (A, B, C).
    Responses that are identical, but for white space around them, are in no cycle together. The counts are not the
    paper's: see recipes/cyclic.

    Args:
        rows (`Iterable[dict]`): Rows of openbmb/UltraFeedback: see [`RatedPrompt.from_row`].
        omit (`str`): The aspect to leave out, e.g. `"honesty"`.

    Yields:
        Rows with `prompt`, `chosen`, `rejected`, the `aspect` that decided and `cycle`, the number of the row that the
        comparison is from. Those of a cycle follow each other: A > B, B > C, C > A.

    Raises:
        ValueError: If `omit` is no aspect or a row is malformed; the message gives the row's number, from 1.

    Example:

    ```python
    >>> from gpm_trl.data.cyclic import ASPECTS, ultrafeedback_cycles
    >>> completions = [
    ...     {"response": bird, "annotations": {aspect: {"Rating": digit} for aspect, digit in zip(ASPECTS, ratings)}}
    ...     for bird, ratings in (("Crow", "2311"), ("Gull", "1231"), ("Wren", "3121"))
    ... ]
    >>> rows = ultrafeedback_cycles([{"instruction": "Name a bird.", "completions": completions}], omit="helpfulness")
    >>> [(row["chosen"], row["rejected"]) for row in rows]
    [('Crow', 'Gull'), ('Gull', 'Wren'), ('Wren', 'Crow')]

    ```
    """
    for number, row in enumerate(rows):
        try:
            rated = RatedPrompt.from_row(row)
        except ValueError as error:
            raise ValueError(f"Row {number + 1}: {error}") from error
        for cycle in rated.cycles(omit)[:1]:
            for comparison in rated.comparisons(cycle, omit):
                yield {**comparison, "cycle": number}


def letter_cycles(length: int = 4) -> Iterator[dict[str, str]]:
    """
    Preference cycles over the letters of the alphabet, from the authors' slides: of `length` = 4 letters A, B, C and
    D, A is preferred to B, B to C, C to D and D to A, and so on with E to H, as long as the alphabet lasts. A
    Bradley-Terry model gets at most `length - 1` of the `length` comparisons of a prompt right.

    Args:
        length (`int`, defaults to `4`): Letters in a cycle, 3 to 26; other numbers raise `ValueError`.

    Yields:
        Rows with `prompt`, `chosen` and `rejected`; 24 of them for the default, of six prompts.

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
