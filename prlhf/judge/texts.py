"""What a set of responses is like, by the text alone: length, variety, repetition, endings, refusals. Words are what white space
separates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from prlhf.data.comparisons import words

REPEATED = 4  # words of an n-gram whose repetition is counted
# How a refusal begins. A heuristic: it misses those that begin otherwise, and takes an apology that goes on to answer for one.
REFUSAL_OPENINGS = (
    "i can't", "i cannot", "i can not", "i'm sorry, but", "i am sorry, but", "i'm sorry, i ", "i am sorry, i ", "sorry, but", "sorry, i",
    "i apologize, but", "i'm unable", "i am unable", "i'm not able", "i am not able", "i won't", "i will not", "i must decline", "as an ai",
)  # fmt: skip


class Answered(NamedTuple):
    """A response: its text, and whether it ended by itself."""

    text: str
    finished: bool


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words, in order."""
    split = text.split()
    return [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): of all n-grams of all texts, the share that are different ones; None for none.

    It falls as there is more text, whoever wrote it.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else None


def repetition(texts: Sequence[str]) -> float | None:
    """Of the REPEATED-grams of all texts, the share that the same text has had before; None for none."""
    each = [ngrams(text, REPEATED) for text in texts]
    total = sum(map(len, each))
    return sum(len(grams) - len(set(grams)) for grams in each) / total if total else None


def is_refusal(text: str) -> bool:
    """Whether a response begins as one of REFUSAL_OPENINGS does."""
    return text.strip().lower().replace("\u2019", "'").startswith(REFUSAL_OPENINGS)


def described(responses: Sequence[Answered]) -> dict[str, Any]:
    """The numbers of some responses: mean words, and shares in [0, 1]."""
    texts = [response.text for response in responses]
    return {
        "responses": len(texts),
        "words": sum(map(words, texts)) / len(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition": repetition(texts),
        "finished": sum(response.finished for response in responses) / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "refusals": sum(map(is_refusal, texts)) / len(texts),
    }
