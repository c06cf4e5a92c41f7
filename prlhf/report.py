"""An evaluation as files for people: report.json, report.md and a figure."""

import json
from pathlib import Path
from typing import Any

HEADLINES = {
    "top": "Accuracy-top (known users, own vectors)",
    "average_mean": "Accuracy-average, mean over known users",
    "average_std": "Accuracy-average, standard deviation",
    "generic": "Accuracy-generic (unknown users)",
    "worst_user": "Worst known user",
}
CONTROLS = {
    "generic_user": "Known users as the generic user",
    "shuffled_users": "Known users as another, random user",
    "gain_over_generic": "Gain of the true over the generic user",
    "gain_over_shuffled": "Gain of the true over a random user",
}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.md and per_user.png (the last only where matplotlib is installed)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    pyplot = optional_pyplot()
    if pyplot is not None and report["per_user"]:
        _per_user_figure(pyplot, report, folder / "per_user.png")


def markdown(report: dict[str, Any]) -> str:
    """The report as text, in the order of the paper's tables."""
    lines = ["# Evaluation", "", f"Checkpoint `{report['checkpoint']}` on `{report['data']}`.", ""]
    lines += ["| | accuracy | 95% interval |", "|---|---|---|"]
    lines += [_row(HEADLINES[k], report["accuracy"][k], report["interval"][k]) for k in HEADLINES]
    lines += ["", "Controls: where personalisation is real, these lie below Accuracy-top.", ""]
    lines += ["| | accuracy | 95% interval |", "|---|---|---|"]
    lines += [_row(CONTROLS[k], c["accuracy"], c["interval"]) for k, c in report["controls"].items()]
    lines += ["", "| user | comparisons | accuracy | as generic user | as another user |", "|---|---|---|---|---|"]
    for user, row in report["per_user"].items():
        cells = [_percent(row[k]) for k in ("accuracy", "generic_user", "shuffled_users")]
        lines.append(f"| {user} | {row['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def optional_pyplot():
    """matplotlib.pyplot drawing to files, or None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _row(title: str, value: float | None, interval: Any) -> str:
    between = "-" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}"
    return f"| {title} | {_percent(value)} | {between} |"


def _per_user_figure(pyplot, report: dict[str, Any], path: Path) -> None:
    rows = sorted(report["per_user"].items(), key=lambda item: item[1]["accuracy"])[:60]
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.22 * len(rows)), layout="constrained")
    y = range(len(rows))
    axes.plot([r["accuracy"] for _, r in rows], y, "o", label="true user")
    axes.plot([r["generic_user"] for _, r in rows], y, "|", markersize=10, label="as generic user")
    axes.plot([r["shuffled_users"] for _, r in rows], y, "x", label="as another user")
    axes.set_yticks(list(y), [user for user, _ in rows])
    axes.set_xlabel("accuracy")
    axes.set_xlim(0, 1.02)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
