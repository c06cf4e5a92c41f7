"""Which comparisons are trained on, which are held out, and which few a new user is adapted with.

What belongs together (a prompt, a dialogue: the record's `split_group`) never lies on both sides, so that nothing leaks.
Where users judge a response more than once, it is each user's responses that are divided: by response. No pair that is held
out for a user then has a response that this user judged in training, so nobody's own record can be remembered; pairs of a
response on either side are left out, and prompts, and other users' responses, may lie on both sides.

Users are known or not: an unknown one is in no training comparison. Of each unknown user `few_shot` may hold k comparisons,
whose groups (by response: the user's responses) are none of the held-out ones. Comparisons without a user may be trained on;
by response they are divided as if one user's.

Draws are numpy's RandomState(seed).shuffle, which is the same everywhere; with dialogues and the seed 123 it is the
procedure of the paper's code: users shuffled, the first 90% known; of each of these the dialogues shuffled, the first 90%
trained on.
"""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from prlhf.data.check.rules import as_read, response_keys
from prlhf.data.comparisons import Comparison
from prlhf.data.sets.raw import Record, text_key
from prlhf.errors import UserError


class Split(NamedTuple):
    """Records, each in one list or, where it would leak, in none."""

    train: list[Record]
    valid: list[Record]
    few_shot: list[Record]
    left_out: int  # of unknown users, in groups (by response: with responses) that are trained on or in few_shot
    straddling: int | None = None  # by response: left out because the two responses lie on different sides


class Shares(NamedTuple):
    """How much is trained on."""

    users: float = 0.9  # of the users, who are then known
    groups: float = 0.9  # of the groups (with dialogues, and by response: of each known user's)


class Judged(NamedTuple):
    """Who judged what: the user, and short names of the chosen and the rejected response under their prompt."""

    user: str | None
    responses: tuple[str, str]


def shuffled(items: Sequence[str], random: np.random.RandomState) -> list[str]:
    """The items in a random order."""
    order = np.arange(len(items))
    random.shuffle(order)
    return [items[i] for i in order]


def split(records: Sequence[Record], shares: Shares, seed: int, k: int = 0, dialogues: bool = False) -> Split:
    """Known and unknown users, and of the groups those that are held out; k comparisons of each unknown user in few_shot.

    records: with "user" and "split_group", users and groups in the order in which they are drawn. dialogues: each group
    is one user's, a known user's groups are divided, at least one of them held out, and a user with one group is unknown;
    otherwise users share groups (prompts), and all groups are divided.
    UserError where nothing would be left to train on or to hold out, or a dialogue has two users.
    """
    random = np.random.RandomState(seed)
    owners: dict[str, dict[str, None]] = {}
    groups_of: dict[str, dict[str, None]] = {}
    for record in records:
        owners.setdefault(record["split_group"], {})[record["user"]] = None
        groups_of.setdefault(record["user"], {})[record["split_group"]] = None
    named = [user for user in groups_of if user is not None]
    known = shuffled(named, random)[: int(len(named) * shares.users)]
    trained: set[str] = set()
    if dialogues:
        for group, users in owners.items():
            if len(users) > 1:
                raise UserError(f"dialogue {group!r} has the users {' and '.join(map(repr, users))}, expected one")
        known = [user for user in known if len(groups_of[user]) > 1]
        for user in (*known, *([None] if None in groups_of else [])):
            groups = shuffled(list(groups_of[user]), random)
            trained.update(groups[: int(len(groups) * shares.groups)])
    else:
        groups = shuffled(list(owners), random)
        trained.update(groups[: int(len(groups) * shares.groups)])
    is_known = {*known, None}
    train = [r for r in records if r["user"] in is_known and r["split_group"] in trained]
    valid = [r for r in records if r["split_group"] not in trained]
    pool = [r for r in records if r["user"] not in is_known and r["split_group"] in trained]
    return with_few_shot(train, valid, pool, k, seed)


def judged(comparison: Comparison) -> Judged:
    """What a comparison says of whom; texts are the same where they are the same `as_read`."""
    chosen, rejected = (text_key(json.dumps(key)) for key in response_keys(as_read(comparison)))
    return Judged(comparison.user, (chosen, rejected))


def recurring(comparisons: Iterable[Judged]) -> str | None:
    """The first user found with one response in two different pairs; None where there is none. Unnamed users do not count."""
    pairs: dict[tuple[str, str], frozenset[str]] = {}
    for user, responses in comparisons:
        for response in responses if user else ():
            if pairs.setdefault((user, response), frozenset(responses)) != frozenset(responses):
                return user
    return None


def split_by_response(
    records: Sequence[Record], comparisons: Sequence[Judged], shares: Shares, seed: int, k: int = 0
) -> Split:
    """Each known user's responses divided: a pair of two training ones is trained on, one of two others is held out.

    comparisons: what each record says. A user of whom nothing could be trained on is unknown. Unknown users' comparisons
    are all held out, or with k divided by response too, see `_few`.
    UserError where nothing would be left to train on or to hold out.
    """
    random = np.random.RandomState(seed)
    rows_of: dict[str | None, list[int]] = {}
    for row, comparison in enumerate(comparisons):
        rows_of.setdefault(comparison.user, []).append(row)
    named = [user for user in rows_of if user is not None]
    known = shuffled(named, random)[: int(len(named) * shares.users)]
    train, valid, few_shot, beyond = [], [], [], 0
    unknown = dict.fromkeys(rows_of)
    for user in (*known, *([None] if None in rows_of else [])):
        places = _places(comparisons, rows_of[user], random)
        inside, outside = _divided(comparisons, rows_of[user], places, int(len(places) * shares.groups))
        if inside:
            train += inside
            valid += outside
            del unknown[user]
    for user in unknown:
        inside, outside = _few(comparisons, rows_of[user], k if user is not None else 0, random)
        few_shot += inside[:k]
        valid += outside
        beyond += len(inside[k:])
    _require_some(train, valid)
    straddling = len(records) - len(train) - len(valid) - len(few_shot) - beyond
    return Split(*([records[row] for row in sorted(rows)] for rows in (train, valid, few_shot)), beyond, straddling)


def _few(
    comparisons: Sequence[Judged], rows: list[int], k: int, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Of one unknown user the rows among which k few-shot ones are, and the held-out ones; no response is in both.

    The former are the pairs of the first responses of a random order, as few of these as have k pairs. All rows are held
    out where there are no k, or none would be left.
    """
    if not 0 < k < len(rows):
        return [], rows
    places = _places(comparisons, rows, random)
    lasts = sorted(max(places[response] for response in comparisons[row].responses) for row in rows)
    inside, outside = _divided(comparisons, rows, places, lasts[k - 1] + 1)
    return (inside, outside) if outside else ([], rows)


def _places(comparisons: Sequence[Judged], rows: Sequence[int], random: np.random.RandomState) -> dict[str, int]:
    """The responses of these rows in a random order, and where each one is in it."""
    responses = list(dict.fromkeys(response for row in rows for response in comparisons[row].responses))
    return {response: place for place, response in enumerate(shuffled(responses, random))}


def _divided(
    comparisons: Sequence[Judged], rows: Sequence[int], places: dict[str, int], first: int
) -> tuple[list[int], list[int]]:
    """The rows of which both responses are among the `first` ones, and those of which none is."""
    among = {row: [places[response] < first for response in comparisons[row].responses] for row in rows}
    return [row for row in rows if all(among[row])], [row for row in rows if not any(among[row])]


def _require_some(train: Sequence, valid: Sequence) -> None:
    if not train or not valid:
        raise UserError(
            f"{len(train)} comparisons would be trained on and {len(valid)} held out; expected some of each"
        )


def with_few_shot(train: list[Record], valid: list[Record], pool: Sequence[Record], k: int, seed: int) -> Split:
    """k comparisons of each unknown user of `valid`: from `pool`, or else whole groups of `valid` that nobody else has.

    Users of whom no k could be had, with something left in `valid`, are in no few-shot set. What remains of a taken group is
    left out. UserError where nothing would be left to train on or to hold out.
    """
    _require_some(train, valid)
    known = {r["user"] for r in train}
    random = np.random.RandomState(seed)
    held_out = {r["split_group"] for r in valid}
    readers: dict[str, set[str]] = {}
    evaluated: dict[str, set[str]] = {}  # each user's groups
    for record in valid:
        readers.setdefault(record["split_group"], set()).add(record["user"])
        evaluated.setdefault(record["user"], set()).add(record["split_group"])
    from_pool = [r for r in pool if r["split_group"] not in held_out]
    pooled = {r["user"] for r in from_pool}
    own = [r for r in valid if r["user"] not in pooled and len(readers[r["split_group"]]) == 1]
    by_user: dict[str, dict[str, list[Record]]] = {}
    for record in (*from_pool, *own):
        by_user.setdefault(record["user"], {}).setdefault(record["split_group"], []).append(record)
    few_shot: list[Record] = []
    taken: set[str] = set()
    for user in (user for user in evaluated if k and user is not None and user not in known):
        groups = by_user.get(user, {})
        chosen: list[Record] = []
        used: set[str] = set()
        for group in shuffled(list(groups), random):
            if len(chosen) < k:
                chosen += groups[group]
                used.add(group)
        if len(chosen) >= k and evaluated[user] - used:
            few_shot += chosen[:k]
            taken |= used
    kept = [r for r in valid if r["split_group"] not in taken]
    return Split(train, kept, few_shot, len(pool) + len(valid) - len(kept) - len(few_shot))
