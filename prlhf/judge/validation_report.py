"""A judge's validation as files: validation.json and validation.md; and read back, for the report that quotes it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prlhf.data.check.tables import interval_text, markdown_table, percent
from prlhf.data.files import write_json
from prlhf.data.names import quoted
from prlhf.errors import UserError
from prlhf.evaluate.ends import SHOWN
from prlhf.judge.judges import Judge
from prlhf.judge.report import certain_text
from prlhf.judge.server import ANSWERS_FOLDER
from prlhf.judge.validation import USER_CONTROLS

VALIDATION_FILE = "validation.json"
QUOTED = ("data", "comparisons", "users", "agreement", "differences", "personal", "sentence")  # in a win rate's report
TITLES = {"judge": "the judge, as each user", **{name: f"the same, {title}" for name, title in USER_CONTROLS.items()}}


def check_validation_out(out: Path, asked: Mapping[str, Any]) -> None:
    """UserError unless `out` is not there, is empty but for a server's answers, or holds a validation of what is asked.

    asked: {"judge", "data", ...}, as validation.json begins.
    """
    expected = "expected a new or empty folder, or a validation of the same judge on the same file"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: found a file, {expected}")
    entries = sorted({path.name for path in out.iterdir()} - {ANSWERS_FOLDER}) if out.is_dir() else []
    if entries and VALIDATION_FILE not in entries:
        raise UserError(f"--out {out}: holds something else ({quoted(entries)}), {expected}")
    held = _read(out / VALIDATION_FILE, "--out") if entries else asked
    if differing := [name for name, value in asked.items() if held.get(name) != value]:
        found = f"{held['judge']} on {held['data']}"
        raise UserError(
            f"--out {out}: holds a validation of {found}, which differs in {', '.join(differing)}; {expected}"
        )


def write_validation(out: Path, report: Mapping[str, Any]) -> None:
    """Write both files."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / VALIDATION_FILE, dict(report))
    (out / "validation.md").write_text(validation_markdown(report), encoding="utf-8")


def read_validation(folder: str, judge: Judge, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a report quotes of the validation in a folder. UserError where there is none, or it is of another judge, of the
    same one that reads something else (profiles, examples, template), or of one that had other weights, another file or server
    under this name."""
    held = _read(Path(folder) / VALIDATION_FILE, "--validation")
    if held["judge"] != judge.name:
        raise UserError(f"--validation {folder}: found a validation of {held['judge']}, expected one of {judge.name}")
    # Which examples are drawn may differ, and where the profiles' file is.
    differing = sorted(
        name
        for name in {*held["settings"], *settings} - {"seed", "profiles"}
        if held["settings"].get(name) != settings.get(name)
    )
    if differing:
        raise UserError(
            f"--validation {folder}: found the same judge with other settings ({', '.join(differing)}), expected those of --judge"
        )
    if held["version"] != judge.version:
        raise UserError(
            f"--validation {folder}: found a validation of another version of {judge.name} ({held['version']}: its weights, file or "
            f"server), expected the present one ({judge.version})"
        )
    return {"folder": folder, **{name: held[name] for name in QUOTED}}


def _read(path: Path, option: str) -> dict[str, Any]:
    """A validation.json. UserError where there is none, or it is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        missing = {"judge", "settings", "version", *QUOTED} - held.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{option} {path.parent}: no {path.name} that can be read ({error}), expected what --validate wrote"
        ) from None
    if missing:
        raise UserError(f"{path}: no {', '.join(sorted(missing))} in it, expected what --validate wrote")
    return held


def validation_markdown(report: Mapping[str, Any]) -> str:
    """The validation as text: the sentence, agreement and differences, users."""
    rates, differences = report["agreement"], report["differences"]
    rows = []
    for name, rate in rates.items():
        less = differences.get(name)
        shares = [f"{percent(rate[k])} ({interval_text(rate['interval'][k])})" for k in ("per_sample", "per_user")]
        gain = f"{percent(less['per_sample'])} ({interval_text(less['interval']['per_sample'])})" if less else ""
        counts = (str(rate["ties"]), str(rate["unparsed"]), percent(rate["consistency"]), percent(rate["first"]))
        rows.append((TITLES.get(name, name), *shares, gain, *counts))
    header = (
        "", "agreement per sample, %", "per user, %", "the judge less this, points", "ties", "unparsed", "consistent, %", "for the first, %"
    )  # fmt: skip
    left = [f"{count:,} {why}" for why, count in report["left_out"].items() if count]
    parts = [
        f"# Validation of {report['judge']}",
        report["sentence"],
        f"{report['comparisons']:,} choices of {report['users']:,} users, `{report['data']}`, the chosen response against the "
        "rejected one in both orders; a tie counts one half. 95% intervals over users."
        + (f" Left out: {', '.join(left)}." if left else ""),
        markdown_table(header, rows),
    ]
    parts += [report["said"]] if report["said"] else []
    if "certain" in rates["judge"]:
        parts.append(certain_text(rates["judge"]["certain"], "agreement"))
    users = sorted(report["per_user"].items(), key=lambda row: (-row[1]["n"], row[0]))[: 2 * SHOWN]
    shown = "" if len(users) == report["users"] else f" ({len(users)} with most comparisons of {report['users']:,})"
    table = [(user, str(row["n"]), *(percent(row[name]) for name in rates)) for user, row in users]
    parts += [f"Agreement by user, %{shown}:", markdown_table(("user", "pairs", *rates), table)]
    return "\n\n".join(parts) + "\n"
