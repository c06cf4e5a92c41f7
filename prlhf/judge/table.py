"""Several systems against one baseline: each is judged as a pair of files is, in a folder of its own; one table has all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf.data.check.tables import interval_text, markdown_table
from prlhf.data.files import fingerprint_of, write_json
from prlhf.judge.judges import Judge
from prlhf.judge.length import LengthFit, mark_sentences
from prlhf.judge.pairs import Pair
from prlhf.judge.report import RATES, judgement, quoted_validation, rate_text, write
from prlhf.judge.verdicts import decide


def judge_systems(
    out: Path,
    asked: Mapping[str, Any],
    judge: Judge,
    pairs: Mapping[str, Sequence[Pair]],
    validated: Mapping[str, Any],
) -> dict[str, Any]:
    """Judge each system against the baseline, write its folder and the table; returns the table's report.json.

    asked: {"judge", "a", "b"}, a list of files and the baseline's, which the report begins with; pairs: by file; validated: the
    judge's validation, which reports quote. In the report, `systems` has each file's own report, and `not_judged` the files that are
    still to be judged. What `out` (`check_out`) has of the same responses by the same judge is kept: report.json is written again
    behind each system's folder, with a fingerprint of what was judged, and of what reports say.
    """
    marks = {
        file: fingerprint_of(judge.version, asked, validated, own, LengthFit._fields) for file, own in pairs.items()
    }
    path, held = out / "report.json", {}
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
    kept = [file for file, mark in marks.items() if held.get("judged", {}).get(file) == mark]
    systems = {file: held["systems"][file] for file in kept}

    def save() -> dict[str, Any]:
        done = [file for file in pairs if file in systems]
        left = [file for file in pairs if file not in systems]
        report = {**asked, "said": judge.said, **validated, "not_judged": left}
        report["systems"] = {file: systems[file] for file in done}
        write_json(path, {**report, "judged": {file: marks[file] for file in done}})
        (out / "report.md").write_text(systems_markdown(report), encoding="utf-8")
        return report

    out.mkdir(parents=True, exist_ok=True)
    save()
    for file, folder in zip(pairs, system_folders(list(pairs))):
        if file in kept:
            print(f"{file}: was judged already, and is kept")
            continue
        decisions = decide(pairs[file], judge)
        report = {**asked, "a": file, "said": judge.said, **validated, **judgement(pairs[file], decisions)}
        write(out / folder, report, pairs[file], decisions)
        systems[file] = report
        save()
    return save()


def system_folders(files: Sequence[str]) -> list[str]:
    """The names of the systems' folders: 1_NAME, 2_NAME, ..., for NAME.jsonl."""
    return [f"{n}_{Path(file).stem}" for n, file in enumerate(files, start=1)]


def systems_markdown(report: Mapping[str, Any]) -> str:
    """The table of all systems against the baseline."""
    rows = []
    for file, own in report["systems"].items():
        verdicts, words = own["verdicts"], own["words"]
        rates = (rate_cell(own, name) for name in RATES)
        counts = (
            own["pairs"]["judged"],
            own["pairs"]["unparsed"],
            verdicts["wins"],
            verdicts["ties"],
            verdicts["losses"],
        )
        rows.append((f"`{file}`", *rates, *(str(count) for count in counts), words["a"], words["b"]))
    header = (
        "system", *(f"{name.replace('_', ' ')}, %" for name in RATES), "pairs", "unparsed", "wins", "ties", "losses", "words", "baseline's words"
    )  # fmt: skip
    left = ", ".join(f"`{file}`" for file in report["not_judged"])
    parts = [
        "# Win rates",
        f"Against `{report['b']}`, judged by {report['judge']}, each pair in both orders. Win rates, with 95% intervals over "
        "users; a tie counts one half.",
        markdown_table(header, rows),
    ]
    parts += [f"Not judged yet: {left}. The same command goes on."] if left else []
    return "\n\n".join([*parts, *notes(list(report["systems"].values()))]) + "\n"


def notes(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is to be said below a table of systems by one judge: pairs left out, rates that are none, the judge, its validation."""
    unparsed = sum(own["pairs"]["unparsed"] for own in reports)
    said = [f"Pairs left out, of which a verdict could not be parsed: {unparsed:,}."] if unparsed else []
    said += mark_sentences(own["length_fit"] for own in reports)
    said += [own["said"] for own in reports[:1] if own["said"]]
    return said + [quoted_validation(own["validation"]) for own in reports[:1] if "validation" in own]


def rate_cell(report: Mapping[str, Any], name: str) -> str:
    """A win rate in %, with its interval."""
    return f"{rate_text(report, name)} ({interval_text(report['interval'][name])})"
