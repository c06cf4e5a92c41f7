"""Who decides between two responses: a rule, a reward model, or a language model on a server.

A judge is asked `Query`s, each a prompt, its user and two responses in the order in which it reads them, and answers each with
a `Verdict`. It is asked all queries at once, so that a model may batch them. What follows from its verdicts in both orders
is in `verdicts.py`.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from prlhf.backbone.loading import choose_device
from prlhf.batch.tokens import Encoder
from prlhf.data.check.rules import prompt_key
from prlhf.data.comparisons import Messages, Tools, words
from prlhf.data.names import quoted
from prlhf.errors import UserError, did_you_mean
from prlhf.generate.rewards import ScoredLine, encode, rewards
from prlhf.judge.server import Server, answers
from prlhf.method.models import PersonalizedRewardModel
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final

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


def find_judge(name: str, users: Iterable[str | None], server: Server | None = None) -> Judge:
    """The judge of this name, for responses to these users; server: that of openai:MODEL.

    UserError where there is none, or its model cannot be loaded.
    """
    kind, _, run = name.partition(":")
    if name in RULE_JUDGES:
        sign = RULE_JUDGES[name]
        return Judge(name, lambda queries: [larger(sign * words(q.first), sign * words(q.second)) for q in queries])
    if server:
        said = f"{server.model} was asked at {server.url}, with temperature 0."
        return Judge(
            name, lambda queries: [verdict(text) for text in answers(server, list(map(question, queries)))], said
        )
    if kind != "prm" or not run:
        known = [*RULE_JUDGES, "prm:RUN", "openai:MODEL"]
        raise UserError(f"--judge {name}: no such judge{did_you_mean(name, known)}; expected one of {', '.join(known)}")
    loaded = load_final(run)
    if loaded.config.method != "prm":
        raise UserError(f"{loaded.path}: found method {loaded.config.method}, expected prm: it alone scores a response")
    unknown = {user: None for user in users if user is not None and not loaded.number(user)}  # in order
    said = f"Users whom {run} does not know, judged as the generic user: {len(unknown):,} ({quoted(unknown)})."
    return Judge(name, lambda queries: reward_verdicts(loaded, queries), said if unknown else None)


def question(query: Query) -> Messages:
    """A query as the shortest conversation that asks for a letter."""
    prompt = query.prompt if isinstance(query.prompt, str) else json.dumps(query.prompt, ensure_ascii=False)
    about = f"The user: {query.user_text}\n\n" if query.user_text else ""
    text = f"{about}The prompt: {prompt}\n\nResponse A: {query.first}\n\nResponse B: {query.second}\n\n"
    return ({"role": "user", "content": f"{text}Which response does the user prefer? Answer with A or B alone."},)


def verdict(text: str) -> Verdict:
    """What an answer to `question` says."""
    letter = text.strip()
    return "first" if letter == "A" else "second" if letter == "B" else "unparsed"


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
