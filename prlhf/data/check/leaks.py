"""What held-out comparisons share with others: prompts, responses, pairs, and what the same user judged in training.

All of it is of comparisons `as_read`. The last is the one that makes a model look personal: the votes of a user from whom a
held-out pair was made are in training pairs already, and a model that remembers them needs to know nothing else.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from prlhf.data.check.rules import FittedRules, pair_key, prompt_key, response_keys
from prlhf.data.comparisons import Comparison

# What of a file's comparison may also be in another file.
LEAKS: dict[str, Callable[[Comparison], set[Hashable]]] = {
    "prompts": lambda c: {prompt_key(c.prompt)},
    "prompts with a response": lambda c: set(response_keys(c)),
    "pairs": lambda c: {pair_key(c)},
    "pairs judged by the same user": lambda c: {(c.user, pair_key(c))} if c.user else set(),
}
JUDGED = "responses judged by the same user in training"


class Leak(NamedTuple):
    """What a file shares with an earlier one: how many different things, in how many comparisons, and one's id."""

    distinct: int
    comparisons: int
    example: str | None


def leak(one: Sequence[Comparison], other: Sequence[Comparison], keys: Callable[[Comparison], set]) -> Leak:
    """What of the other comparisons, by `keys`, is among the one's too, and the id of the first one affected."""
    seen = {key for c in one for key in keys(c)}
    return _leak([(c, keys(c) & seen) for c in other])


def judged_leaks(rules: FittedRules, held_out: Sequence[Comparison]) -> dict[str, Leak]:
    """Held-out comparisons of which the same user judged (chose or rejected) both, or one, of the responses in training.

    rules: fitted to the training comparisons. Distinct are (user, response).
    """
    found: dict[str, list[tuple[Comparison, set]]] = {"both": [], "one": []}
    for c in held_out:
        judged = {(c.user, key) for key in rules.judged(c)}
        found["both" if len(judged) == len(set(response_keys(c))) else "one"].append((c, judged))
    return {f"{JUDGED}: {name}": _leak(shared) for name, shared in found.items()}


def _leak(shared: Sequence[tuple[Comparison, set]]) -> Leak:
    affected = [c.id for c, found in shared if found]
    return Leak(len(set().union(*(found for _, found in shared))), len(affected), affected[0] if affected else None)
