"""What the readers of the papers' data sets share: what they return, and how they look at raw files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prlhf.data.sources import SOURCES
from prlhf.errors import UserError

Record = dict[str, Any]  # a canonical comparison, and its "split_group": what must lie on one side of a split


@dataclass(frozen=True)
class Options:
    """What `prepare` may be asked for."""

    seed: int = 123
    few_shot: int = 0  # comparisons of each unknown user to adapt with
    known_users: int = 10  # TL;DR: the workers with most training comparisons
    rejected: str = "each"  # PRISM: each unchosen response of a turn, or the best-scored one


class Count(NamedTuple):
    """Something counted, and what the publications say it is (None: nothing)."""

    what: str
    found: int | str
    published: int | str | None = None


class Official(NamedTuple):
    """A split that the data set brings along; pool: of unknown users, from the training part."""

    train: list[Record]
    valid: list[Record]
    pool: list[Record]


class RawSet(NamedTuple):
    """What a reader makes of raw files."""

    records: list[Record]  # to be split, or the official split
    official: Official | None
    counts: list[Count]
    dropped: dict[str, int]  # why, and how many
    prompts: list[Record] | None = None  # the data set's own evaluation prompts
    dialogues: bool = False  # each group is one user's own, and is divided with that user's others


def raw_files(folder: Path, name: str, *patterns: str) -> list[Path]:
    """The files of a folder, or else one below it, that match a pattern, in order of name with numbers as numbers.

    A pattern "a|b" is b where there is no a. name: of the source. UserError where a pattern has none.
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
        files += sorted(matching, key=lambda path: [int(s) if s.isdecimal() else s for s in _pieces(path.name)])
    return files


def _pieces(name: str) -> list[str]:
    """'batch12.json' -> ['batch', '12', '.json'], beginning with a word."""
    pieces = [""]
    for letter in name:
        if letter.isdecimal() != pieces[-1].isdecimal():
            pieces.append("")
        pieces[-1] += letter
    return pieces


KINDS = {str: "text", dict: "an object", list: "a list", int: "a whole number", bool: "true or false"}


def field(record: Record, name: str, kind: type, where: str, optional: bool = False) -> Any:
    """record[name], of that kind; None where it is optional and absent or null. UserError with `where` otherwise."""
    value = record.get(name)
    if value is None and optional:
        return None
    if type(value) is not kind:
        found = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
        found = found if len(found) <= 60 else found[:57] + "..."
        raise UserError(f"{where}, {name}: expected {KINDS[kind]}, found {found}")
    return value


def objects(record: Record, name: str, where: str, optional: bool = False) -> list[Record]:
    """record[name], a list of objects; [] where it is optional and absent."""
    found = field(record, name, list, where, optional) or []
    for i, item in enumerate(found):
        if not isinstance(item, dict):
            raise UserError(f"{where}, {name}[{i}]: expected an object, found {type(item).__name__}")
    return found


def text_key(text: str) -> str:
    """A short name for a text, the same for equal texts: what a group of comparisons of one prompt is called."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
