"""What evaluate.py wrote, read back: margins.jsonl and report.json of several evaluations of the same comparisons."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.data.files import read_json_lines
from prlhf.errors import UserError
from prlhf.evaluate.report import BRANCHES, MARGINS
from prlhf.evaluate.stats.metrics import correct
from prlhf.evaluate.stats.paired import Comparisons, Model

REPORTED = {  # of an evaluation's report.json: where, and the column's title
    "calibration_top": (("calibration", "top"), "calibration error, known users"),
    "calibration_generic": (("calibration", "generic"), "calibration error, unknown users"),
    "gain_over_generic": (("controls", "gain_over_generic", "accuracy"), "gain over the generic user"),
    "personalisation_gain": (("controls", "personalisation_gain", "accuracy"), "personalisation gain"),
    "own_record": (("own_record", "accuracy"), "the rule own_record, known users"),
}


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


FIELDS = {  # of margins.jsonl: is this right, and what is
    "id": (lambda value: isinstance(value, str), "a string"),
    "user": (lambda value: value is None or isinstance(value, str), "a string or null"),
    "text": (lambda value: isinstance(value, str), "a string (of older evaluations: evaluate anew)"),
    "known": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(BRANCHES, (is_finite, "a finite number")),
}


def evaluation_folder(folder: str) -> Path:
    """The folder of an evaluation: itself, or a run's eval/. UserError where neither holds margins.jsonl."""
    for path in (Path(folder), Path(folder) / "eval"):
        if (path / MARGINS).is_file():
            return path
    found = f"neither {MARGINS} nor eval/{MARGINS}" if Path(folder).is_dir() else "no such folder"
    raise UserError(f"{folder}: found {found}, expected what evaluate.py wrote, or a run that it evaluated")


def read_margins(folder: str) -> tuple[Comparisons, np.ndarray]:
    """The comparisons of an EVAL_DIR (or of a run's) and what the model got right of them, (B,).

    UserError, with file, line and field, where margins.jsonl is missing or damaged.
    """
    path = evaluation_folder(folder) / MARGINS
    records = []
    for number, record in read_json_lines(path):
        for field, (kind, expected) in FIELDS.items():
            value = record.get(field)
            if field not in record or not kind(value):
                raise UserError(f"{path}, line {number}, {field}: expected {expected}, found {json.dumps(value)}")
        records.append(record)
    records.sort(key=lambda record: (record["id"], record["user"] or "", record["text"]))
    known_B = np.array([record["known"] for record in records])
    margins_B = np.array([record["true" if record["known"] else "generic"] for record in records], dtype=float)
    ids, users, texts = ([record[field] for record in records] for field in ("id", "user", "text"))
    return Comparisons(ids, users, texts, known_B), correct(margins_B)


class Reported(NamedTuple):
    """Of an evaluation's report.json the REPORTED numbers, by name, and whether own_record explains the model's gain."""

    numbers: dict[str, float | None]
    explained: bool | None


def read_reported(folder: str) -> Reported:
    """What an evaluation reported; None for what its report.json lacks. UserError where that is damaged."""
    path = evaluation_folder(folder) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error

    def read(keys: Sequence[str], kind: Callable[[Any], bool], expected: str) -> Any:
        value = report
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not kind(value):
            raise UserError(f"{path}, {'.'.join(keys)}: expected {expected} or null, found {json.dumps(value)}")
        return value

    numbers = {name: read(keys, is_finite, "a finite number") for name, (keys, _) in REPORTED.items()}
    return Reported(numbers, read(("own_record", "explains_gain"), lambda v: isinstance(v, bool), "true or false"))


def read_models(named: dict[str, list[str]]) -> tuple[Comparisons, list[Model]]:
    """The models by name, from their folders.

    UserError where two folders do not hold the same comparisons, and where two seeds of a model are one folder.
    """
    first, models = None, []
    for name, folders in named.items():
        resolved = [evaluation_folder(folder).resolve() for folder in folders]
        for i, folder in enumerate(folders):
            if resolved[i] in resolved[:i]:
                other = folders[resolved.index(resolved[i])]
                raise UserError(f"{name}: {folder} and {other} are the same evaluation, which would count as two seeds")
        right = []
        for folder in folders:
            comparisons, right_B = read_margins(folder)
            first = first or (folder, comparisons)
            require_same(*first, folder, comparisons)
            right.append(right_B)
        reported = [read_reported(folder) for folder in folders]
        numbers, explained = map(list, zip(*reported))
        models.append(Model(name, folders, np.stack(right), numbers, explained))
    return first[1], models


def require_same(first: str, expected: Comparisons, other: str, found: Comparisons) -> None:
    """UserError that says what differs, where two folders' ids, users, texts or known users do."""
    rows = [list(zip(c.ids, c.users)) for c in (expected, found)]
    if rows[0] != rows[1]:
        only = [f"{_excess(*these)} only in {folder}" for these, folder in ((rows, first), (rows[::-1], other))]
        raise UserError(f"not the same comparisons (ids and users): {only[0]}, {only[1]}")
    differing = np.flatnonzero(np.array(expected.texts) != np.array(found.texts))
    if len(differing):
        raise UserError(
            f"not the same comparisons: in {len(differing)} of them (the first: {_title(rows[0][differing[0]])}) prompt, chosen "
            f"or rejected response are another text in {first} than in {other}"
        )
    differing = np.flatnonzero(expected.known_B != found.known_B)
    if len(differing):
        i = differing[0]
        status = ["known" if c.known_B[i] else "unknown" for c in (expected, found)]
        raise UserError(
            f"not the same known users: in {len(differing)} comparisons (the first: {_title(rows[0][i])}) the user is "
            f"{status[0]} in {first}, {status[1]} in {other}"
        )


def _title(comparison: tuple[str, str | None]) -> str:
    return f"id {comparison[0]!r} of user {comparison[1]!r}"


def _excess(these: list[tuple], those: list[tuple]) -> str:
    """How many comparisons only the first list has, and the first of them."""
    only = list((Counter(these) - Counter(those)).elements())
    return f"{len(only)} ({_title(only[0])}, ...)" if only else "none"
