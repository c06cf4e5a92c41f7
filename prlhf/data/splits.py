"""Which comparisons are trained on, which are held out, and which few a new user is adapted with.

What belongs together (a prompt, a dialogue: the `group`) never lies on both sides, so that nothing leaks. Users are known
or not: an unknown one is in no training comparison. Of each unknown user `few_shot` may hold k comparisons, whose groups
are none of the held-out ones.

Draws are numpy's RandomState(seed).shuffle, which is the same everywhere; with dialogues and the seed 123 it is the
procedure of the paper's code: users shuffled, the first 90% known; of each of these the dialogues shuffled, the first 90%
trained on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prlhf.errors import UserError

Record = dict[str, Any]


class Split(NamedTuple):
    """Records, each in one list or, where it would leak, in none."""

    train: list[Record]
    valid: list[Record]
    few_shot: list[Record]
    left_out: int  # of unknown users, in groups that are trained on, and not in few_shot


class Shares(NamedTuple):
    """How much is trained on."""

    users: float = 0.9  # of the users, who are then known
    groups: float = 0.9  # of the groups (with dialogues: of each known user's)


def shuffled(items: Sequence[str], random: np.random.RandomState) -> list[str]:
    """The items in a random order."""
    order = np.arange(len(items))
    random.shuffle(order)
    return [items[i] for i in order]


def split(records: Sequence[Record], shares: Shares, seed: int, k: int = 0) -> Split:
    """Known and unknown users, and of the groups those that are held out; k comparisons of each unknown user in few_shot.

    records: with "user" and "group", users and groups in the order in which they are drawn. Where each group is one
    user's (dialogues), a known user's groups are divided, at least one held out, and a user with one group is unknown;
    where users share groups (prompts), all groups are.
    UserError where nothing would be left to train on or to hold out.
    """
    random = np.random.RandomState(seed)
    owners: dict[str, dict[str, None]] = {}
    groups_of: dict[str, dict[str, None]] = {}
    for record in records:
        owners.setdefault(record["group"], {})[record["user"]] = None
        groups_of.setdefault(record["user"], {})[record["group"]] = None
    named = [user for user in groups_of if user is not None]
    known = shuffled(named, random)[: int(len(named) * shares.users)]
    trained: set[str] = set()
    if all(len(users) == 1 for users in owners.values()):
        known = [user for user in known if len(groups_of[user]) > 1]
        for user in known:
            groups = shuffled(list(groups_of[user]), random)
            trained.update(groups[: int(len(groups) * shares.groups)])
    else:
        groups = shuffled(list(owners), random)
        trained.update(groups[: int(len(groups) * shares.groups)])
    is_known = set(known)
    train = [r for r in records if r["user"] in is_known and r["group"] in trained]
    valid = [r for r in records if r["group"] not in trained]
    pool = [r for r in records if r["user"] not in is_known and r["group"] in trained]
    if not train or not valid:
        raise UserError(
            f"of {len(records)} comparisons {len(train)} would be trained on and {len(valid)} held out; expected some of "
            "each: more comparisons or other shares"
        )
    return with_few_shot(train, valid, pool, k, seed)


def with_few_shot(train: list[Record], valid: list[Record], pool: Sequence[Record], k: int, seed: int) -> Split:
    """k comparisons of each unknown user: from `pool`, or, of users who have nothing there, whole groups of `valid`.

    Users of whom no k could be had, with a group of `valid` left, are in no few-shot set. What remains of a taken group
    is left out.
    """
    known = {r["user"] for r in train}
    random = np.random.RandomState(seed)
    by_user: dict[str, dict[str, list[Record]]] = {}
    unknown = {r["user"]: None for r in valid if r["user"] is not None and r["user"] not in known}
    pooled = {r["user"] for r in pool}
    for record in (*pool, *(r for r in valid if r["user"] not in pooled)):
        if record["user"] in unknown:
            by_user.setdefault(record["user"], {}).setdefault(record["group"], []).append(record)
    few_shot: list[Record] = []
    taken: set[tuple[str, str]] = set()
    for user in unknown if k else ():
        groups = by_user[user]
        chosen: list[Record] = []
        used: list[str] = []
        for group in shuffled(list(groups), random):
            if len(chosen) >= k:
                break
            chosen += groups[group]
            used.append(group)
        if len(chosen) >= k and (user in pooled or len(used) < len(groups)):
            few_shot += chosen[:k]
            taken.update((user, group) for group in used)
    kept = [r for r in valid if (r["user"], r["group"]) not in taken]
    return Split(train, kept, few_shot, len(pool) + len(valid) - len(kept) - len(few_shot))
