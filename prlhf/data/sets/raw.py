"""What the readers of the papers' data sets share: what they return, and how they find and check raw files.

A reader's record is a canonical comparison with a "split_group": comparisons of one group stay on one side of a split.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prlhf.data.comparisons import shortened
from prlhf.data.files import Record
from prlhf.data.sources import SOURCES
from prlhf.errors import UserError


@dataclass(frozen=True)
class Options:
    """The options of `prepare`."""

    seed: int = 123
    few_shot: int = 0  # comparisons of each unknown user to adapt with
    known_users: int = 10  # TL;DR: the workers with most training comparisons
    rejected: str = "each"  # PRISM: each unchosen response of a turn, or the best-scored one


class Count(NamedTuple):
    """A count, and the published number (None where nothing is published)."""

    what: str
    found: int | str
    published: int | str | None = None


class Official(NamedTuple):
    """A split that comes with the data set; pool: unknown users' comparisons of its training part."""

    train: list[Record]
    valid: list[Record]
    pool: list[Record]


class RawSet(NamedTuple):
    """The comparisons of raw files."""

    records: list[Record]  # to be split; empty where there is an official split
    official: Official | None
    counts: list[Count]
    dropped: dict[str, int]  # why, and how many
    prompts: list[Record] | None = None  # the data set's own evaluation prompts
    known_users: float = 0.9  # share of the users who are known, where there is no official split
    dialogues: bool = False  # each group is one user's own; each user's groups are divided


def raw_files(folder: Path, name: str, *patterns: str) -> list[Path]:
    """The files of a folder, or else of those below it, that match a pattern, ordered by name with numbers as numbers.

    A pattern "a|b" is b where no file matches a. name: the source. UserError where no file matches a pattern.
    """
    files: list[Path] = []
    for pattern in patterns:
        choices = [f"{where}{name}" for where in ("", "*/") for name in pattern.split("|")]
        matching = next((found for choice in choices if (found := list(folder.glob(choice)))), None)
        if not matching:
            source = SOURCES[name]
            raise UserError(
                f"{folder}: no file {pattern}; expected the raw files of {source.title} ({source.page}), "
                f"which `python -m prlhf.data fetch {name}` downloads"
            )
        pieces = {path: re.split(r"(\d+)", path.name) for path in matching}  # batch12.json: batch, 12, .json
        files += sorted(pieces, key=lambda path: [int(s) if s.isdecimal() else s for s in pieces[path]])
    return files


KINDS = {str: "text", dict: "an object", list: "a list", int: "a whole number", bool: "true or false"}


def field(record: Record, name: str, kind: type, where: str, optional: bool = False) -> Any:
    """record[name], of that kind; None where it is optional and absent or null. UserError with `where` otherwise."""
    value = record.get(name)
    if value is None and optional:
        return None
    if type(value) is not kind:
        found = "nothing" if value is None else shortened(value)
        raise UserError(f"{where}, {name}: expected {KINDS[kind]}, found {found}")
    return value


def texts(record: Record, where: str, *names: str) -> list[str]:
    """The fields of these names, each a text. UserError as of `field`."""
    return [field(record, name, str, where) for name in names]


def objects(record: Record, name: str, where: str, optional: bool = False) -> list[Record]:
    """record[name], a list of objects; [] where it is optional and absent. UserError as of `field`."""
    found = field(record, name, list, where, optional) or []
    for i, item in enumerate(found):
        if not isinstance(item, dict):
            raise UserError(f"{where}, {name}[{i}]: expected an object, found {type(item).__name__}")
    return found


def text_key(text: str) -> str:
    """A short name for a text, the same for equal texts: the split_group of the comparisons of one prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
