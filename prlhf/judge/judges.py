"""Who decides between two responses: a rule, or a reward model.

A judge is asked `Query`s, each a prompt, its user and two responses in the order in which it reads them, and answers each with
a `Verdict`. It is asked all queries at once, so that a model may batch them. What follows from its verdicts in both orders
is in `verdicts.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from prlhf.backbone.loading import choose_device
from prlhf.batch.tokens import Encoder
from prlhf.data.check.rules import prompt_key
from prlhf.data.comparisons import Messages, Tools, read_parsed, words
from prlhf.data.files import sha256
from prlhf.data.names import quoted
from prlhf.data.sets.simulate import rules_of
from prlhf.errors import UserError, did_you_mean, expanded
from prlhf.generate.rewards import ScoredLine, encode, rewards
from prlhf.method.models import PersonalizedRewardModel
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final, weights_checksum

Verdict = Literal["first", "second", "tie", "unparsed"]  # unparsed: an answer that could not be understood
RULE_JUDGES = {"rule:shorter": -1, "rule:longer": 1}  # the sign with which the number of words counts


class Query(NamedTuple):
    """What a judge is asked: which of two responses this user (None: nobody in particular) prefers."""

    prompt: str | Messages
    user: str | None
    user_text: str | None
    tools: Tools | None
    first: str
    second: str
    where: str  # "FILE, line 3", for errors


class Judge(NamedTuple):
    """A judge: its name, one verdict for each query, and what is to be said of it beforehand."""

    name: str
    verdicts: Callable[[Sequence[Query]], list[Verdict]]
    said: str | None = None
    version: str = ""  # tells what a file or a run of this name holds now from what it held before


def find_judge(name: str, users: Iterable[str | None]) -> Judge:
    """The judge of this name, for responses to these users. UserError where there is none, or its model cannot be loaded."""
    kind, _, run = name.partition(":")
    if name in RULE_JUDGES:
        sign = RULE_JUDGES[name]
        return Judge(name, lambda queries: [by_length(q, sign) for q in queries])
    if kind == "simulated" and run:
        return simulated_judge(name, run, users)
    if kind != "prm" or not run:
        known = [*RULE_JUDGES, "prm:RUN", "simulated:FILE"]
        raise UserError(f"--judge {name}: no such judge{did_you_mean(name, known)}; expected one of {', '.join(known)}")
    loaded = load_final(run)
    if loaded.config.method != "prm":
        raise UserError(f"{loaded.path}: found method {loaded.config.method}, expected prm: it alone scores a response")
    said = said_of_unknown(run, [user for user in users if user is not None and not loaded.number(user)])
    return Judge(name, lambda queries: reward_verdicts(loaded, queries), said, weights_checksum(loaded.path))


def said_of_unknown(source: str, unknown: Iterable[str]) -> str | None:
    """The sentence on users whom a judge does not know; None where it knows all."""
    names = dict.fromkeys(unknown)
    if not names:
        return None
    return f"Users whom {source} does not know, judged as the generic user: {len(names):,} ({quoted(names)})."


def simulated_judge(name: str, file: str, users: Iterable[str | None]) -> Judge:
    """Each simulated user's own rule, by their comparisons in a file (`rules_of`): the shorter or the longer response wins.

    A user who is not there, and the generic user, is judged by the rule of most comparisons; a tie where both have as many.
    """
    shorter = rules_of(c for _, _, c in read_parsed(file))
    signs = {user: -1 if prefers_shorter else 1 for user, (prefers_shorter, _) in shorter.items()}
    generic = sum(signs[user] * count for user, (_, count) in shorter.items())
    said = said_of_unknown(file, [user for user in users if user is not None and user not in signs])

    def sign(user: str | None) -> int:
        return generic if user is None else signs.get(user, generic)

    return Judge(name, lambda queries: [by_length(q, sign(q.user)) for q in queries], said, sha256(expanded(file)))


def by_length(query: Query, sign: int) -> Verdict:
    """The response of more words, for a negative sign of fewer; a tie where the sign is 0."""
    return larger(sign * words(query.first), sign * words(query.second))


def larger(first: float, second: float) -> Verdict:
    """Which of two numbers is the larger; a tie where they are equal."""
    return "tie" if first == second else "first" if first > second else "second"


def reward_verdicts(loaded: Loaded, queries: Sequence[Query]) -> list[Verdict]:
    """The response with the larger reward r_P(x, y, u) wins.

    Each response is scored once, in an order that does not depend on which side it is on: so rounding cannot make verdicts
    depend on the position, nor A against B on which file is named first. UserError where a reward is not finite.
    """
    lines = {}
    for q in queries:
        for response in (q.first, q.second):
            line = ScoredLine(q.prompt, response, q.user, q.user_text, "", q.where, q.tools)
            lines[prompt_key(q.prompt), q.user, response] = line
    keys = sorted(lines, key=repr)
    encoder = Encoder(loaded.tokenizer, loaded.config.data, place=loaded.config.user_model.place)
    encoded = encode([lines[key] for key in keys], encoder, [loaded.number(lines[key].user) for key in keys])
    model = loaded.model.to(choose_device(loaded.config.device))
    assert isinstance(model, PersonalizedRewardModel)
    check_agreement(model)
    found = rewards(model, [line.reading for line in encoded], loaded.config.evaluate.batch_size)
    if not found.isfinite().all():
        raise UserError(f"{loaded.path}: {int((~found.isfinite()).sum())} of {len(keys)} rewards are not finite")
    reward = dict(zip(keys, found.tolist()))
    return [larger(*(reward[prompt_key(q.prompt), q.user, y] for y in (q.first, q.second))) for q in queries]
