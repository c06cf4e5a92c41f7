"""TL;DR comparisons (Stiennon et al. 2020, openai/summarize_from_feedback): real annotators, the paper's main data.

Raw: JSON Lines batch3.json ... batch22.json, a line {info{post, title, subreddit, ...}, summaries[2]{text, policy},
choice, worker, split, ...}. The paper keeps comparisons of which both policies contain "sup" and neither "ppo" or "cnn";
known are the ten workers with most comparisons in training. The split is the data set's own.

As `tldr_length` the choices are simulated (paper, section 5.1): every worker prefers the longer or the shorter summary.
"""

from collections.abc import Iterator
from pathlib import Path

from prlhf.data import UserIndex, parse_comparison, words
from prlhf.data.files import read_json_lines
from prlhf.data.reading import Count, Official, Options, Reading, Record, field, objects, raw_files, text_key
from prlhf.data.sources import SOURCES
from prlhf.errors import UserError
from prlhf.simulate import preferences, relabel

TRAIN, VALID = ("train",), ("valid1", "valid2")
SHORTER, SEED = 0.3, 3456  # of the simulation: how many prefer the shorter summary, and its draws
PUBLISHED = {  # with ten known workers
    "comparisons for training after the filter of policies": 38_487,
    "comparisons for validation after the filter of policies": 16_294,
    "of the known workers, for training": 23_299,
    "of the known workers, for training, with two different summaries": 23_292,
    "of the known workers, for validation": 4_921,
    "of other workers, for validation": 11_373,
}
LONGER_WINS = {"known": "68.50 %", "other": "63.63 %"}  # of the validation comparisons with simulated choices


def read(folder: Path, options: Options) -> Reading:
    """The comparisons of the raw files in `folder`. UserError, with file, line and field, for what is none."""
    dropped: dict[str, int] = {}
    every = list(_comparisons(folder, dropped))
    return _reading(every, options, dropped)


def read_length(folder: Path, options: Options) -> Reading:
    """The same with simulated choices: one draw for each worker, those of training first, in order of activity.

    Ties in the number of words are dropped.
    """
    dropped: dict[str, int] = {}
    every = list(_comparisons(folder, dropped))
    ranked = [
        UserIndex.from_comparisons(_parsed(r) for r in every if r["split"] in part).names for part in (TRAIN, VALID)
    ]
    order = list(dict.fromkeys((*ranked[0], *ranked[1])))
    prefers_shorter = dict(zip(order, preferences(len(order), SHORTER, SEED)))
    labelled = []
    for record in every:
        choice = relabel(_parsed(record), prefers_shorter[record["user"]])
        if choice is not None:
            labelled.append({**record, "chosen": choice[0], "rejected": choice[1]})
    known = UserIndex(order[: options.known_users])
    reading = _reading(labelled, options, {**dropped, "as long as each other": len(every) - len(labelled)}, known)
    counts = []
    for name, is_known in (("known", True), ("other", False)):
        chosen = [r for r in reading.official.valid if (known.number(r["user"]) > 0) == is_known]
        longer = sum(words(r["chosen"]) > words(r["rejected"]) for r in chosen)
        share = f"{100 * longer / len(chosen):.2f} %" if chosen else "none"
        published = LONGER_WINS[name] if options.known_users == 10 else None
        counts.append(Count(f"of {name} workers' validation comparisons, won by the longer summary", share, published))
    return reading._replace(counts=counts)


def _reading(every: list[Record], options: Options, dropped: dict[str, int], known: UserIndex | None = None) -> Reading:
    """Known workers, the official split and its counts."""
    train, valid = ([r for r in every if r["split"] in part] for part in (TRAIN, VALID))
    known = known or UserIndex.from_comparisons(map(_parsed, train), options.known_users)
    of_known = [r for r in train if known.number(r["user"])]
    others = [r for r in train if not known.number(r["user"])]
    different = [[r for r in part if r["chosen"] != r["rejected"]] for part in (of_known, valid, others)]
    valid_known = sum(known.number(r["user"]) > 0 for r in valid)
    found = (len(train), len(valid), len(of_known), len(different[0]), valid_known, len(valid) - valid_known)
    published = PUBLISHED.values() if options.known_users == 10 else [*list(PUBLISHED.values())[:2], *[None] * 4]
    counts = [Count(what, number, said) for what, number, said in zip(PUBLISHED, found, published)]
    equal = len(of_known) + len(valid) + len(others) - sum(map(len, different))
    return Reading([], Official(*different), counts, {**dropped, "with equal summaries": equal})


def _parsed(record: Record):
    return parse_comparison(record, record["id"], record["id"])


def _comparisons(folder: Path, dropped: dict[str, int]) -> Iterator[Record]:
    """The comparisons that pass the filter of policies, in the files' order."""
    other, without_post = "of other policies", "without a post"
    dropped.update({other: 0, without_post: 0})
    for path in raw_files(folder, SOURCES["tldr"], "batch*.json"):
        for number, raw in read_json_lines(path):
            where = f"{path}, line {number}"
            summaries = objects(raw, "summaries", where)
            if len(summaries) != 2:
                raise UserError(f"{where}, summaries: expected 2, found {len(summaries)}")
            policies = [field(s, "policy", str, f"{where}, summaries[{i}]") for i, s in enumerate(summaries)]
            if not all("sup" in p and "ppo" not in p and "cnn" not in p for p in policies):
                dropped[other] += 1
                continue
            info = field(raw, "info", dict, where)
            post = field(info, "post", str, f"{where}, info", optional=True)
            if not post:
                dropped[without_post] += 1
                continue
            title, subreddit = (field(info, n, str, f"{where}, info", True) or "" for n in ("title", "subreddit"))
            choice = field(raw, "choice", int, where)
            split = field(raw, "split", str, where)
            if choice not in (0, 1) or split not in (*TRAIN, *VALID):
                found = f"choice {choice}, split {split!r}"
                raise UserError(f"{where}: found {found}, expected choice 0 or 1 and split train, valid1 or valid2")
            texts = [field(s, "text", str, f"{where}, summaries[{i}]") for i, s in enumerate(summaries)]
            texts = [text if text.startswith(" ") else " " + text for text in texts]
            prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
            yield {
                "prompt": prompt,
                "chosen": texts[choice],
                "rejected": texts[1 - choice],
                "user": field(raw, "worker", str, where),
                "id": f"{path.stem}:{number}",
                "group": text_key(prompt),
                "split": split,
            }
