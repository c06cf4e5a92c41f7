"""Which comparisons train, which are learnt from and which are predicted: the protocols of the field.

- polis: a Polis folder. New voters' unseen_users_adapt.jsonl is learnt from in file order, unseen_users_test.jsonl predicted.
- pal (Chen et al. 2025, arXiv 2406.08469): TL;DR with simulated preferences of length. The ten most active workers train. Of
  other workers with at least 100 validation comparisons N are learnt from, the rest is predicted. Seed 42; 42 to 46 here.
- lore_tldr (Bose et al. 2025, arXiv 2504.14439): TL;DR, real choices. Half of the workers train, with at most 150 comparisons.
  Of the others at most 50 training comparisons are learnt from, all validation comparisons predicted. 20 draws.
- lore_prism (same): PRISM users of more than five dialogues. 80% train. Half of each one's dialogues is learnt from (trained on),
  the other predicted (left out).

Checked with the papers' code: github.com/RamyaLab/pluralistic-alignment, github.com/facebookresearch/LoRe. What differs here:
- pal: comparisons of equal length are dropped, there they are decided by position. Who of the new workers prefers shorter is
  drawn as for `tldr_length`; there 22 workers who prefer longer are listed by name. Five draws of what is learnt from: there the
  seed of the draw is 42 each time.
- lore_tldr: the order that is shuffled (seed 0) is by name; there it is that of a Python set of texts, which no seed fixes. The
  prompt has title and subreddit; there it is the post alone.
- lore_prism: N counts comparisons, in the order of the shuffled dialogues; there all of the half is learnt from, or up to three
  dialogues. What people said about themselves is left out, as there.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import CANONICAL, Comparison, parse_comparison, read_comparisons
from prlhf.data.files import Record
from prlhf.data.sets import prism, tldr
from prlhf.data.sets.raw import Options
from prlhf.data.sets.splits import related, shuffled
from prlhf.data.users import ranked
from prlhf.errors import UserError

SHOTS = (0, 1, 2, 5, 10, 20, 50)


class Draw(NamedTuple):
    """One draw of one new user, as rows of `Division.new`."""

    user: str
    learn: list[int]  # in the order in which they are learnt from
    predict: list[int]  # empty: what is not learnt from

    def at(self, shots: int) -> tuple[list[int], list[int]]:
        """The first so many, or all where there are fewer, and what is predicted then."""
        return self.learn[:shots], self.predict or self.learn[shots:]


class Division(NamedTuple):
    """What a protocol trains on, the new users' comparisons, and how these are divided in each draw."""

    train: list[Record]  # empty: the checkpoint has been trained on the protocol's file
    new: list[Comparison]
    draws: list[list[Draw]]
    shots: tuple[int, ...] = SHOTS


def polis(folder: Path, form: DataConfig = CANONICAL) -> Division:
    """The voters of a Polis folder whom training did not know."""
    parts = [read_comparisons(folder / f"unseen_users_{part}.jsonl", form).comparisons for part in ("adapt", "test")]
    learn, predict = parts
    rows = [rows_of([c.user for c in part], start) for part, start in ((learn, 0), (predict, len(learn)))]
    draws = [Draw(user, rows[0][user], rows[1][user]) for user in ranked(c.user for c in learn) if user in rows[1]]
    return Division([], learn + predict, [draws])


def rows_of(names: Sequence[str | None], start: int = 0) -> dict[str, list[int]]:
    """The rows of each name (a user's, a dialogue's), counted from `start`."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names, start):
        if name is not None:
            found.setdefault(name, []).append(row)
    return found


def divided(train: list[Record], new: list[Record], draws: list[list[Draw]], shots: tuple[int, ...]) -> Division:
    """A division of records. UserError where there is nobody to train on, or no new user."""
    if not train or not draws[0]:
        raise UserError(
            f"{len(train):,} comparisons would be trained on, for {len(draws[0]):,} new users; expected some of each"
        )
    return Division(train, [parse_comparison(r, str(r["id"]), str(r["id"])) for r in new], draws, shots)


def pal(folder: Path, known: int = 10, least: int = 100, runs: int = 5) -> Division:
    """PAL's unseen workers of TL;DR. What is learnt from is as scikit-learn's train_test_split(train_size=N) draws it."""
    found = tldr.labelled(folder, lambda policy: "sup" in policy and "ppo" not in policy)
    prefers_shorter = tldr.length_preferences(found)
    workers = ranked(r["user"] for r in found.train)[:known]
    counts = Counter(r["user"] for r in found.valid)
    train = tldr.relabelled([r for r in found.train if r["user"] in workers], prefers_shorter)
    others = [r for r in found.valid if r["user"] not in workers and counts[r["user"]] >= least]
    new = tldr.relabelled(others, prefers_shorter)
    rows = {user: own for user, own in rows_of([r["user"] for r in new]).items() if len(own) > least}
    draws = []
    for run in range(runs):
        orders = {user: np.random.RandomState(42 + run).permutation(len(own)) for user, own in rows.items()}
        draws.append([Draw(user, [own[i] for i in orders[user][::-1]], []) for user, own in rows.items()])
    return divided(train, new, draws, (*SHOTS, 100))


def lore_tldr(folder: Path, left_out: int = 2, runs: int = 20) -> Division:
    """LoRe's workers of TL;DR: all policies; the two with the fewest training comparisons are left out."""
    found = tldr.labelled(folder, lambda policy: True)
    parts = [[r for r in part if r["chosen"] != r["rejected"]] for part in (found.train, found.valid)]
    rows, tests = (rows_of([r["user"] for r in part]) for part in parts)
    fewest = sorted(rows, key=lambda user: (len(rows[user]), user))[:left_out]
    workers, rng = sorted(rows.keys() & tests.keys()), random.Random(0)
    rng.shuffle(workers)
    half = len(workers) // 2
    halves = [[user for user in part if user not in fewest] for part in (workers[:half], workers[half:])]
    train = [parts[0][row] for user in halves[0] for row in rng.sample(rows[user], min(150, len(rows[user])))]
    new: list[Record] = []
    users = []
    for user in halves[1]:
        pool = [parts[0][row] for row in rng.sample(rows[user], min(50, len(rows[user])))]
        predicted = [parts[1][row] for row in tests[user]]
        first, second = len(new), len(new) + len(pool)
        new += pool + predicted
        users.append((user, list(range(first, second)), list(range(second, len(new)))))
    draws = [[Draw(user, rng.sample(pool, len(pool)), tested) for user, pool, tested in users] for _ in range(runs)]
    return divided(train, new, draws, (0, *range(5, 55, 5)))


def lore_prism(folder: Path, known: float = 0.8, least: int = 6) -> Division:
    """LoRe's users of PRISM. Draws are those of its code: numpy's seed 123 shuffles the users, then each one's dialogues."""
    records = prism.read(folder, Options()).records
    records = [{name: value for name, value in r.items() if name not in ("user_text", "attributes")} for r in records]
    dialogues, rng = related(records, "user", "split_group"), np.random.RandomState(123)
    of_dialogue = rows_of([r["split_group"] for r in records])
    users = shuffled(list(dialogues), rng)
    share = int(len(users) * known)
    train: list[Record] = []
    new: list[Record] = []
    draws = []
    for place, user in enumerate(users):
        if len(dialogues[user]) < least:
            continue
        order = shuffled(dialogues[user], rng)
        middle = len(order) // 2
        halves = (order[:middle], order[middle:])
        own = [[records[row] for name in half for row in of_dialogue[name]] for half in halves]
        if place < share:
            train += own[0]
        else:
            first, second = len(new), len(new) + len(own[0])
            new += own[0] + own[1]
            draws.append(Draw(user, list(range(first, second)), list(range(second, len(new)))))
    return divided(train, new, [draws], SHOTS)


PROTOCOLS: dict[str, Callable[[Path], Division]] = {"pal": pal, "lore-tldr": lore_tldr, "lore-prism": lore_prism}
