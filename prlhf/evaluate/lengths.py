"""The length report: how many words each user is answered with, as a table and a figure (paper, figure 3).

    python -m prlhf.lengths responses.jsonl --out DIR

Writes lengths.md, lengths.json and lengths.png: words per response, mean and standard error, for every user.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.data.comparisons import GENERIC, words
from prlhf.data.files import read_json_lines
from prlhf.errors import UserError, run_command
from prlhf.evaluate.report import cell, label, optional_pyplot


class Length(NamedTuple):
    """Words per response to one user: how many responses, mean, standard error of the mean."""

    n: int
    mean: float
    standard_error: float


def lengths(records: list[tuple[str, str]]) -> dict[str, Length]:
    """Words per response of each user, from (user, response); users in order of appearance."""
    counts: dict[str, list[int]] = defaultdict(list)
    for user, response in records:
        counts[user].append(words(response))
    return {
        user: Length(len(n), float(np.mean(n)), float(np.std(n, ddof=1) / np.sqrt(len(n))) if len(n) > 1 else 0.0)
        for user, n in counts.items()
    }


def markdown(table: dict[str, Length]) -> str:
    """The table as Markdown."""
    lines = ["| user | responses | words, mean | standard error |", "|---|---|---|---|"]
    lines += [f"| {cell(user)} | {row.n} | {row.mean:.1f} | {row.standard_error:.1f} |" for user, row in table.items()]
    return "\n".join(lines) + "\n"


def figure(pyplot: Any, table: dict[str, Length], path: Path) -> None:
    """A bar a user, with the standard error."""
    drawing, axes = pyplot.subplots(figsize=(0.6 * len(table) + 2, 3.6), layout="constrained")
    colors = ["tab:gray" if user == GENERIC else "tab:blue" for user in table]
    axes.bar(range(len(table)), [r.mean for r in table.values()], yerr=[r.standard_error for r in table.values()],
             color=colors, capsize=3)  # fmt: skip
    axes.set_xticks(range(len(table)), [label(user) for user in table], rotation=45, ha="right")
    axes.set_ylabel("words per response")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)
    pyplot.close(drawing)


def main() -> None:
    """Write the length report of a file of responses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("responses", help="what generate.py wrote")
    parser.add_argument("--out", required=True, help="a folder")
    args = parser.parse_args()

    records = []
    for number, record in read_json_lines(args.responses):
        for name in ("user", "response"):
            if not isinstance(record.get(name), str):
                raise UserError(f"{args.responses}, line {number}: no text in field {name!r}")
        records.append((record["user"], record["response"]))
    table = lengths(records)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "lengths.md").write_text(markdown(table), encoding="utf-8")
    (out / "lengths.json").write_text(json.dumps({u: row._asdict() for u, row in table.items()}, indent=1) + "\n")
    pyplot = optional_pyplot()
    if pyplot is not None:
        figure(pyplot, table, out / "lengths.png")
    else:
        print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
    print(markdown(table))


if __name__ == "__main__":
    run_command(main)
