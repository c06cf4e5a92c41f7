"""Several systems against one baseline: each is judged as a pair of files is, in a folder of its own; one table has all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prlhf.data.check.tables import interval_text, markdown_table, percent
from prlhf.data.files import fingerprint_of, write_json
from prlhf.judge.judges import Judge
from prlhf.judge.pairs import Pair
from prlhf.judge.report import RATES, judgement, quoted_validation, write
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
    judge's validation, which reports quote. In the report, `systems` has each file's own report. What `out` (`check_out`) has of the same responses by the same judge is kept: report.json
    is written again behind each system's folder, with a fingerprint of what was judged.
    """
    marks = {file: fingerprint_of(judge.version, asked, validated, own) for file, own in pairs.items()}
    path, held = out / "report.json", {}
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
    kept = [file for file, mark in marks.items() if held.get("judged", {}).get(file) == mark]
    systems = {file: held["systems"][file] for file in kept}

    def save() -> dict[str, Any]:
        done = [file for file in pairs if file in systems]
        report = {**asked, "said": judge.said, **validated, "systems": {file: systems[file] for file in done}}
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
        rates = (_rate(own, name) for name in RATES)
        counts = (own["pairs"]["judged"], verdicts["wins"], verdicts["ties"], verdicts["losses"])
        rows.append((f"`{file}`", *rates, *(str(count) for count in counts), words["a"], words["b"]))
    header = (
        "system", *(f"{name.replace('_', ' ')}, %" for name in RATES), "pairs", "wins", "ties", "losses", "words", "baseline's words"
    )  # fmt: skip
    unparsed = sum(own["pairs"]["unparsed"] for own in report["systems"].values())
    parts = [
        "# Win rates",
        f"Against `{report['b']}`, judged by {report['judge']}, each pair in both orders. Win rates, with 95% intervals over "
        "users; a tie counts one half.",
        markdown_table(header, rows),
    ]
    parts += [f"Pairs left out, of which a verdict could not be parsed: {unparsed:,}."] if unparsed else []
    parts += [report["said"]] if report["said"] else []
    parts += [quoted_validation(report["validation"])] if "validation" in report else []
    return "\n\n".join(parts) + "\n"


def _rate(report: Mapping[str, Any], name: str) -> str:
    """A win rate in %, with its interval."""
    return f"{percent(report['win_rate'][name])} ({interval_text(report['interval'][name])})"
