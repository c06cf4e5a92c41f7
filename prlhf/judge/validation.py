"""Is a judge to be believed? How often it agrees with users' own choices, and whether that is because it knows the user.

Each comparison is a pair, the chosen response against the rejected one, judged in both orders: 1 where both verdicts name the
chosen one, 0 where both name the other, 1/2 for all else (`verdicts.py`). Controls are the same judge without anything of the
user, the same judge with another user's profile, and the rules of length. A judge whose advantage over the first two is no more
than chance says nothing of users that it would not say of anybody.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prlhf.data.comparisons import Comparison
from prlhf.errors import UserError
from prlhf.evaluate.stats import metrics
from prlhf.evaluate.stats.metrics import UserCounts
from prlhf.evaluate.stats.paired import BOOTSTRAP_SAMPLES, SEED, alike
from prlhf.judge.judges import RULE_JUDGES, Judge, find_judge
from prlhf.judge.queries import Query
from prlhf.judge.report import certain
from prlhf.judge.verdicts import Decision, decide_queries

USER_CONTROLS = {
    "generic": "without anything of the user",
    "another": "as another user",
}  # better than both: a personal judge


def validation(comparisons: Sequence[Comparison], judge: Judge, seed: int = 0) -> dict[str, Any]:
    """The numbers of validation.json. Agreements are in [0, 1], differences are the judge's less the control's.

    The comparisons are those of users of whom the judge knows anything (`Judge.knows`), or those of all named users where it knows
    of none: then no control differs from the judge, and `differences` has the rules alone. A pair of which a verdict could
    not be parsed counts in `unparsed` and in no rate; a difference is over the pairs that both could parse. UserError where
    no comparison has a user.
    """
    named = queries = choices(comparisons)
    informed = {query.user for query in queries if judge.knows(query)}
    queries = [query for query in queries if not informed or query.user in informed]
    users = [query.user or "" for query in queries]
    asked = {"judge": decide_queries(queries, judge)}
    if informed:
        asked["generic"] = decide_queries([query._replace(user=None, user_text=None) for query in queries], judge)
    if len(informed) > 1:
        asked["another"] = decide_queries(as_another(queries, seed), judge)
    asked |= {name: decide_queries(queries, find_judge(name, [])) for name in RULE_JUDGES if name != judge.name}
    rates = {name: agreement(users, decisions) for name, decisions in asked.items()}
    others = [name for name in asked if name != "judge"]
    found: dict[str, Any] = {
        "comparisons": len(queries),
        "users": len(set(users)),
        "left_out": {"without a user": len(comparisons) - len(named), "of users not known": len(named) - len(queries)},
        "informed_users": len(informed),
        "agreement": rates,
        "differences": {name: difference(users, asked["judge"], asked[name]) for name in others},
        "per_user": per_user(users, asked),
    }
    better = {name: exceeds(found["differences"][name]) for name in others}
    personal = bool(informed) and all(better.get(name, False) for name in USER_CONTROLS)
    return {
        **found,
        "better_than": better,
        "personal": personal,
        "sentence": sentence(judge.name, found, better, personal),
    }


def choices(comparisons: Sequence[Comparison]) -> list[Query]:
    """What a judge is asked of each user's choice, the chosen response first. UserError where no comparison has a user."""
    named = [c for c in comparisons if c.user is not None]
    if not named:
        raise UserError("--validate: found no comparison with a user, expected users' own choices")
    return [Query(c.prompt, c.user, c.user_text, c.tools, c.chosen, c.rejected, c.where) for c in named]


def as_another(queries: Sequence[Query], seed: int) -> list[Query]:
    """Each query as one of another user, with that user's text: the users in a random circle, each the next one."""
    texts: dict[str | None, str | None] = {}
    for query in queries:
        texts[query.user] = query.user_text or texts.get(query.user)
    circle = sorted(texts, key=str)
    random.Random(seed).shuffle(circle)
    other = dict(zip(circle, [*circle[1:], circle[0]]))
    return [query._replace(user=other[query.user], user_text=texts[other[query.user]]) for query in queries]


def agreement(users: Sequence[str], decisions: Sequence[Decision]) -> dict[str, Any]:
    """How often decisions agree with the choices, per sample and per user, with intervals over users; ties; consistency."""
    parsed = [d for d in decisions if d.parsed]
    counts = _counts(users, decisions, [d.parsed for d in decisions])
    n = len(parsed)
    return {
        "per_sample": metrics.pooled(counts),
        "per_user": metrics.mean(counts),
        "interval": {
            name: interval(counts, BOOTSTRAP_SAMPLES, np.random.default_rng(SEED))
            for name, interval in (("per_sample", metrics.pooled_interval), ("per_user", metrics.mean_interval))
        },
        "unparsed": len(decisions) - n,
        "ties": sum(d.win == 0.5 for d in parsed),
        **certain(users, decisions),
        "consistency": sum(d.consistent for d in parsed) / n if n else None,
        "first": sum(d.firsts for d in parsed) / (2 * n) if n else None,
    }


def _counts(users: Sequence[str], decisions: Sequence[Decision], rows: Sequence[bool]) -> UserCounts:
    kept = [(user, d.win) for user, d, row in zip(users, decisions, rows, strict=True) if row]
    return metrics.right_by_user([user for user, _ in kept], np.array([win for _, win in kept], dtype=float))


def difference(users: Sequence[str], judge: Sequence[Decision], control: Sequence[Decision]) -> dict[str, Any]:
    """The judge's agreement less the control's on the pairs that both parsed, with intervals that resample users with both."""
    rows = [a.parsed and b.parsed for a, b in zip(judge, control)]
    a, b = (_counts(users, decisions, rows) for decisions in (judge, control))
    forms: dict[str, Callable[[UserCounts], UserCounts]] = {"per_sample": lambda counts: counts, "per_user": alike}
    found: dict[str, Any] = {"pairs": sum(rows), "interval": {}}
    for name, form in forms.items():
        x, y = form(a), form(b)
        found[name] = metrics.pooled(x) - metrics.pooled(y) if x.users else None
        rng = np.random.default_rng(SEED)
        found["interval"][name] = metrics.pooled_difference_interval(x, y, BOOTSTRAP_SAMPLES, rng) if x.users else None
    return found


def exceeds(found: Mapping[str, Any]) -> bool:
    """Whether the interval of the difference per sample is above 0."""
    interval = found["interval"]["per_sample"]
    return interval is not None and interval.low > 0


def per_user(users: Sequence[str], asked: Mapping[str, Sequence[Decision]]) -> dict[str, dict[str, Any]]:
    """Each user's comparisons, and each judge's agreement on those that it could parse; None where that is none."""
    table: dict[str, dict[str, Any]] = {user: {"n": users.count(user)} for user in sorted(set(users))}
    for name, decisions in asked.items():
        counts = _counts(users, decisions, [d.parsed for d in decisions])
        share = dict(zip(counts.users, counts.accuracy().tolist()))
        for user, row in table.items():
            row[name] = share.get(user)
    return table


def sentence(name: str, found: Mapping[str, Any], better: Mapping[str, bool], personal: bool) -> str:
    """Whether the judge beats its controls, in one sentence."""
    rules = [rule for rule in better if rule in RULE_JUDGES]
    parts = {
        "better than ": [r for r in rules if better[r]],
        "not shown to be better than ": [r for r in rules if not better[r]],
    }
    trivial = "it is " + ", ".join(how + " and ".join(which) for how, which in parts.items() if which)
    if not found["informed_users"]:
        return (
            f"{name} reads nothing of any user here, so that there is nothing to compare it with but rules: {trivial}."
        )
    if found["informed_users"] == 1:
        return f"{name} knows of one user alone, so that there is no other user's profile to compare with: {trivial}."
    if personal:
        same = " and ".join(USER_CONTROLS.values())
        return f"{name} is a personal judge: it agrees more often than the same judge {same}; {trivial}."
    same = " or ".join(title for control, title in USER_CONTROLS.items() if not better[control])
    return f"{name} is no personal judge: it is not shown to agree more often than the same judge {same}; {trivial}."
