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


def leaks(earlier: Sequence[Comparison], later: Sequence[Comparison], rules: FittedRules | None) -> dict[str, Leak]:
    """What the later comparisons share with the earlier ones, by kind.

    rules: fitted to the earlier comparisons where these are the training file. Then also: later comparisons with both, or with
    one, of the responses judged by the same user in training; counted as different are (user, response).
    """
    found = {}
    for kind, keys in LEAKS.items():
        seen = {key for c in earlier for key in keys(c)}
        found[kind] = _leak([(c, keys(c) & seen) for c in later])
    if rules is not None:
        judged = [(c, {(c.user, key) for key in rules.judged(c)}) for c in later]
        is_whole = [len(keys) == len(set(response_keys(c))) for c, keys in judged]
        for name, wanted in (("both", True), ("one", False)):
            found[f"{JUDGED}: {name}"] = _leak([one for one, whole in zip(judged, is_whole) if whole == wanted])
    return found


def _leak(shared: Sequence[tuple[Comparison, set]]) -> Leak:
    affected = [c.id for c, keys in shared if keys]
    return Leak(len(set().union(*(keys for _, keys in shared))), len(affected), affected[0] if affected else None)
