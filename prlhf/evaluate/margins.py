"""What evaluate.py wrote, read back: margins.jsonl and report.json of several evaluations of the same comparisons."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.data.files import read_json_lines
from prlhf.data.names import canonical
from prlhf.errors import UserError
from prlhf.evaluate.report import BRANCHES, MARGINS
from prlhf.evaluate.stats.metrics import correct
from prlhf.evaluate.stats.paired import Comparisons, Model

JSON_KINDS = {str: "a string", str | None: "a string or null", bool: "true or false", float: "a finite number"}
FIELDS = {"id": str, "user": str | None, "text": str, "known": bool, **dict.fromkeys(BRANCHES, float)}  # of MARGINS


class ReportedNumber(NamedTuple):
    """A number of an evaluation's report.json: the keys that lead to it, and its title in a table."""

    keys: tuple[str, ...]
    title: str


REPORTED = {
    "calibration_top": ReportedNumber(("calibration", "top"), "calibration error, known users"),
    "calibration_generic": ReportedNumber(("calibration", "generic"), "calibration error, unknown users"),
    "gain_over_generic": ReportedNumber(("controls", "gain_over_generic", "accuracy"), "gain over the generic user"),
    "personalisation_gain": ReportedNumber(("controls", "personalisation_gain", "accuracy"), "personalisation gain"),
    "own_record": ReportedNumber(("own_record", "accuracy"), "the rule own_record, known users"),
}


def evaluation_folder(folder: str) -> Path:
    """The folder of an evaluation: itself, or a run's eval/. UserError where neither holds margins.jsonl."""
    for path in (Path(folder), Path(folder) / "eval"):
        if (path / MARGINS).is_file():
            return path
    found = f"neither {MARGINS} nor eval/{MARGINS}" if Path(folder).is_dir() else "no such folder"
    raise UserError(f"{folder}: found {found}, expected what evaluate.py wrote, or a run that it evaluated")


def read_margins(folder: str) -> tuple[Comparisons, np.ndarray]:
    """An evaluation's comparisons and, (B,), what the model got right (`correct`), known users as themselves.

    UserError, with file, line and field, where margins.jsonl is missing or damaged.
    """
    path = evaluation_folder(folder) / MARGINS
    records = []
    for number, record in read_json_lines(path):
        for field, kind in FIELDS.items():
            if field not in record or not _is(record[field], kind):
                hint = "; an older evaluation: evaluate anew" if field == "text" else ""
                found = json.dumps(record.get(field))
                raise UserError(f"{path}, line {number}, {field}: expected {JSON_KINDS[kind]}, found {found}{hint}")
        user = record["user"] and canonical(record["user"])  # an earlier version's need not be
        records.append({**record, "user": user})
    records.sort(key=lambda record: (record["id"], record["user"] or "", record["text"]))
    ids, users, texts, known = ([record[field] for record in records] for field in ("id", "user", "text", "known"))
    margins_B = np.array([record["true" if record["known"] else "generic"] for record in records], dtype=float)
    return Comparisons(ids, users, texts, np.array(known)), correct(margins_B)


def _is(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a kind of JSON_KINDS: true is no number, and a number is finite."""
    return type(value) in (int, float) and math.isfinite(value) if kind is float else isinstance(value, kind)


def read_models(named: dict[str, list[str]]) -> tuple[Comparisons, list[Model]]:
    """The models, of the seeds' folders by name. UserError where comparisons differ or two seeds are one folder."""
    first, models = None, []
    for name, folders in named.items():
        seeds: dict[Path, str] = {}
        right = []
        for folder in folders:
            path = evaluation_folder(folder).resolve()
            if path in seeds:
                raise UserError(f"{name}: {folder} and {seeds[path]} are the same evaluation, which is not two seeds")
            seeds[path] = folder
            comparisons, right_B = read_margins(folder)
            first = first or (folder, comparisons)
            require_same(*first, folder, comparisons)
            right.append(right_B)
        numbers, explained = map(list, zip(*map(read_reported, folders)))
        models.append(Model(name, folders, np.stack(right), numbers, explained))
    return first[1], models


def read_reported(folder: str) -> tuple[dict[str, float | None], bool | None]:
    """The REPORTED numbers; whether own_record explains the gain. None for what is lacking; UserError if damaged."""
    path = evaluation_folder(folder) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None

    def read(keys: tuple[str, ...], kind: Any) -> Any:
        value = report
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not _is(value, kind):
            raise UserError(f"{path}, {'.'.join(keys)}: expected {JSON_KINDS[kind]} or null, found {json.dumps(value)}")
        return value

    numbers = {name: read(number.keys, float) for name, number in REPORTED.items()}
    return numbers, read(("own_record", "explains_gain"), bool)


def require_same(first: str, expected: Comparisons, other: str, found: Comparisons) -> None:
    """UserError that says what differs, where two folders' ids, users, texts or known users do."""
    rows = [list(zip(c.ids, c.users)) for c in (expected, found)]
    if rows[0] != rows[1]:
        only = f"{_excess(*rows)} only in {first}, {_excess(*rows[::-1])} only in {other}"
        raise UserError(f"not the same comparisons (ids and users): {only}")
    differing = np.flatnonzero(np.array(expected.texts) != np.array(found.texts))
    if len(differing):
        raise UserError(
            f"not the same comparisons: in {len(differing)} of them (the first: {_title(rows[0][differing[0]])}) prompt, "
            f"chosen or rejected response are another text in {first} than in {other}"
        )
    differing = np.flatnonzero(expected.known_B != found.known_B)
    if len(differing):
        i = differing[0]
        known, unknown = (first, other) if expected.known_B[i] else (other, first)
        raise UserError(
            f"not the same known users: in {len(differing)} comparisons (the first: {_title(rows[0][i])}) the user is "
            f"known in {known}, unknown in {unknown}"
        )


def _title(comparison: tuple[str, str | None]) -> str:
    return f"id {comparison[0]!r} of user {comparison[1]!r}"


def _excess(these: list[tuple], those: list[tuple]) -> str:
    """How many comparisons only the first list has, and the first of them."""
    only = list((Counter(these) - Counter(those)).elements())
    return f"{len(only)} ({_title(only[0])}, ...)" if only else "none"
