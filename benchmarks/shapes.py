"""Comparisons of random tokens with the lengths of real ones, for the benchmarks."""

import random
from typing import NamedTuple

from prlhf.encoding import EncodedComparison


class Shape(NamedTuple):
    """Mean and standard deviation of prompt and response lengths, in tokens."""

    prompt: tuple[int, int]
    response: tuple[int, int]


SHAPES = {
    "tldr": Shape((300, 100), (35, 12)),
    "chat": Shape((250, 0), (200, 80)),
    "short": Shape((40, 10), (12, 4)),
}


def random_comparisons(shape: str, count: int, vocabulary: int, users: int, seed: int = 0) -> list[EncodedComparison]:
    """`count` comparisons of uniformly random tokens, by users 1 .. `users` in turn; lengths are at least 2."""
    rng = random.Random(seed)

    def ids(length: tuple[int, int]) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(max(2, round(rng.gauss(*length))))]

    found = []
    for i in range(count):
        prompt = ids(SHAPES[shape].prompt)
        chosen, rejected = ids(SHAPES[shape].response), ids(SHAPES[shape].response)
        found.append(EncodedComparison(prompt, prompt, chosen, rejected, 1 + i % users))
    return found
