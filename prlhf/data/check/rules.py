"""What trivial rules get right, which a personalised model has to beat, and how far votes on the same pair agree.

All rules are user-blind but two: `own_length` knows one number about each user, and `own_record` remembers how often this user
chose or rejected each response. Where `own_record` is often right, held-out comparisons can be answered from memory, and a
model's personal gain may be no more than that. Each rule is a margin in favour of the chosen response: right where it is
positive, wrong where negative, one half where it is zero. Texts are the same where they are equal `as_read`.
"""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from prlhf.data.comparisons import Comparison, Messages, words
from prlhf.data.users import UserIndex

RULES = {
    "longer": "the response with more words wins",
    "first": "the response that the user was shown first wins",
    "own_length": "longer or shorter, whichever the user (if unknown or even, all users) chose more often in training",
    "pair_majority": "what most training votes on the same pair chose",
    "response_share": "the response with the larger share of training votes, (wins + 1) / (wins + losses + 2)",
    "own_record": "the response with the better record, wins less losses, with this very user in training",
}


def as_read(comparison: Comparison) -> Comparison:
    """The comparison as a reader sees it: Unicode composed (NFC), white space as single spaces, a text prompt as one message."""

    def read(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", text).split())

    prompt = comparison.prompt
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    prompt = tuple({**m, "content": read(m.get("content") or "")} for m in messages)
    return replace(comparison, prompt=prompt, chosen=read(comparison.chosen), rejected=read(comparison.rejected))


def prompt_key(prompt: str | Messages) -> Hashable:
    """The exact prompt as a dictionary key."""
    if isinstance(prompt, str):
        return prompt
    plain = {"role", "content"}
    return tuple((m["role"], m["content"]) if m.keys() == plain else json.dumps(m, sort_keys=True) for m in prompt)


def pair_key(comparison: Comparison) -> Hashable:
    """The exact prompt and its two responses, unordered: the same key for opposite choices."""
    return prompt_key(comparison.prompt), frozenset((comparison.chosen, comparison.rejected))


def response_keys(comparison: Comparison) -> tuple[Hashable, Hashable]:
    """The exact chosen and rejected response, each with its prompt."""
    prompt = prompt_key(comparison.prompt)
    return (prompt, comparison.chosen), (prompt, comparison.rejected)


class MajorityShare(NamedTuple):
    """See `majority_share`."""

    share: float | None
    repeated_pairs: int
    contradicted_pairs: int


def majority_share(comparisons: Iterable[Comparison]) -> MajorityShare:
    """The most that a user-blind model can get right on these comparisons: it has one answer to each pair.

    share = sum over unordered pairs of max(votes for either response) / comparisons, None where there are none.
    On repeated pairs a vanilla reward model recovers the logit of the vote share (paper, Lemma 3.1), so its answer is the
    majority's. Also counted: pairs that occur more than once, and pairs with votes for both responses.
    """
    votes: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for comparison in map(as_read, comparisons):
        votes[pair_key(comparison)][comparison.chosen] += 1
    total = sum(pair.total() for pair in votes.values())
    return MajorityShare(
        share=sum(max(pair.values()) for pair in votes.values()) / total if total else None,
        repeated_pairs=sum(pair.total() > 1 for pair in votes.values()),
        contradicted_pairs=sum(len(pair) > 1 for pair in votes.values()),
    )


class Conflicts(NamedTuple):
    """See `conflicts`."""

    duplicates: int
    contradictions: int
    disputed_pairs: int
    example: Comparison | None


def conflicts(comparisons: Sequence[Comparison]) -> Conflicts:
    """How often named users repeat or contradict their own votes, and on how many pairs different users disagree.

    duplicates: comparisons with the user, pair and choice of an earlier one. contradictions: (user, pair) with votes for both
    responses; the example is the first such comparison, as read. disputed_pairs: pairs on which two users chose differently.
    Pairs whose responses read the same do not count.
    """
    named = [c for c in map(as_read, comparisons) if c.user and c.chosen != c.rejected]
    voters: dict[Hashable, set[str]] = defaultdict(set)
    for c in named:
        voters[pair_key(c), c.chosen].add(c.user)
    opposed = [(c, voters.get((pair_key(c), c.rejected), set())) for c in named]
    contradictory = [c for c, users in opposed if c.user in users]
    return Conflicts(
        duplicates=len(named) - sum(len(users) for users in voters.values()),
        contradictions=len({(pair_key(c), c.user) for c in contradictory}),
        disputed_pairs=len({pair_key(c) for c, users in opposed if users - {c.user}}),
        example=contradictory[0] if contradictory else None,
    )


@dataclass(frozen=True)
class FittedRules:
    """The rules, with the counts of training votes that some of them need: see `fit`. Responses are `response_keys`."""

    votes: Counter[tuple[Hashable, Hashable]] = field(default_factory=Counter)  # (chosen, rejected)
    wins: Counter[Hashable] = field(default_factory=Counter)
    losses: Counter[Hashable] = field(default_factory=Counter)
    longer_chosen: Counter[str | None] = field(default_factory=Counter)  # by user, None for all: longer's wins - losses
    own: Counter[tuple[str, Hashable]] = field(default_factory=Counter)  # (user, response): wins - losses, if judged

    def right(self, comparisons: Sequence[Comparison]) -> dict[str, list[float]]:
        """For each rule that applies, by its name in RULES: 1, 0 or 0.5 for each comparison.

        Left out: `first` where no comparison says what came first, and the rules that learn where there was no training vote.
        """
        comparisons = [as_read(c) for c in comparisons]
        margins = [self.margins(c) for c in comparisons]
        left_out = set() if any(c.first for c in comparisons) else {"first"}
        if not self.votes:
            left_out |= {"own_length", "pair_majority", "response_share", "own_record"}
        return {name: [(1 + _sign(m[name])) / 2 for m in margins] for name in RULES if name not in left_out}

    def margins(self, c: Comparison) -> dict[str, float]:
        """The margin of each rule on a comparison `as_read`."""
        chosen, rejected = response_keys(c)
        longer = _longer(c)
        return {
            "longer": longer,
            "first": {"chosen": 1, "rejected": -1, None: 0}[c.first],
            "own_length": longer * (self.longer_chosen[c.user] or self.longer_chosen[None]),
            "pair_majority": self.votes[chosen, rejected] - self.votes[rejected, chosen],
            "response_share": self._share(chosen) - self._share(rejected),
            "own_record": self.own[c.user, chosen] - self.own[c.user, rejected] if c.user else 0,
        }

    def judged(self, c: Comparison) -> set[Hashable]:
        """Those responses of a comparison `as_read` that the same, named user judged in training."""
        return {key for key in response_keys(c) if c.user and (c.user, key) in self.own}

    def _share(self, response: Hashable) -> float:
        """(wins + 1) / (wins + losses + 2): 1/2 for a response that is not in training."""
        return (self.wins[response] + 1) / (self.wins[response] + self.losses[response] + 2)


def fit(train: Iterable[Comparison], users: UserIndex | None = None) -> FittedRules:
    """The rules, with the votes of `train` (may be none). users: whose own length preference is learned; None: all."""
    rules = FittedRules()
    for c in map(as_read, train):
        chosen, rejected = response_keys(c)
        rules.votes[chosen, rejected] += 1
        rules.wins[chosen] += 1
        rules.losses[rejected] += 1
        if c.user:
            rules.own[c.user, chosen] += 1
            rules.own[c.user, rejected] -= 1
        for who in {c.user if users is None or users.number(c.user) else None, None}:
            rules.longer_chosen[who] += _sign(_longer(c))
    return rules


def _longer(c: Comparison) -> int:
    return words(c.chosen) - words(c.rejected)


def _sign(margin: float) -> int:
    return (margin > 0) - (margin < 0)
