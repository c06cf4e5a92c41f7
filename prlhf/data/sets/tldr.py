"""TL;DR comparisons (Stiennon et al. 2020, openai/summarize_from_feedback): real annotators, the paper's main data.

Raw: JSON Lines batch3.json ... batch22.json, a line {info{post, title, subreddit, ...}, summaries[2]{text, policy},
choice, worker, split, ...}. The paper keeps comparisons whose policies both contain "sup" and neither "ppo" nor "cnn". The
ten workers with most training comparisons are known. The split is the data set's own.

In `tldr_length` the choices are simulated (paper, section 5.1): each worker prefers the longer or the shorter summary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prlhf.data.comparisons import parse_user
from prlhf.data.files import Record, read_json_lines
from prlhf.data.sets.raw import Count, Official, Options, RawSet, field, objects, raw_files, text_key
from prlhf.data.sets.simulate import preferences, relabel
from prlhf.data.users import ranked
from prlhf.errors import UserError

FILES = ("batch*.json",)
TRAIN, VALID = ("train",), ("valid1", "valid2")
SHORTER, SEED = 0.3, 3456  # of the simulation: the probability that a worker prefers the shorter summary
PUBLISHED = {  # by number of known workers
    "comparisons for training after the filter of policies": {10: 38_487, 40: 38_487},
    "comparisons for validation after the filter of policies": {10: 16_294, 40: 16_294},
    "of the known workers, for training": {10: 23_299},
    "of the known workers, for training, with two different summaries": {10: 23_292},
    "of the known workers, for validation": {10: 4_921},
    "of other workers, for validation": {10: 11_373},
}
PREFER_LONGER = {  # shares of the validation comparisons, ties included
    "of known workers' validation comparisons, by workers who prefer longer": {10: "68.50 %", 40: "63.56 %"},
    "of other workers' validation comparisons, by workers who prefer longer": {10: "63.63 %", 40: "71.34 %"},
}


class Filtered(NamedTuple):
    """The comparisons that pass the filter of policies, and how many passed."""

    train: list[Record]
    valid: list[Record]
    counts: tuple[int, int]  # for training and validation, with those without a post, which are in neither list
    dropped: dict[str, int]


def read(folder: Path, options: Options) -> RawSet:
    """The comparisons of the raw files in `folder`. UserError, with file, line and field, for bad raw data."""
    filtered = labelled(folder)
    return _raw_set(filtered, filtered.train, filtered.valid, options)


def read_length(folder: Path, options: Options) -> RawSet:
    """The same comparisons with simulated choices (`length_preferences`)."""
    filtered = labelled(folder)
    prefers_shorter = length_preferences(filtered)
    train, valid = (relabelled(part, prefers_shorter) for part in (filtered.train, filtered.valid))
    filtered.dropped["as long as each other"] = len(filtered.train) + len(filtered.valid) - len(train) - len(valid)
    known = set(ranked(r["user"] for r in filtered.train)[: options.known_users])
    counts = []
    for (what, published), is_known in zip(PREFER_LONGER.items(), (True, False)):
        longer = [not prefers_shorter[r["user"]] for r in filtered.valid if (r["user"] in known) == is_known]
        share = f"{100 * sum(longer) / len(longer):.2f} %" if longer else "none"
        counts.append(Count(what, share, published.get(options.known_users)))
    raw = _raw_set(filtered, train, valid, options)
    return raw._replace(counts=raw.counts + counts)


def length_preferences(filtered: Filtered) -> dict[str, bool]:
    """Whether each worker prefers the shorter summary. One draw each: first those of training, in order of activity."""
    both = (ranked(r["user"] for r in part) for part in (filtered.train, filtered.valid))
    order = list(dict.fromkeys(worker for part in both for worker in part))
    return dict(zip(order, preferences(len(order), SHORTER, SEED)))


def relabelled(records: list[Record], prefers_shorter: dict[str, bool]) -> list[Record]:
    """The records with each worker's preference of length, in characters as in the paper's code.

    Ties are dropped; that code decides them by position.
    """
    choices = (relabel((r["chosen"], r["rejected"]), prefers_shorter[r["user"]], len) for r in records)
    return [{**r, "chosen": choice[0], "rejected": choice[1]} for r, choice in zip(records, choices) if choice]


def _raw_set(filtered: Filtered, train: list[Record], valid: list[Record], options: Options) -> RawSet:
    """The official split of labelled comparisons. The counts are of the comparisons before choices were simulated."""
    known = set(ranked(r["user"] for r in filtered.train)[: options.known_users])
    of_known = [r for r in filtered.train if r["user"] in known]
    different = sum(r["chosen"] != r["rejected"] for r in of_known)
    held_out = sum(r["user"] in known for r in filtered.valid)
    found = (*filtered.counts, len(of_known), different, held_out, len(filtered.valid) - held_out)
    counts = [Count(what, n, said.get(options.known_users)) for (what, said), n in zip(PUBLISHED.items(), found)]
    kept, kept_valid = ([r for r in part if r["chosen"] != r["rejected"]] for part in (train, valid))
    equal = len(train) + len(valid) - len(kept) - len(kept_valid)
    trained, pool = ([r for r in kept if (r["user"] in known) == is_known] for is_known in (True, False))
    return RawSet([], Official(trained, kept_valid, pool), counts, {**filtered.dropped, "with equal summaries": equal})


def supervised(policy: str) -> bool:
    """The paper's filter of policies."""
    return "sup" in policy and "ppo" not in policy and "cnn" not in policy


def labelled(folder: Path, keeps: Callable[[str], bool] = supervised) -> Filtered:
    """The comparisons of two policies that pass a filter, in file order. UserError with file, line and field."""
    dropped = dict.fromkeys(("of other policies", "without a post"), 0)
    parts: tuple[list[Record], list[Record]] = [], []
    counts = [0, 0]
    for path in raw_files(folder, "tldr", *FILES):
        for number, raw in read_json_lines(path):
            where = f"{path}, line {number}"
            summaries = objects(raw, "summaries", where)
            if len(summaries) != 2:
                raise UserError(f"{where}, summaries: expected 2, found {len(summaries)}")
            policies = [field(s, "policy", str, f"{where}, summaries[{i}]") for i, s in enumerate(summaries)]
            if not all(map(keeps, policies)):
                dropped["of other policies"] += 1
                continue
            choice, split = field(raw, "choice", int, where), field(raw, "split", str, where)
            if choice not in (0, 1) or split not in (*TRAIN, *VALID):
                found = f"choice {choice}, split {split!r}"
                raise UserError(f"{where}: found {found}, expected choice 0 or 1 and split train, valid1 or valid2")
            counts[split in VALID] += 1
            info = field(raw, "info", dict, where)
            title, subreddit, post = (
                field(info, name, str, f"{where}, info", optional=True) or "" for name in ("title", "subreddit", "post")
            )
            if not post:
                dropped["without a post"] += 1
                continue
            texts = [field(s, "text", str, f"{where}, summaries[{i}]") for i, s in enumerate(summaries)]
            texts = [text if text.startswith(" ") else " " + text for text in texts]
            prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
            user = parse_user(field(raw, "worker", str, where), f"{where}, worker")
            place = dict(user=user, id=f"{path.stem}:{number}", split_group=text_key(prompt), split=split)
            parts[split in VALID].append(dict(prompt=prompt, chosen=texts[choice], rejected=texts[1 - choice], **place))
    return Filtered(*parts, (counts[0], counts[1]), dropped)
