"""A report on files of comparisons before training: their contents, what leaks between them, what trivial rules get right.

    python -m prlhf.data check TRAIN [HELD_OUT ...] [--config NAME] [--set key=value ...]

The first file is the training split, the others are held out. With --config also: what becomes tokens, and what is dropped
and cut; `data.known_users` then decides who is known. The files of the command line are read whole, whatever data.train and
data.limit say. Texts that differ only in white space or in how Unicode is composed count as the same.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.config.keys import DataConfig
from prlhf.data.check.leaks import JUDGED, leaks
from prlhf.data.check.rules import RULES, FittedRules, as_read, conflicts, fit, majority_share, pair_key, prompt_key
from prlhf.data.check.tables import Cell, markdown_table, percent_text
from prlhf.data.comparisons import CANONICAL, Comparison, ComparisonFile, read_comparisons, words
from prlhf.data.unknown import alike, check_users, without_users
from prlhf.data.users import UserIndex

FEW = 5  # fewer training comparisons than this tell little about a user
MUCH = 0.05  # a warning where more than this share is dropped or cut
LOST = (
    "are dropped: their responses leave too little room for the prompt (data.max_tokens)",
    "lose part of the prompt (data.max_prompt_tokens, data.max_tokens)",
    "lose part of the user text (data.max_user_text_tokens)",
)


class CheckedFile(NamedTuple):
    """A file, its column name in the tables, which comparisons are a known user's, and the comparisons `as_read`."""

    path: str
    label: str
    file: ComparisonFile
    known: list[bool]
    read: list[Comparison]


class AsTokens(NamedTuple):
    """A file as tokens: the lengths of the comparisons that are left, a summary in words, and a count for each of LOST."""

    lengths: list[int]
    said: str
    lost: tuple[int, int, int]


Encode = Callable[[ComparisonFile, UserIndex], AsTokens]


def run(files: Sequence[str], form: DataConfig = CANONICAL, encode: Encode | None = None) -> None:
    """Print the report on the files, the warnings last. UserError for a bad file.

    form: the files' format, user_column, attributes and known_users. encode: makes tokens of a file, to report on these too.
    """
    warnings: list[str] = []
    for section in check(files, form, encode, warnings):
        print(section, flush=True)
    print("\n".join(f"warning: {warning}" for warning in warnings) or "No warnings.")


def check(files: Sequence[str], form: DataConfig, encode: Encode | None, warnings: list[str]) -> Iterator[str]:
    """The report, part by part; each adds its warnings. UserError, before the first part, for a file that cannot be read."""
    read = [read_comparisons(path, form) for path in files]
    users = UserIndex.from_comparisons(read[0].comparisons, form.known_users)
    names = [Path(path).name for path in files]
    labels = names if len(set(names)) == len(names) else files
    splits = []
    for path, label, file in zip(files, labels, read):
        known = [users.number(c.user) > 0 for c in file.comparisons]
        splits.append(CheckedFile(str(path), str(label), file, known, [as_read(c) for c in file.comparisons]))
    rules = fit(splits[0].read, users)
    warnings += users_warnings(splits, users, form)
    yield contents_section(splits, users)
    yield activity_section(splits, users, warnings)
    yield votes_section(splits, warnings)
    if len(splits) > 1:
        yield leaks_section(splits, rules, warnings)
    yield lengths_section(splits)
    if encode is not None:
        yield tokens_section(splits, users, encode, warnings)
    yield rules_section(splits, rules)


def users_warnings(splits: Sequence[CheckedFile], users: UserIndex, form: DataConfig) -> list[str]:
    """A warning for a file without users, for names in training that look the same, and for held-out users who are unknown
    though a known name looks the same, or of whom none is known."""
    found = []
    for i, split in enumerate(splits):
        names = [c.user for c in split.read]
        unknown = {name for name in names if name and not users.number(name)}
        if not any(names):
            found.append(without_users(split.path, form))
        elif i == 0:
            found.append(alike(split.path, names))
        elif users.near(unknown) or not any(split.known):
            found.append(check_users(split.path, names, users, replace(form, new_users=True)))
    return [said for said in found if said]


def spread(numbers: Sequence[float]) -> list[float]:
    """Mean, median, 95th percentile (linear between neighbours) and largest."""
    return [float(f(numbers)) for f in (np.mean, np.median, lambda n: np.percentile(n, 95), np.max)]


def contents_section(splits: Sequence[CheckedFile], users: UserIndex) -> str:
    """The counts, a column for each file."""
    columns = []
    for split in splits:
        named = [(c.user, known) for c, known in zip(split.read, split.known) if c.user]
        counts = {
            "comparisons": len(split.read),
            "pairs of equal responses, left out": split.file.equal_responses,
            "prompts": len({prompt_key(c.prompt) for c in split.read}),
            "distinct pairs": len({pair_key(c) for c in split.read}),
            "comparisons with user_text": sum(c.user_text is not None for c in split.read),
            "users": len({user for user, _ in named}),
            "known users": len({user for user, known in named if known}),
            "unknown users": len({user for user, known in named if not known}),
            "comparisons of known users": sum(split.known),
            "comparisons of unknown users": sum(not known for _, known in named),
            "comparisons without a user": len(split.read) - len(named),
        }
        columns.append(counts)
    rows: list[list[Cell]] = [[name, *(column[name] for column in columns)] for name in columns[0]]
    files = [f"- `{s.path}` ({'held out' if i else 'training'})" for i, s in enumerate(splits)]
    known = f"Known users: {len(users):,} of the {columns[0]['users']:,} in the training file."
    table = markdown_table(["", *(split.label for split in splits)], rows)
    return "\n".join(["# Data check", "", *files, "", known, "", table])


def activity_section(splits: Sequence[CheckedFile], users: UserIndex, warnings: list[str]) -> str:
    """Comparisons per user, and the known users with few training comparisons."""
    rows: list[list[Cell]] = []
    for split in splits:
        counts = Counter(c.user for c in split.read if c.user)
        lies = [f(list(counts.values())) if counts else None for f in (np.min, np.median, np.max)]
        most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
        rows.append([split.label, *lies, ", ".join(f"{user} ({n:,})" for user, n in most)])
    trained = Counter(c.user for c in splits[0].read)
    few = [name for name in users.names if trained[name] < FEW]
    if few:
        share = f"{len(few):,} of {len(users):,}"
        warnings.append(f"{splits[0].path}: known users with fewer than {FEW} comparisons: {share}, e.g. {few[0]!r}")
    return "\n" + markdown_table(["comparisons per user", "least", "median", "most", "the most active"], rows)


def votes_section(splits: Sequence[CheckedFile], warnings: list[str]) -> str:
    """Repeated and contradicted votes, and the accuracy that they leave to a user-blind model."""
    rows: list[list[Cell]] = []
    for split in splits:
        found, (share, *pairs) = conflicts(split.read), majority_share(split.read)
        rows.append([split.label, *found[:3], *pairs, percent_text(share)])
        if found.example:
            warnings.append(
                f"{split.path}: a user's votes for both responses of the same pair: {found.contradictions:,}, "
                f"e.g. {found.example.user!r} in comparison {found.example.id}"
            )
    meaning = (
        "A contradiction is one user's votes for both responses of a pair. Votes without a user count only in the last\n"
        "three columns.\n"
        "The majority share is the most that a user-blind model can get right on that very file: each pair as most\n"
        "of its votes say (100% where no pair occurs again)."
    )
    counts = "duplicates (user, pair, choice)", "contradictions (user, pair)", "pairs on which users differ"
    header = ["votes", *counts, "pairs that occur again", "pairs with votes for both responses", "majority share"]
    return f"\n{markdown_table(header, rows)}\n\n{meaning}"


def leaks_section(splits: Sequence[CheckedFile], rules: FittedRules, warnings: list[str]) -> str:
    """What each file shares with each earlier one: the training file first, then other held-out files."""
    rows: list[list[Cell]] = []
    for (i, one), (_, other) in itertools.combinations(enumerate(splits), 2):
        if i == 0:
            warnings += own_record_warnings(other, rules)
        for kind, found in leaks(one.read, other.read, rules if i == 0 else None).items():
            share = percent_text(found.comparisons / len(other.read))
            rows.append([other.label, one.label, kind, found.distinct, found.comparisons, share, found.example])
            if kind == "pairs" and found.comparisons:
                earlier = "the training file" if i == 0 else one.path
                counted = f"{found.comparisons:,} ({share}), e.g. {found.example}"
                warnings.append(f"{other.path}: comparisons of pairs that are also in {earlier}: {counted}")
    header = ["of the file", "also in", "what", "how many", "comparisons", "share", "one of them"]
    return f"\n{markdown_table(header, rows)}"


def own_record_warnings(split: CheckedFile, rules: FittedRules) -> list[str]:
    """A warning where users judged a response of a held-out comparison in training."""
    judged, known = np.array([bool(rules.judged(c)) for c in split.read]), np.array(split.known)
    if not judged.any():
        return []
    affected = [c for c, is_judged in zip(split.read, judged) if is_judged]
    shares = percent_text(judged.mean())
    if known.any():
        shares += f"; of known users' {percent_text(judged[known].mean())}"
    right = percent_text(float(np.mean(rules.right(affected)["own_record"])))
    return [
        f"{split.path}: comparisons of {JUDGED}: {len(affected):,} ({shares}), e.g. {affected[0].id}; a rule that only "
        f"remembers each user's own record (own_record) is right on {right} of them. "
        "`python -m prlhf.data split --by response` divides without this"
    ]


def lengths_section(splits: Sequence[CheckedFile]) -> str:
    """Lengths in words, and how often the chosen response is the longer one."""
    rows: list[list[Cell]] = []
    shares = []
    for split in splits:
        prompts: list[Any] = [c.prompt for c in split.read]  # `as_read`: all are messages
        lengths = {
            "prompt": [sum(words(message["content"]) for message in prompt) for prompt in prompts],
            "chosen": [words(c.chosen) for c in split.read],
            "rejected": [words(c.rejected) for c in split.read],
        }
        rows += [[split.label, name, *spread(numbers)] for name, numbers in lengths.items()]
        more = np.subtract(lengths["chosen"], lengths["rejected"])
        shares.append([split.label, *(percent_text(float(np.mean(side))) for side in (more > 0, more == 0, more < 0))])
    table = markdown_table(["words", "of the", "mean", "median", "95th percentile", "most"], rows)
    return f"\n{table}\n\n{markdown_table(['chosen is', 'longer', 'as long', 'shorter'], shares)}"


def tokens_section(splits: Sequence[CheckedFile], users: UserIndex, encode: Encode, warnings: list[str]) -> str:
    """What a config makes of the files; warns of losses above MUCH. UserError where nothing fits data.max_tokens."""
    rows: list[list[Cell]] = []
    for split in splits:
        found = encode(split.file, users)
        rows.append([split.label, found.said, *spread(found.lengths)])
        total = len(split.read)
        for what, count in zip(LOST, found.lost):
            if count > MUCH * total:
                warnings.append(f"{split.path}: {percent_text(count / total)} of {total:,} comparisons {what}")
    header = ["in tokens", "what became of it", "tree: mean", "median", "95th percentile", "most"]
    return f"\n{markdown_table(header, rows)}"


def rules_section(splits: Sequence[CheckedFile], rules: FittedRules) -> str:
    """The accuracy of trivial rules; the rules that learn have learnt from the training file."""
    rows: list[list[Cell]] = []
    for i, split in enumerate(splits):
        known = np.array(split.known)
        for name, values in rules.right(split.read).items():
            right = np.array(values)
            groups = (right, right[known], right[~known])
            accuracies = [percent_text(float(group.mean())) if len(group) else None for group in groups]
            rows.append([split.label if i else f"{split.label} *", name, *accuracies, int((right != 0.5).sum())])
    header = ["accuracy of", "the rule", "all", "known users", "unknown users", "decides"]
    notes = [f"- {name}: {meaning}" for name, meaning in RULES.items() if any(row[1] == name for row in rows)]
    notes.append("- decides: so many comparisons; the others are ties and count one half")
    notes.append("- \\*: in-sample for the rules that learn, which learn from the training file")
    return f"\n{markdown_table(header, rows)}\n\n" + "\n".join(notes) + "\n"
