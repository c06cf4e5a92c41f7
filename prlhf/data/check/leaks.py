"""What held-out comparisons share with other files: prompts, responses, pairs, and responses that their user judged in training.

Texts are compared `as_read`. The last kind can make a model look personal: a model that remembers a user's training votes on
the responses of a held-out pair needs to know nothing else about the user.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from prlhf.data.check.rules import FittedRules, pair_key, prompt_key, response_keys
from prlhf.data.comparisons import Comparison

LEAKS: dict[str, Callable[[Comparison], set[Hashable]]] = {
    "prompts": lambda c: {prompt_key(c.prompt)},
    "prompts with a response": lambda c: set(response_keys(c)),
    "pairs": lambda c: {pair_key(c)},
    "pairs judged by the same user": lambda c: {(c.user, pair_key(c))} if c.user else set(),
}
JUDGED = "responses judged by the same user in training"


class Leak(NamedTuple):
    """How many different things are shared, by how many comparisons, and the id of the first of these."""

    distinct: int
    comparisons: int
    example: str | None


def leak(one: Sequence[Comparison], other: Sequence[Comparison], keys: Callable[[Comparison], set]) -> Leak:
    """What the other comparisons share with the first ones, by `keys`."""
    seen = {key for c in one for key in keys(c)}
    return _leak([(c, keys(c) & seen) for c in other])


def judged_leaks(rules: FittedRules, held_out: Sequence[Comparison]) -> dict[str, Leak]:
    """Held-out comparisons with both, or with one, of the responses judged by the same user in training.

    rules: fitted to the training comparisons. Counted as different: (user, response).
    """
    found: dict[str, list[tuple[Comparison, set]]] = {"both": [], "one": []}
    for c in held_out:
        judged = {(c.user, key) for key in rules.judged(c)}
        found["both" if len(judged) == len(set(response_keys(c))) else "one"].append((c, judged))
    return {f"{JUDGED}: {name}": _leak(shared) for name, shared in found.items()}


def _leak(shared: Sequence[tuple[Comparison, set]]) -> Leak:
    affected = [c.id for c, found in shared if found]
    return Leak(len(set().union(*(found for _, found in shared))), len(affected), affected[0] if affected else None)
