"""An evaluation as files: report.json, report.md, users.csv, margins.jsonl, and figures where matplotlib is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.data.check.rules import RULES
from prlhf.data.check.tables import interval_text, markdown_table, percent
from prlhf.data.comparisons import Comparison
from prlhf.data.files import fingerprint_of, read_json_lines, write_json, write_json_lines
from prlhf.evaluate.ends import USERS_CSV, ends, write_users
from prlhf.evaluate.figures import label, save_figure
from prlhf.evaluate.stats.metrics import sigmoid

MARGINS = "margins.jsonl"
BRANCHES = ("true", "generic", "shuffled")  # the users under whom margins are computed
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
    "placebo_gain": "Placebo: gain of another, random over the generic user",
    "personalisation_gain": "Personalisation gain: the first less the placebo",
}
OWN_RECORD = "A rule that only remembers each user's own record of the two responses in training"
ACCURACY_COLUMNS = ("", "accuracy, %", "95% interval")
USER_ACCURACIES = {"accuracy": "accuracy", "generic_user": "as generic user", "shuffled_users": "as another user"}
CURVES = (  # of metrics.jsonl: whether in evaluation records, the field; its title and the style of its line
    (False, "user_accuracy", "training, true user", "C0-"),
    (False, "generic_accuracy", "training, generic user", "C1-"),
    (True, "accuracy_top", "held out, Accuracy-top", "C0o--"),
    (True, "accuracy_generic", "held out, Accuracy-generic", "C1o--"),
)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.md, users.csv, per_user.png (only where matplotlib is installed) and, last, report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    write_users(folder / USERS_CSV, _users(report), ("user", "n", *USER_ACCURACIES))
    if report["per_user"]:
        _per_user_figure(report["per_user"], folder / "per_user.png")
    write_json(folder / "report.json", report)


def write_margins(
    folder: Path,
    comparisons: Sequence[Comparison],
    known: Sequence[bool],
    margins: np.ndarray,
    logits_B: np.ndarray | None = None,
) -> None:
    """Write margins.jsonl for `prlhf.compare`: ids, users, hashes of the texts, whether users are known, and margins.

    margins: (3, B) reward margins, chosen minus rejected, as the true, generic and shuffled user (BRANCHES). logits_B: of the
    probability that an adapted user prefers the chosen response, integrated over the posterior; NaN for others.
    """
    records = []
    logits_B = np.full(len(comparisons), np.nan) if logits_B is None else logits_B
    for c, is_known, values, logit in zip(comparisons, known, margins.T.tolist(), logits_B.tolist()):
        record = {"id": c.id, "user": c.user, "text": fingerprint_of(c.prompt, c.chosen, c.rejected)}
        sure = {} if np.isnan(logit) else {"probability": float(sigmoid(logit))}
        records.append({**record, "known": bool(is_known), **dict(zip(BRANCHES, values)), **sure})
    write_json_lines(folder / MARGINS, records)


def markdown(report: dict[str, Any]) -> str:
    """The report as text, in the order of the paper's tables."""
    accuracy, calibration = report["accuracy"], report["calibration"]
    headlines = [(title, percent(accuracy[k]), interval_text(report["interval"][k])) for k, title in HEADLINES.items()]
    found = report["controls"].items()
    controls = [(CONTROLS[k], percent(row["accuracy"]), interval_text(row["interval"])) for k, row in found]
    users = ends(_users(report), "accuracy")
    parts = [
        "# Evaluation",
        f"Checkpoint `{report['checkpoint']}` on `{report['data']}`."
        + (f" Its base model, by prompting alone: {report['baseline']}." if "baseline" in report else ""),
        markdown_table(ACCURACY_COLUMNS, headlines),
        f"Expected calibration error, %: known users, own vectors {percent(calibration['top'])}, "
        f"unknown users {percent(calibration['generic'])}.",
        *_adapted_text(calibration.get("adapted")),
        "Personalisation helps where the gain over the generic user is above 0, and is personal where its own gain is.",
        markdown_table(ACCURACY_COLUMNS, controls),
    ]
    if "own_record" in report and accuracy["top"] is not None:
        parts.append(_own_record_text(report))
    if "rules" in report:
        right = {"this model": {"known_users": accuracy["top"], "unknown_users": accuracy["generic"]}}
        right |= {RULES[name]: found for name, found in report["rules"].items()}
        rows = [(title, percent(r["known_users"]), percent(r["unknown_users"])) for title, r in right.items()]
        parts += ["What trivial rules reach:", markdown_table(("", "known users", "unknown users"), rows)]
    parts += [users.said] if users.said else []
    rows = [(row["user"], str(row["n"]), *(percent(row[k]) for k in USER_ACCURACIES)) for row in users.rows]
    parts.append(markdown_table(("user", "comparisons", *USER_ACCURACIES.values()), rows))
    return "\n\n".join(parts) + "\n"


def _adapted_text(found: dict[str, Any] | None) -> list[str]:
    """The calibration of users who were adapted, plug-in and integrated, as a table; nothing where there are none."""
    if found is None:
        return []
    rows = [
        ("their vectors as they are", percent(found["plug_in"])),
        ("integrated over their vectors", percent(found["integrated"])),
    ]
    table = markdown_table((f"{found['comparisons']:,} comparisons of adapted users", "calibration error, %"), rows)
    return [table]


def _users(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The known users as rows, in order of name."""
    return [{"user": user, **row} for user, row in report["per_user"].items()]


def _own_record_text(report: dict[str, Any]) -> str:
    """Whether a rule that only remembers each user's own record explains what the model gains."""
    found = report["own_record"]
    if found is None:
        return f"{OWN_RECORD} may explain the gain: not known, for the training comparisons are not there."
    if not found["decided"]:
        return f"{OWN_RECORD} decides nothing here: there is nothing to remember."
    gains = found["gain_over_generic"]
    if report["controls"]["gain_over_generic"]["accuracy"] <= 0:
        verdict = "There is no gain to explain."
    elif found["explains_gain"]:
        verdict = "So the rule can explain all of the gain: where it is silent, none is shown."
    elif found["accuracy"] <= 0.5:
        verdict = "So the rule does not explain the gain: it is right on no more than half."
    else:
        verdict = "So the rule does not explain the gain: most of it lies, or one is shown, where it is silent."
    return (
        f"{OWN_RECORD} (own_record) decides {percent(found['decided'])}% of known users' comparisons and reaches "
        f"{percent(found['accuracy'])}%; this model reaches {percent(report['accuracy']['top'])}%. The gain of the true "
        f"over the generic user is {_gain_text(gains['where_it_decides'])} where the rule decides, and "
        f"{_gain_text(gains['where_it_does_not'])} where it does not. {verdict}"
    )


def _gain_text(gain: dict[str, Any]) -> str:
    """A gain in percent, with its interval and the number of comparisons."""
    count = f"{gain['comparisons']:,} comparison" + ("" if gain["comparisons"] == 1 else "s")
    if not gain["comparisons"]:
        return f"not known ({count})"
    interval = "no interval" if gain["interval"] is None else f"interval {interval_text(gain['interval'])}"
    return f"{percent(gain['accuracy'])} ({interval}, {count})"


def accuracy_curve(metrics: str | Path, path: Path) -> bool:
    """Draw accuracy against step from a run's metrics.jsonl: in training, and of the evaluations on held-out data.

    False where matplotlib is not installed or there is nothing to draw. UserError where the file is missing or damaged.
    """
    records = [record for _, record in read_json_lines(metrics)]
    curves = []
    for held_out, field, title, style in CURVES:
        points = [(r.get("step"), r.get(field)) for r in records if bool(r.get("eval")) == held_out]
        numbers = [point for point in points if all(isinstance(value, (int, float)) for value in point)]
        if numbers:
            curves.append((numbers, title, style))

    def draw(axes: Any) -> None:
        for numbers, title, style in curves:
            axes.plot(*zip(*numbers), style, label=title, alpha=1 if "o" in style else 0.5)
        axes.set(xlabel="update", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend()

    return bool(curves) and save_figure(path, (6, 3.6), draw)


def _per_user_figure(per_user: dict[str, Any], path: Path) -> None:
    """The 60 known users with the lowest accuracy, each also under both controls."""
    rows = sorted(per_user.items(), key=lambda item: item[1]["accuracy"])[:60]

    def draw(axes: Any) -> None:
        y = range(len(rows))
        axes.plot([row["accuracy"] for _, row in rows], y, "o", label="true user")
        axes.plot([row["generic_user"] for _, row in rows], y, "|", markersize=10, label="as generic user")
        if all(row["shuffled_users"] is not None for _, row in rows):
            axes.plot([row["shuffled_users"] for _, row in rows], y, "x", label="as another user")
        axes.set_yticks(list(y), [label(user) for user, _ in rows])
        axes.set(xlabel="accuracy", xlim=(0, 1.02))
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower left")

    save_figure(path, (7, 1.2 + 0.22 * len(rows)), draw)
