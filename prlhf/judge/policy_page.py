"""A policy's report as files: report.json, report.md, policy.png, and what policy and reference answered, as generate.py writes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prlhf.data.check.tables import markdown_table, percent
from prlhf.data.comparisons import GENERIC
from prlhf.data.files import replace_text, write_json, write_json_lines
from prlhf.data.names import quoted
from prlhf.errors import UserError
from prlhf.evaluate.figures import label, save_figure
from prlhf.generate.decode import Response
from prlhf.judge.policy import Asked, Sides, texts_of_ids
from prlhf.judge.texts import REPEATED
from prlhf.store.final import Loaded

AFTER_FILE, BEFORE_FILE = "responses.jsonl", "reference.jsonl"
BEFORE = "before training"


def is_kl(report: dict[str, Any]) -> bool:
    """Whether responses were drawn from the policy itself, so that the mean log-ratio estimates the KL."""
    return report["decoding"]["temperature"] == 1


def policy_markdown(report: dict[str, Any]) -> str:
    """The report as text: where it is from, the table, the price of personalisation."""
    decoding, users = report["decoding"], report["users"]
    before = [row["before"] for row in users.values()]
    alike = all(row == before[0] for row in before)
    rows = [] if not alike else [_cells(BEFORE, before[0])]
    for name, row in users.items():
        rows += [] if alike else [_cells(f"{name}, {BEFORE}", row["before"])]
        rows.append(_cells(name, row["after"]))
    way = (
        "greedy"
        if decoding["temperature"] == 0
        else f"temperature {decoding['temperature']:g}, seed {decoding['seed']}"
    )
    ratio = "KL" if is_kl(report) else "log-ratio"
    header = (
        "user", "words", "distinct-1, %", "distinct-2, %", f"repeated {REPEATED}-grams, %", "end by themselves, %", "empty, %",
        "refusals, %", "log-prob, nats a token", "of the reference", f"{ratio}, nats a token",
    )  # fmt: skip
    meaning = f"{ratio}: the mean over the policy's own tokens of log pi(y | x, u) - log pi_SFT(y | x), ± its standard error over prompts"
    meaning += (
        "; an estimate of KL(pi || pi_SFT) per token."
        if is_kl(report)
        else ". Not sampled at temperature 1, so no estimate of the KL."
    )
    return "\n\n".join(
        [
            "# What the policy is like for its users",
            f"`{report['policy']}` on {report['prompts']['n']:,} prompts of `{report['prompts']['source']}`, one response each "
            f"({way}, at most {decoding['max_new_tokens']} tokens), and its reference, {BEFORE}.",
            markdown_table(header, rows),
            f"{meaning} distinct-n: the share of different n-grams among all of a user's, which falls as there is more text. Repeated: "
            "those that the same response had before. Refusals: by how a response begins, a heuristic.",
            *_without_text(report),
            _price_text(report, ratio),
        ]
    ) + "\n"  # fmt: skip


def _cells(title: str, row: dict[str, Any]) -> list[str]:
    shares = ("distinct_1", "distinct_2", "repetition", "finished", "empty", "refusals")
    cells = [title, f"{row['words']:.1f}", *(percent(row[name]) for name in shares)]
    if "tokens" not in row:
        return [*cells, "-", "-", "-"]
    error = row["log_ratio_standard_error"]
    ratio = f"{row['log_ratio_per_token']:.3f}" + ("" if error is None else f" ± {error:.3f}")
    return [*cells, f"{row['log_prob_per_token']:.3f}", f"{row['reference_log_prob_per_token']:.3f}", ratio]


def _without_text(report: dict[str, Any]) -> list[str]:
    """Whose text the model was not given, in a sentence, or nothing."""
    names = report["without_text"]
    if not names:
        return []
    known = len(report["users"].keys() - {GENERIC})
    return [
        f"The model reads the text about a user: there was none of {len(names):,} of {known:,} known users for some prompts or all "
        f"({quoted(names)})."
    ]


def _price_text(report: dict[str, Any], ratio: str) -> str:
    found = report["price"]
    if found is None:
        return "The price of personalisation takes both a known user and the generic one."
    more, error = found["more"], found["more_standard_error"]
    by = f"{abs(more):.3f}" + ("" if error is None else f" ± {error:.3f}")
    return (
        f"The price of personalisation: {ratio} of {found['as_themselves']:.3f} nats a token from the reference as the "
        f"{found['known_users']:,} known users themselves (mean; {found['least']:.3f} to {found['most']:.3f}), "
        f"{found['generic']:.3f} as the generic user: {by} {'more' if more >= 0 else 'less'}"
        + ("." if error is None else " (± its standard error over prompts, paired).")
    )


def figure(report: dict[str, Any], path: Path) -> bool:
    """Each user's log-ratio per token with its standard error; the generic user's is gray. False without matplotlib."""

    def draw(axes: Any) -> None:
        users = report["users"]
        after = [row["after"] for row in users.values()]
        colors = ["tab:gray" if name == GENERIC else "tab:blue" for name in users]
        errors = [row["log_ratio_standard_error"] or 0 for row in after]
        axes.bar(range(len(users)), [row["log_ratio_per_token"] for row in after], yerr=errors, color=colors, capsize=3)
        axes.set_xticks(range(len(users)), [label(name) for name in users], rotation=45, ha="right")
        axes.set_ylabel(("KL" if is_kl(report) else "log-ratio") + " to the reference, nats a token")
        axes.spines[["top", "right"]].set_visible(False)

    return save_figure(path, (0.6 * len(report["users"]) + 2, 3.6), draw)


def check_policy_out(out: Path, asked: dict[str, Any]) -> None:
    """UserError unless `out` is not there, is empty, or holds a report of what is asked, which is made again: {"policy", "prompts",
    "decoding", "users"}, users by name."""
    expected = "expected a new or empty folder, or a report of the same policy on the same prompts"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: found a file, {expected}")
    entries = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    try:
        held = json.loads((out / "report.json").read_text(encoding="utf-8")) if entries else asked
        found = {**{name: held[name] for name in asked}, "users": list(held["users"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out {out}: holds something else ({quoted(entries)}), {expected}") from None
    if differing := [name for name, value in asked.items() if found[name] != value]:
        raise UserError(
            f"--out {out}: holds a report of {held['policy']}, which differs in {', '.join(differing)}; {expected}"
        )


def write_policy(out: Path, report: dict[str, Any], loaded: Loaded, asked: Sequence[Asked], sides: Sides) -> bool:
    """Write all files; report.json first, by which the same command knows its folder. False without matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    replace_text(out / "report.md", policy_markdown(report))
    for name, responses in ((AFTER_FILE, sides.policy), (BEFORE_FILE, sides.reference)):
        write_json_lines(out / name, _records(loaded, asked, responses))
    return figure(report, out / "policy.png")


def _records(loaded: Loaded, asked: Sequence[Asked], responses: Sequence[Response]) -> list[dict[str, Any]]:
    return [
        {
            "id": a.prompt.id,
            "user": a.user,
            "prompt": a.prompt.text,
            "user_text": a.prompt.user_text,
            **({"tools": a.prompt.tools} if a.prompt.tools else {}),
            "response": text,
            "tokens": len(response.ids),
            "finished": response.finished,
        }
        for a, response, text in zip(asked, responses, texts_of_ids(loaded, responses))
    ]
