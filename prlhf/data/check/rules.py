"""What trivial rules get right, which a personalised model has to beat, and how far the votes agree at all.

All rules are user-blind but two: `own_length` knows one number about each user, and `own_record` remembers how often this
very user chose or rejected each response. Where `own_record` is often right, held-out comparisons can be answered from
memory, and a model's personal gain may be no more than that. Each rule is a margin in favour of the chosen response: right
where it is positive, wrong where negative, one half where it is zero. Texts are the same where they are the same `as_read`.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    """A comparison whose texts differ from another's only where a reader sees it: Unicode composed (NFC), each stretch of
    white space one space, a prompt that is a text one message of the user."""

    def read(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", text).split())

    prompt = comparison.prompt
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return replace(
        comparison,
        prompt=tuple({**m, "content": read(m["content"])} for m in messages),
        chosen=read(comparison.chosen),
        rejected=read(comparison.rejected),
    )


def prompt_key(prompt: str | Messages) -> Hashable:
    """The prompt, to the letter, as a key of dictionaries."""
    return prompt if isinstance(prompt, str) else tuple((m["role"], m["content"]) for m in prompt)


def pair_key(comparison: Comparison) -> Hashable:
    """The prompt and its two responses, to the letter, in no order: the same for opposite choices on the same pair."""
    return prompt_key(comparison.prompt), frozenset((comparison.chosen, comparison.rejected))


def response_keys(comparison: Comparison) -> tuple[Hashable, Hashable]:
    """The chosen and the rejected response, each with its prompt, to the letter."""
    prompt = prompt_key(comparison.prompt)
    return (prompt, comparison.chosen), (prompt, comparison.rejected)


class MajorityShare(NamedTuple):
    """How far comparisons that share a pair agree: see `majority_share`."""

    share: float | None
    repeated_pairs: int
    contradicted_pairs: int


def majority_share(comparisons: Iterable[Comparison]) -> MajorityShare:
    """The most that a user-blind model can get right on these comparisons: it answers each pair in one way.

    share = sum over unordered pairs of max(votes for either response) / comparisons, None where there are none.
    On pairs that occur again a vanilla reward model recovers the logit of the vote share (paper, Lemma 3.1), so
    its answer is the majority's. Also: pairs that occur more than once, and pairs with votes for both responses.
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
    """How often named users repeat a vote, contradict themselves (with an example, as read), and differ: see `conflicts`."""

    duplicates: int
    contradictions: int
    disputed_pairs: int
    example: Comparison | None


def conflicts(comparisons: Sequence[Comparison]) -> Conflicts:
    """How often a named user repeats or contradicts a vote of theirs, and on how many pairs different users differ.

    duplicates: comparisons that were there before (same user, pair and choice); contradictions: (user, pair) with both
    choices, and the first such comparison as an example; disputed pairs: one user chose one response, another the other.
    Two responses that read the same are no choice.
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
    """The rules, and the counts from training comparisons that some of them need: see `fit`."""

    votes: Counter[tuple[Hashable, str, str]]  # (prompt, chosen, rejected)
    wins: Counter[tuple[Hashable, str]]  # (prompt, response)
    losses: Counter[tuple[Hashable, str]]
    longer_chosen: Counter[str | None]  # by user, None for all: times the longer response won minus times it lost
    own: Counter[tuple[str, Hashable]]  # (user, response key): wins less losses; there where the user judged it

    def right(self, comparisons: Sequence[Comparison]) -> dict[str, list[float]]:
        """For each rule that applies, by its name in RULES: 1, 0 or 0.5 for each comparison.

        Left out: `first` where no comparison says what came first, and what was fitted to no training comparisons.
        """
        comparisons = [as_read(c) for c in comparisons]
        margins: dict[str, Callable[[Comparison], float]] = {"longer": _longer}
        if any(c.first for c in comparisons):
            margins["first"] = _first
        if self.votes:
            margins["own_length"] = self._own_length
            margins["pair_majority"] = self._pair_majority
            margins["response_share"] = self._response_share
            margins["own_record"] = self._own_record
        return {name: [_right(margin(c)) for c in comparisons] for name, margin in margins.items()}

    def judged(self, c: Comparison) -> set[Hashable]:
        """Of the two responses of a comparison `as_read`, those that the same, named user judged in training."""
        return {key for key in response_keys(c) if c.user and (c.user, key) in self.own}

    def _own_length(self, c: Comparison) -> float:
        return _longer(c) * (self.longer_chosen[c.user] or self.longer_chosen[None])

    def _pair_majority(self, c: Comparison) -> float:
        prompt = prompt_key(c.prompt)
        return self.votes[prompt, c.chosen, c.rejected] - self.votes[prompt, c.rejected, c.chosen]

    def _response_share(self, c: Comparison) -> float:
        prompt = prompt_key(c.prompt)
        return self._share((prompt, c.chosen)) - self._share((prompt, c.rejected))

    def _own_record(self, c: Comparison) -> float:
        chosen, rejected = response_keys(c)
        return self.own[c.user, chosen] - self.own[c.user, rejected] if c.user else 0

    def _share(self, response: tuple[Hashable, str]) -> float:
        """(wins + 1) / (wins + losses + 2): 1/2 for a response that training never showed."""
        return (self.wins[response] + 1) / (self.wins[response] + self.losses[response] + 2)


def fit(train: Iterable[Comparison], users: UserIndex | None = None) -> FittedRules:
    """The rules, with the votes of these training comparisons (may be none).

    users: whose own length preference is learned, by default everybody's.
    """
    rules = FittedRules(Counter(), Counter(), Counter(), Counter(), Counter())
    for c in map(as_read, train):
        prompt = prompt_key(c.prompt)
        rules.votes[prompt, c.chosen, c.rejected] += 1
        rules.wins[prompt, c.chosen] += 1
        rules.losses[prompt, c.rejected] += 1
        if c.user:
            chosen, rejected = response_keys(c)
            rules.own[c.user, chosen] += 1
            rules.own[c.user, rejected] -= 1
        for who in {c.user if users is None or users.number(c.user) else None, None}:
            rules.longer_chosen[who] += _sign(_longer(c))
    return rules


def _longer(c: Comparison) -> float:
    return words(c.chosen) - words(c.rejected)


def _first(c: Comparison) -> float:
    return {"chosen": 1, "rejected": -1, None: 0}[c.first]


def _sign(margin: float) -> int:
    return (margin > 0) - (margin < 0)


def _right(margin: float) -> float:
    return (1 + _sign(margin)) / 2
