"""Which comparisons are trained on, which are held out, and which few a new user is adapted with.

What belongs together (a prompt, a dialogue: the record's `split_group`) never lies on both sides, so that nothing leaks.
Users are known or not: an unknown one is in no training comparison. Of each unknown user `few_shot` may hold k comparisons,
whose groups are none of the held-out ones. Comparisons without a user may be trained on.

Draws are numpy's RandomState(seed).shuffle, which is the same everywhere; with dialogues and the seed 123 it is the
procedure of the paper's code: users shuffled, the first 90% known; of each of these the dialogues shuffled, the first 90%
trained on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prlhf.data.reading import Record
from prlhf.errors import UserError


class Split(NamedTuple):
    """Records, each in one list or, where it would leak, in none."""

    train: list[Record]
    valid: list[Record]
    few_shot: list[Record]
    left_out: int  # of unknown users, in groups that are trained on or in few_shot


class Shares(NamedTuple):
    """How much is trained on."""

    users: float = 0.9  # of the users, who are then known
    groups: float = 0.9  # of the groups (with dialogues: of each known user's)


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


def with_few_shot(train: list[Record], valid: list[Record], pool: Sequence[Record], k: int, seed: int) -> Split:
    """k comparisons of each unknown user of `valid`: from `pool`, or else whole groups of `valid` that nobody else has.

    Users of whom no k could be had, with something left in `valid`, are in no few-shot set. What remains of a taken group is
    left out. UserError where nothing would be left to train on or to hold out.
    """
    if not train or not valid:
        raise UserError(
            f"{len(train)} comparisons would be trained on and {len(valid)} held out; expected some of each"
        )
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
