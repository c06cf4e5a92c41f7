"""Files to records: JSON Lines, CSV and parquet, each record with its line or row number."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prlhf.data.sources import DATA_SETS
from prlhf.errors import UserError, did_you_mean, expanded

Record = dict[str, Any]
# A message, {"role": ..., "content": ...}, or a list of them: as JSON, or as Python or pandas print it.
LIKE_MESSAGES = re.compile(r"""\s*(\[\s*)?\{(?=.*["']role["'])(?=.*["']content["']).*\}(\s*\])?\s*""", re.DOTALL)


def read_records(path: str | Path, format: str = "auto") -> Iterator[tuple[str, int, Record]]:
    """("FILE, line 3", 3, record) for each record of a file; in parquet files "row 3".

    format: "jsonl", "csv", "parquet", or "auto": by the name without .gz, else "jsonl". UserError, with file and place.
    """
    if format == "auto":
        format = Path(Path(path).name.removesuffix(".gz")).suffix.removeprefix(".").lower()
    read = {"csv": read_csv, "parquet": read_parquet}.get(format, read_json_lines)
    unit = "row" if format == "parquet" else "line"
    for number, record in read(path):
        yield f"{path}, {unit} {number}", number, record


def require_file(path: str | Path) -> Path:
    """The path, ~ expanded. UserError for a folder, and, with a near match, where there is no such file."""
    path = expanded(path)
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        held = f"one of those in it: {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}" if files else "a file"
        raise UserError(f"{path}: is a folder, expected {held}")
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near)
        if path.parent.parts[-3:-1] == ("runs", "data") and path.parent.name in DATA_SETS:
            hint += f"; `python -m prlhf.data prepare {path.parent.name}` makes it from what `fetch` has downloaded"
        raise UserError(f"{path}: no such file{hint}")
    return path


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, plain or .gz. UserError, with file and line: truncated or damaged gzip, not UTF-8."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        raise UserError(f"{path}, line {number}: expected UTF-8, found {found}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}, after line {number}: truncated or damaged gzip file ({error})") from None


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Number and object of each line, plain or .gz. UserError by line: missing, empty, damaged, no object.

    A field that is NaN, as pandas has it where there is none, is left out.
    """
    path = require_file(path)
    found = False
    for number, line in read_lines(path):
        text = line.strip()
        if text:
            record = parse_json(text, f"{path}, line {number}")
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {text[:60]!r}")
            found = True
            yield number, {name: value for name, value in record.items() if value == value}
    if not found:
        raise UserError(f"{path}: empty, expected one JSON object a line")


def parse_json(text: str, where: str, lines: bool = False) -> Any:
    """A JSON value. UserError with `where`, and line if `lines`: invalid, too deep or large, a field given twice, half a
    surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if lines else ""
        raise UserError(f"{where}{line}, column {error.colno}: not valid JSON ({error.msg})") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair (\\ud...), expected whole characters") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON ({error})") from None
    return value


def _object(fields: list[tuple[str, Any]]) -> Record:
    """A JSON object of these fields. ValueError where one is given twice: json.loads would keep the last."""
    record = dict(fields)
    if len(record) < len(fields):
        name = Counter(name for name, _ in fields).most_common(1)[0][0]
        raise ValueError(f"the field {name!r} is given twice")
    return record


def read_csv(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Line number (the last of its lines) and record of each row of a CSV file with a header, plain or .gz.

    Empty cells are left out; a cell that holds messages is read as JSON. UserError, with file and line: missing, empty, not
    UTF-8, two columns of one name, not as many cells as the header, messages that are no JSON.
    """
    path = require_file(path)
    csv.field_size_limit(2**31 - 1)
    number = 0
    parts = (io.StringIO(line, newline="") for _, line in read_lines(path))  # a "\r" alone ends a line too
    rows = csv.reader(itertools.chain.from_iterable(parts), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        _require_once(filter(None, header), f"{path}, line {rows.line_num}")
        for cells in filter(None, rows):
            number = rows.line_num
            if len(cells) != len(header):
                expected = f"{len(header)} as in the header"
                raise UserError(f"{path}, line {number}: found {len(cells)} cells, expected {expected}")
            place = f"{path}, line {number}"
            yield number, {name: _cell(value, f"{place}, {name}") for name, value in zip(header, cells) if value}
    except csv.Error as error:
        raise UserError(f"{path}, after line {number}: not valid CSV ({error})") from None
    if not number:
        raise UserError(f"{path}: empty, expected a header and one comparison a row")


def _cell(text: str, where: str) -> Any:
    """What a cell of a CSV file holds: text, or messages. UserError where it looks like messages and is no JSON."""
    if not LIKE_MESSAGES.fullmatch(text):
        return text
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        expected = 'expected [{"role": ..., "content": ...}] as json.dumps writes it'
        raise UserError(f"{where}: looks like messages, but is no JSON ({error}); {expected}") from None


def _require_once(names: Iterable[str], where: str) -> None:
    """UserError where one of the names occurs twice: one of the two columns would be lost."""
    counts = Counter(names)
    twice = [name for name in counts if counts[name] > 1]
    if twice:
        raise UserError(f"{where}: two columns are named {twice[0]!r}, expected each name once")


def read_parquet(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Row number, from 1, and record of each row of a parquet file (with pyarrow, an extra). Nulls and NaN are left out.

    UserError, with the file: missing, damaged, without rows, two columns of one name; or pyarrow is not installed.
    """
    path = require_file(path)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow, expected it (pip install 'prlhf[parquet]')") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _require_once(file.schema_arrow.names, str(path))
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield (
                        number,
                        {name: value for name, value in record.items() if value is not None and value == value},
                    )
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{path}, after row {number}: not a whole parquet file ({error})") from None
    if not number:
        raise UserError(f"{path}: no rows, expected one comparison a row")


def write_json_lines(path: str | Path, records: Iterable[Record]) -> None:
    """Write a JSON Lines file, and its folder; gzipped where the name ends in .gz. Complete or not there."""
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    with (gzip.open if path.suffix == ".gz" else open)(aside, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. Complete or not there."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file in place of the one that may be there. Complete or not there."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of(*parts: Any) -> str:
    """A hash of plain values, in order."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
