"""What the readers of the papers' data sets share: what they return, and how they look at raw files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prlhf.data.sources import Source
from prlhf.errors import UserError

Record = dict[str, Any]  # a canonical comparison, and its "group": what must lie on one side of a split


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


class Reading(NamedTuple):
    """What a reader makes of raw files."""

    records: list[Record]  # to be split, or the official split
    official: Official | None
    counts: list[Count]
    dropped: dict[str, int]  # why, and how many
    prompts: list[Record] | None = None  # the data set's own evaluation prompts
    published_split: tuple[int, int] | None = None  # comparisons trained on, and held out


def raw_files(folder: Path, source: Source, *patterns: str) -> list[Path]:
    """The files of a folder, or one below it, that match a pattern, in order of name with numbers as numbers.

    UserError where a pattern has none.
    """
    found: list[Path] = []
    for pattern in patterns:
        matching = sorted(folder.rglob(pattern), key=lambda p: [int(s) if s.isdigit() else s for s in _pieces(p.name)])
        if not matching:
            raise UserError(f"{folder}: no file {pattern}; expected the raw files of {source.title} ({source.page})")
        found += matching
    return found


def _pieces(name: str) -> list[str]:
    """'batch12.json' -> ['batch', '12', '.json'], beginning with a word."""
    pieces = [""]
    for letter in name:
        if letter.isdigit() != pieces[-1].isdigit():
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


def first_seen(records: list[Record]) -> dict[str, None]:
    """The users of records, in order of first appearance."""
    return {record["user"]: None for record in records}
