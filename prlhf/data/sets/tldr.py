"""TL;DR comparisons (Stiennon et al. 2020, openai/summarize_from_feedback): real annotators, the paper's main data.

Raw: JSON Lines batch3.json ... batch22.json, a line {info{post, title, subreddit, ...}, summaries[2]{text, policy},
choice, worker, split, ...}. The paper keeps comparisons of which both policies contain "sup" and neither "ppo" or "cnn";
known are the ten workers with most comparisons in training. The split is the data set's own.

As `tldr_length` the choices are simulated (paper, section 5.1): every worker prefers the longer or the shorter summary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prlhf.data.comparisons import Comparison, parse_comparison, parse_user
from prlhf.data.files import read_json_lines
from prlhf.data.sets.raw import Count, Official, Options, RawSet, Record, field, objects, raw_files, text_key
from prlhf.data.sets.simulate import preferences, relabel
from prlhf.data.users import UserIndex
from prlhf.errors import UserError

FILES = ("batch*.json",)
TRAIN, VALID = ("train",), ("valid1", "valid2")
SHORTER, SEED = 0.3, 3456  # of the simulation: how many prefer the shorter summary, and its draws
PUBLISHED = {  # by number of known workers
    "comparisons for training after the filter of policies": {10: 38_487, 40: 38_487},
    "comparisons for validation after the filter of policies": {10: 16_294, 40: 16_294},
    "of the known workers, for training": {10: 23_299},
    "of the known workers, for training, with two different summaries": {10: 23_292},
    "of the known workers, for validation": {10: 4_921},
    "of other workers, for validation": {10: 11_373},
}
PREFER_LONGER = {  # of the validation comparisons by such workers, ties included
    "of known workers' validation comparisons, by workers who prefer longer": {10: "68.50 %", 40: "63.56 %"},
    "of other workers' validation comparisons, by workers who prefer longer": {10: "63.63 %", 40: "71.34 %"},
}


class Filtered(NamedTuple):
    """What passes the filter of policies: comparisons, and how many for training and for validation, post or not."""

    comparisons: list[Record]
    counts: tuple[int, int]
    dropped: dict[str, int]

    def part(self, splits: tuple[str, ...]) -> list[Record]:
        """The comparisons for training, or for validation."""
        return [record for record in self.comparisons if record["split"] in splits]


def read(folder: Path, options: Options) -> RawSet:
    """The comparisons of the raw files in `folder`. UserError, with file, line and field, for what is none."""
    filtered = _filtered(folder)
    return _reading(filtered, filtered.comparisons, _ranked(filtered, TRAIN), options)


def read_length(folder: Path, options: Options) -> RawSet:
    """The same with simulated choices: one draw for each worker, those of training first, in order of activity.

    Length is in characters, as in the paper's code; ties, which that code decides by position, are dropped.
    """
    filtered = _filtered(folder)
    workers = _ranked(filtered, TRAIN)
    order = list(dict.fromkeys((*workers, *_ranked(filtered, VALID))))
    prefers_shorter = dict(zip(order, preferences(len(order), SHORTER, SEED)))
    labelled = []
    for record in filtered.comparisons:
        choice = relabel(_parsed(record), prefers_shorter[record["user"]], length=len)
        if choice is not None:
            labelled.append({**record, "chosen": choice[0], "rejected": choice[1]})
    filtered.dropped["as long as each other"] = len(filtered.comparisons) - len(labelled)
    reading = _reading(filtered, labelled, workers, options)
    known = set(workers[: options.known_users])
    groups: tuple[list[bool], list[bool]] = [], []
    for record in filtered.part(VALID):
        groups[record["user"] not in known].append(not prefers_shorter[record["user"]])
    shares = [f"{100 * sum(longer) / len(longer):.2f} %" if longer else "none" for longer in groups]
    counts = [
        Count(what, share, said.get(options.known_users)) for (what, said), share in zip(PREFER_LONGER.items(), shares)
    ]
    return reading._replace(counts=reading.counts + counts)


def _ranked(filtered: Filtered, splits: tuple[str, ...]) -> tuple[str, ...]:
    """The workers by descending number of comparisons."""
    return UserIndex.from_comparisons(map(_parsed, filtered.part(splits))).names


def _reading(filtered: Filtered, labelled: list[Record], workers: Sequence[str], options: Options) -> RawSet:
    """The official split of comparisons, and the counts of what was there before choices were simulated.

    workers: those of training, by activity.
    """
    known = set(workers[: options.known_users])
    train = [r for r in filtered.part(TRAIN) if r["user"] in known]
    valid = [r["user"] in known for r in filtered.part(VALID)]
    different = sum(r["chosen"] != r["rejected"] for r in train)
    found = (*filtered.counts, len(train), different, sum(valid), len(valid) - sum(valid))
    counts = [Count(what, n, said.get(options.known_users)) for (what, said), n in zip(PUBLISHED.items(), found)]
    kept = [r for r in labelled if r["chosen"] != r["rejected"]]
    official = Official(
        [r for r in kept if r["split"] in TRAIN and r["user"] in known],
        [r for r in kept if r["split"] in VALID],
        [r for r in kept if r["split"] in TRAIN and r["user"] not in known],
    )
    return RawSet([], official, counts, {**filtered.dropped, "with equal summaries": len(labelled) - len(kept)})


def _parsed(record: Record) -> Comparison:
    return parse_comparison(record, record["id"], record["id"])


def _filtered(folder: Path) -> Filtered:
    """The comparisons that pass the filter of policies, in the files' order. UserError with file, line and field."""
    dropped = dict.fromkeys(("of other policies", "without a post"), 0)
    comparisons, counts = [], [0, 0]
    for path in raw_files(folder, "tldr", *FILES):
        for number, raw in read_json_lines(path):
            where = f"{path}, line {number}"
            summaries = objects(raw, "summaries", where)
            if len(summaries) != 2:
                raise UserError(f"{where}, summaries: expected 2, found {len(summaries)}")
            policies = [field(s, "policy", str, f"{where}, summaries[{i}]") for i, s in enumerate(summaries)]
            if not all("sup" in p and "ppo" not in p and "cnn" not in p for p in policies):
                dropped["of other policies"] += 1
                continue
            choice, split = field(raw, "choice", int, where), field(raw, "split", str, where)
            if choice not in (0, 1) or split not in (*TRAIN, *VALID):
                found = f"choice {choice}, split {split!r}"
                raise UserError(f"{where}: found {found}, expected choice 0 or 1 and split train, valid1 or valid2")
            counts[split in VALID] += 1
            info = field(raw, "info", dict, where)
            post = field(info, "post", str, f"{where}, info", optional=True)
            if not post:
                dropped["without a post"] += 1
                continue
            title, subreddit = (field(info, n, str, f"{where}, info", True) or "" for n in ("title", "subreddit"))
            texts = [field(s, "text", str, f"{where}, summaries[{i}]") for i, s in enumerate(summaries)]
            texts = [text if text.startswith(" ") else " " + text for text in texts]
            prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
            comparisons.append(
                {
                    "prompt": prompt,
                    "chosen": texts[choice],
                    "rejected": texts[1 - choice],
                    "user": parse_user(field(raw, "worker", str, where), f"{where}, worker"),
                    "id": f"{path.stem}:{number}",
                    "split_group": text_key(prompt),
                    "split": split,
                }
            )
    return Filtered(comparisons, (counts[0], counts[1]), dropped)
