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

from prlhf.data.check.tables import markdown_table
from prlhf.data.comparisons import GENERIC, words
from prlhf.data.files import read_json_lines
from prlhf.errors import UserError
from prlhf.evaluate.figures import label, save_figure


class Length(NamedTuple):
    """Words per response to one user: how many responses, mean, standard error of the mean (0 for one response)."""

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


def figure(table: dict[str, Length], path: Path) -> bool:
    """A bar for each user, with the standard error; the generic user's is gray. False without matplotlib."""

    def draw(axes: Any) -> None:
        colors = ["tab:gray" if user == GENERIC else "tab:blue" for user in table]
        means, errors = [row.mean for row in table.values()], [row.standard_error for row in table.values()]
        axes.bar(range(len(table)), means, yerr=errors, color=colors, capsize=3)
        axes.set_xticks(range(len(table)), [label(user) for user in table], rotation=45, ha="right")
        axes.set_ylabel("words per response")
        axes.spines[["top", "right"]].set_visible(False)

    return save_figure(path, (0.6 * len(table) + 2, 3.6), draw)


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
    rows = [(user, str(row.n), f"{row.mean:.1f}", f"{row.standard_error:.1f}") for user, row in table.items()]
    markdown = markdown_table(("user", "responses", "words, mean", "standard error"), rows) + "\n"
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "lengths.md").write_text(markdown, encoding="utf-8")
    (out / "lengths.json").write_text(json.dumps({u: row._asdict() for u, row in table.items()}, indent=1) + "\n")
    if not figure(table, out / "lengths.png"):
        print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
    print(markdown)
