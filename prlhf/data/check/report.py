"""A look at files of comparisons before training: what they hold, what leaks between them, how far trivial rules get.

    python -m prlhf.data check TRAIN [HELD_OUT ...] [--config NAME] [--set key=value ...]

The first file is the training split, the others are held out. With --config also: what becomes tokens, and what is
dropped and cut; `data.known_users` then decides who is known. The files of the command line are read, whole, whatever
data.train and data.limit say. Texts that differ only in white space or in how Unicode is composed count as the same.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prlhf.config.keys import DataConfig
from prlhf.data.check.leaks import JUDGED, LEAKS, judged_leaks, leak
from prlhf.data.check.rules import RULES, FittedRules, as_read, conflicts, fit, majority_share, pair_key, prompt_key
from prlhf.data.check.tables import markdown_table, percent_text
from prlhf.data.comparisons import CANONICAL, Comparison, ComparisonFile, Messages, read_comparisons, words
from prlhf.data.users import UserIndex

FEW = 5  # fewer training comparisons than this tell little about a user
MUCH = 0.05  # a larger share than this that is dropped or cut deserves a warning


class CheckedFile(NamedTuple):
    """A file, the name of its column in the tables, which of its comparisons are a known user's, and these `as_read`."""

    path: str
    label: str
    file: ComparisonFile
    known: list[bool]
    read: list[Comparison]

    @property
    def comparisons(self) -> list[Comparison]:
        """Those with two different responses."""
        return self.file.comparisons


class Section(NamedTuple):
    """A part of the report, and the warnings that it gives rise to."""

    text: str
    warnings: list[str]


class Spread(NamedTuple):
    """Where a list of numbers lies."""

    low: float
    mean: float
    median: float
    p95: float
    high: float


class AsTokens(NamedTuple):
    """What becomes of a file's comparisons as tokens: the length of each that is left, and the counts, in words and by name."""

    lengths: list[int]
    said: str
    too_long_dropped: int
    prompts_truncated: int
    user_texts_truncated: int


Encode = Callable[[ComparisonFile, UserIndex], AsTokens]


def run(files: Sequence[str], form: DataConfig = CANONICAL, encode: Encode | None = None) -> None:
    """Print the report on the files, the warnings last. UserError for a bad file.

    form: how they are read, and how many users are known; encode: makes tokens of a file, where that is to be reported.
    """
    warnings = []
    for section in check(files, form, encode):
        print(section.text, flush=True)
        warnings += section.warnings
    print("\n".join(f"warning: {warning}" for warning in warnings) or "No warnings.")


def check(files: Sequence[str], form: DataConfig, encode: Encode | None) -> Iterator[Section]:
    """The report, part by part. UserError, before the first part, for a file that cannot be read."""
    read = [read_comparisons(path, form) for path in files]
    users = UserIndex.from_comparisons(read[0].comparisons, form.known_users)
    labels = [Path(path).name for path in files]
    labels = labels if len(set(labels)) == len(labels) else list(files)
    splits = [
        CheckedFile(
            str(path), label, file,
            [users.number(c.user) > 0 for c in file.comparisons], [as_read(c) for c in file.comparisons],
        )
        for path, label, file in zip(files, labels, read)
    ]  # fmt: skip
    yield contents_section(splits, users)
    yield activity_section(splits, users)
    yield votes_section(splits)
    rules = fit(splits[0].read, users)
    if len(splits) > 1:
        yield leaks_section(splits, rules)
    yield lengths_section(splits)
    if encode is not None:
        yield tokens_section(splits, users, encode)
    yield rules_section(splits, rules)


def spread(numbers: Sequence[float]) -> Spread:
    """Least, mean, median, 95th percentile (between neighbours: linear) and largest."""
    return Spread(*(float(f(numbers)) for f in (np.min, np.mean, np.median, lambda n: np.percentile(n, 95), np.max)))


def contents(split: CheckedFile) -> dict[str, int]:
    """How many there are of what in a file."""
    comparisons = split.comparisons
    named = [(c.user, known) for c, known in zip(comparisons, split.known) if c.user]
    return {
        "comparisons": len(comparisons),
        "pairs of equal responses, left out": split.file.equal_responses,
        "prompts": len({prompt_key(c.prompt) for c in split.read}),
        "distinct pairs": len({pair_key(c) for c in split.read}),
        "comparisons with user_text": sum(c.user_text is not None for c in comparisons),
        "users": len({user for user, _ in named}),
        "known users": len({user for user, known in named if known}),
        "unknown users": len({user for user, known in named if not known}),
        "comparisons of known users": sum(split.known),
        "comparisons of unknown users": sum(not known for _, known in named),
        "comparisons without a user": len(comparisons) - len(named),
    }


def contents_section(splits: Sequence[CheckedFile], users: UserIndex) -> Section:
    """A column a file."""
    columns = [contents(split) for split in splits]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    files = [f"- `{s.path}` ({'held out' if i else 'training'})" for i, s in enumerate(splits)]
    known = f"Known users: {len(users):,} of the {columns[0]['users']:,} in the training file."
    text = ["# Data check", "", *files, "", known, "", markdown_table(["", *(s.label for s in splits)], rows)]
    return Section("\n".join(text), [])


def activity_section(splits: Sequence[CheckedFile], users: UserIndex) -> Section:
    """Comparisons per user, and the known users with few in training."""
    rows = []
    for split in splits:
        counts = Counter(c.user for c in split.comparisons if c.user)
        lies = spread(list(counts.values())) if counts else None
        most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
        active = ", ".join(f"{user} ({n:,})" for user, n in most)
        rows.append([split.label, *((lies.low, lies.median, lies.high) if lies else [None] * 3), active])
    trained = Counter(c.user for c in splits[0].comparisons)
    few = [name for name in users.names if trained[name] < FEW]
    warnings = []
    if few:
        share = f"{len(few):,} of {len(users):,}"
        warnings.append(f"{splits[0].path}: known users with fewer than {FEW} comparisons: {share}, e.g. {few[0]!r}")
    text = markdown_table(["comparisons per user", "least", "median", "most", "the most active"], rows)
    return Section(f"\n{text}", warnings)


def votes_section(splits: Sequence[CheckedFile]) -> Section:
    """Repeated and contradicted votes, and what they leave a user-blind model to reach."""
    rows, warnings = [], []
    for split in splits:
        found, majority = conflicts(split.read), majority_share(split.read)
        rows.append([split.label, found.duplicates, found.contradictions, found.disputed_pairs,
                     majority.repeated_pairs, majority.contradicted_pairs, percent_text(majority.share)])  # fmt: skip
        if found.example:
            warnings.append(
                f"{split.path}: a user's votes for both responses of the same pair: {found.contradictions:,}, "
                f"e.g. {found.example.user!r} in comparison {found.example.id}"
            )
    header = ["votes", "duplicates (user, pair, choice)", "contradictions (user, pair)", "pairs on which users differ",
              "pairs that occur again", "pairs with votes for both responses", "majority share"]  # fmt: skip
    meaning = (
        "A contradiction is one user's votes for both responses of a pair. Votes without a user count only in the last\n"
        "three columns.\n"
        "The majority share is the most that a user-blind model can get right on that very file: each pair as most\n"
        "of its votes say (100% where no pair occurs again)."
    )
    return Section(f"\n{markdown_table(header, rows)}\n\n{meaning}", warnings)


def leaks_section(splits: Sequence[CheckedFile], rules: FittedRules) -> Section:
    """What each file shares with each one before it: the training file first, then other held-out files."""
    rows, warnings = [], []
    for i, j in itertools.combinations(range(len(splits)), 2):
        earlier = "the training file" if i == 0 else splits[i].path
        leaks = {kind: leak(splits[i].read, splits[j].read, keys) for kind, keys in LEAKS.items()}
        if i == 0:
            leaks |= judged_leaks(rules, splits[j].read)
            warnings += own_record_warnings(splits[j], rules)
        for kind, found in leaks.items():
            share = percent_text(found.comparisons / len(splits[j].read))
            rows.append(
                [splits[j].label, splits[i].label, kind, found.distinct, found.comparisons, share, found.example]
            )
            if kind == "pairs" and found.comparisons:
                warnings.append(
                    f"{splits[j].path}: comparisons of pairs that are also in {earlier}: {found.comparisons:,} "
                    f"({share}), e.g. {found.example}"
                )
    header = ["of the file", "also in", "what", "how many", "comparisons", "share", "one of them"]
    return Section(f"\n{markdown_table(header, rows)}", warnings)


def own_record_warnings(split: CheckedFile, rules: FittedRules) -> list[str]:
    """A warning where a user's own record in training says something of the responses of a held-out comparison."""
    judged = np.array([bool(rules.judged(c)) for c in split.read])
    if not judged.any():
        return []
    affected, known = [c for c, is_judged in zip(split.read, judged) if is_judged], np.array(split.known)
    shares = percent_text(judged.mean()) + (
        f"; of known users' {percent_text(judged[known].mean())}" if known.any() else ""
    )
    right = float(np.mean(rules.right(affected)["own_record"]))
    return [
        f"{split.path}: comparisons of {JUDGED}: {len(affected):,} ({shares}), e.g. {affected[0].id}; a rule that only "
        f"remembers each user's own record (own_record) is right on {percent_text(right)} of them. "
        "`python -m prlhf.data split --by response` divides without this"
    ]


def text_words(text: str | Messages) -> int:
    """Words of a text, or of the contents of all messages."""
    return words(text) if isinstance(text, str) else sum(words(message["content"]) for message in text)


def lengths_section(splits: Sequence[CheckedFile]) -> Section:
    """Lengths in words, and how often the chosen response is the longer one."""
    rows = []
    for split in splits:
        for name in ("prompt", "chosen", "rejected"):
            lies = spread([text_words(getattr(c, name)) for c in split.comparisons])
            rows.append([split.label, name, *lies[1:]])
    shares = []
    for split in splits:
        more = np.array([words(c.chosen) - words(c.rejected) for c in split.comparisons])
        shares.append([split.label, *(percent_text(float(np.mean(side))) for side in (more > 0, more == 0, more < 0))])
    lengths = markdown_table(["words", "of the", "mean", "median", "95th percentile", "most"], rows)
    return Section(f"\n{lengths}\n\n{markdown_table(['chosen is', 'longer', 'as long', 'shorter'], shares)}", [])


def tokens_section(splits: Sequence[CheckedFile], users: UserIndex, encode: Encode) -> Section:
    """What becomes of the files under a config. UserError where nothing of a file fits data.max_tokens."""
    rows, warnings = [], []
    for split in splits:
        found = encode(split.file, users)
        rows.append([split.label, found.said, *spread(found.lengths)[1:]])
        warnings += encoding_warnings(split.path, found, len(split.comparisons))
    header = ["in tokens", "what became of it", "tree: mean", "median", "95th percentile", "most"]
    return Section(f"\n{markdown_table(header, rows)}", warnings)


def encoding_warnings(path: str, report: AsTokens, comparisons: int) -> list[str]:
    """A sentence about each way in which more than MUCH of the comparisons lose something."""
    counts = {
        "are dropped: their responses leave too little room for the prompt (data.max_tokens)": report.too_long_dropped,
        "lose part of the prompt (data.max_prompt_tokens, data.max_tokens)": report.prompts_truncated,
        "lose part of the user text (data.max_user_text_tokens)": report.user_texts_truncated,
    }
    return [
        f"{path}: {percent_text(count / comparisons)} of {comparisons:,} comparisons {what}"
        for what, count in counts.items()
        if count > MUCH * comparisons
    ]


def rules_section(splits: Sequence[CheckedFile], rules: FittedRules) -> Section:
    """What trivial rules get right, those that learn having learnt from the training file."""
    rows = []
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
    return Section(f"\n{markdown_table(header, rows)}\n\n" + "\n".join(notes) + "\n", [])
