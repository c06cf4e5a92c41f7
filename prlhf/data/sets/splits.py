"""Split comparisons: training, held-out, and a few of each unknown user to adapt with.

Comparisons of one group (a prompt or a dialogue: the record's `split_group`) stay on one side, so nothing leaks.

By response: where users judge a response more than once, each user's responses are divided instead. No held-out pair of a user
then has a response that this user judged in training, so remembering a user's votes does not help. Pairs with one response on
either side are left out. Prompts, and other users' responses, may be on both sides.

Users are known or unknown; an unknown user has no training comparison. few_shot may hold k comparisons of each unknown user,
from groups (by response: with responses) that are not held out. Comparisons without a user may be trained on; by response they
are divided as if they were one user's.

Draws are numpy's RandomState(seed).shuffle, the same on every machine. With dialogues and seed 123 this is the procedure of
the paper's code: users shuffled, the first 90% known; the dialogues of each of these shuffled, the first 90% trained on.
"""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from prlhf.data.check.rules import as_read, response_keys
from prlhf.data.comparisons import Comparison
from prlhf.data.files import Record
from prlhf.data.sets.raw import text_key
from prlhf.errors import UserError

Rows = dict[int, tuple[str, str]]  # some comparisons of one user: the row, and the two responses


class Split(NamedTuple):
    """The records of each part. Records that would leak are in no part."""

    train: list[Record]
    valid: list[Record]
    few_shot: list[Record]
    left_out: int  # of unknown users, in groups (by response: with responses) that are trained on or in few_shot
    straddling: int | None = None  # by response: left out because the two responses are on different sides


class Shares(NamedTuple):
    """How much is trained on."""

    users: float = 0.9  # of the users, who are then known
    groups: float = 0.9  # of the groups (with dialogues, and by response: of each known user's)


class Judged(NamedTuple):
    """The user of a comparison, and short names of the chosen and the rejected response under their prompt."""

    user: str | None
    responses: tuple[str, str]


def shuffled(items: Sequence[str], random: np.random.RandomState) -> list[str]:
    """The items in a random order."""
    order = np.arange(len(items))
    random.shuffle(order)
    return [items[i] for i in order.tolist()]


def related(records: Sequence[Record], one: str, other: str) -> dict[str, list[str]]:
    """For each value of the field `one`, the different values of the field `other`, in order of occurrence."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        found.setdefault(record[one], {})[record[other]] = None
    return {value: list(others) for value, others in found.items()}


def split(records: Sequence[Record], shares: Shares, seed: int, k: int = 0, dialogues: bool = False) -> Split:
    """Divide users into known and unknown, and groups into training and held-out; k comparisons of each unknown user.

    records: with "user" and "split_group"; users and groups are drawn in the order in which they occur. dialogues: each
    group is one user's. Each known user's groups are divided, and at least one is held out; a user with one group is unknown.
    Otherwise all groups (prompts) are divided. UserError: nothing to train on or to hold out, a dialogue of two users.
    """
    random = np.random.RandomState(seed)
    owners, groups_of = related(records, "split_group", "user"), related(records, "user", "split_group")
    named = [user for user in groups_of if user is not None]
    known = shuffled(named, random)[: int(len(named) * shares.users)]
    divided = [list(owners)]
    if dialogues:
        for group, users in owners.items():
            if len(users) > 1:
                raise UserError(f"dialogue {group!r} has the users {' and '.join(map(repr, users))}, expected one")
        known = [user for user in known if len(groups_of[user]) > 1]
        divided = [groups_of[user] for user in (*known, None) if user in groups_of]
    trained = {group for groups in divided for group in shuffled(groups, random)[: int(len(groups) * shares.groups)]}
    is_known = {*known, None}
    train = [r for r in records if r["user"] in is_known and r["split_group"] in trained]
    valid = [r for r in records if r["split_group"] not in trained]
    pool = [r for r in records if r["user"] not in is_known and r["split_group"] in trained]
    return with_few_shot(train, valid, pool, k, seed)


def with_few_shot(train: list[Record], valid: list[Record], pool: Sequence[Record], k: int, seed: int) -> Split:
    """Take k comparisons of each unknown user of `valid`: from `pool`, or else whole groups of `valid` that no other user has.

    A user with fewer than k, or with nothing left in `valid` afterwards, is not in few_shot. What remains of a taken group is
    left out. UserError where nothing would be left to train on or to hold out.
    """
    _require_some(train, valid)
    known = {r["user"] for r in train}
    random = np.random.RandomState(seed)
    users_of, groups_of = related(valid, "split_group", "user"), related(valid, "user", "split_group")
    from_pool = [r for r in pool if r["split_group"] not in users_of]
    pooled = {r["user"] for r in from_pool}
    own = [r for r in valid if r["user"] not in pooled and len(users_of[r["split_group"]]) == 1]
    by_user: dict[str, dict[str, list[Record]]] = {}
    for record in (*from_pool, *own):
        by_user.setdefault(record["user"], {}).setdefault(record["split_group"], []).append(record)
    few_shot: list[Record] = []
    taken: set[str] = set()
    for user in (user for user in groups_of if k and user is not None and user not in known):
        groups = by_user.get(user, {})
        chosen: list[Record] = []
        used: set[str] = set()
        for group in shuffled(list(groups), random):
            if len(chosen) < k:
                chosen += groups[group]
                used.add(group)
        if len(chosen) >= k and set(groups_of[user]) - used:
            few_shot += chosen[:k]
            taken |= used
    kept = [r for r in valid if r["split_group"] not in taken]
    return Split(train, kept, few_shot, len(pool) + len(valid) - len(kept) - len(few_shot))


def _require_some(train: Sequence, valid: Sequence) -> None:
    if not train or not valid:
        raise UserError(
            f"{len(train)} comparisons would be trained on and {len(valid)} held out; expected some of each"
        )


def judged(comparison: Comparison) -> Judged:
    """The user and the responses of a comparison. Texts that are equal `as_read` have equal names."""
    chosen, rejected = (text_key(json.dumps(key)) for key in response_keys(as_read(comparison)))
    return Judged(comparison.user, (chosen, rejected))


def recurring(comparisons: Iterable[Judged]) -> str | None:
    """The first user who judged one response in two different pairs; None where there is none. Unnamed users do not count."""
    pairs: dict[tuple[str, str], frozenset[str]] = {}
    for user, responses in comparisons:
        for response in responses if user else ():
            if pairs.setdefault((user, response), frozenset(responses)) != frozenset(responses):
                return user
    return None


def split_by_response(
    records: Sequence[Record], comparisons: Sequence[Judged], shares: Shares, seed: int, k: int = 0
) -> Split:
    """Divide each known user's responses. A pair of two training responses is trained on, a pair of two others is held out.

    comparisons: one a record. A user whose division leaves no training pair is unknown. Unknown users' are all held
    out, or with k divided by response too, see `_few`. UserError where nothing is left to train on or to hold out.
    """
    random = np.random.RandomState(seed)
    rows_of: dict[str | None, Rows] = {}
    for row, (user, responses) in enumerate(comparisons):
        rows_of.setdefault(user, {})[row] = responses
    named = [user for user in rows_of if user is not None]
    known = shuffled(named, random)[: int(len(named) * shares.users)]
    train, valid, few_shot, beyond = [], [], [], 0
    unknown = dict(rows_of)
    for user in (user for user in (*known, None) if user in rows_of):
        places = _places(rows_of[user], random)
        inside, outside = _divided(rows_of[user], places, int(len(places) * shares.groups))
        if inside:
            train += inside
            valid += outside
            del unknown[user]
    for user, rows in unknown.items():
        inside, outside = _few(rows, k if user is not None else 0, random)
        few_shot += inside[:k]
        valid += outside
        beyond += len(inside[k:])
    _require_some(train, valid)
    straddling = len(records) - len(train) - len(valid) - len(few_shot) - beyond
    parts = [[records[row] for row in sorted(rows)] for rows in (train, valid, few_shot)]
    return Split(parts[0], parts[1], parts[2], left_out=beyond, straddling=straddling)


def _few(rows: Rows, k: int, random: np.random.RandomState) -> tuple[list[int], list[int]]:
    """The rows of an unknown user from which k few-shot ones are taken, and the held-out rows; they share no response.

    The responses are put in a random order, and the first ones taken: as few as have k pairs among them. All rows are held
    out where there are fewer than k, or where none would be left to hold out.
    """
    if not 0 < k < len(rows):
        return [], list(rows)
    places = _places(rows, random)
    lasts = sorted(max(places[response] for response in responses) for responses in rows.values())
    inside, outside = _divided(rows, places, lasts[k - 1] + 1)
    return (inside, outside) if outside else ([], list(rows))


def _places(rows: Rows, random: np.random.RandomState) -> dict[str, int]:
    """The place of each response in a random order of all."""
    responses = list(dict.fromkeys(response for pair in rows.values() for response in pair))
    return {response: place for place, response in enumerate(shuffled(responses, random))}


def _divided(rows: Rows, places: dict[str, int], first: int) -> tuple[list[int], list[int]]:
    """The rows with both responses among the `first` places, and those with neither."""
    among = {row: [places[response] < first for response in responses] for row, responses in rows.items()}
    return [row for row in rows if all(among[row])], [row for row in rows if not any(among[row])]
