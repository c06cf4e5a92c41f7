"""What the rows got right: one table, one figure, and a JSON file with each user's accuracies."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.data.check.tables import markdown_table
from prlhf.data.files import write_json
from prlhf.evaluate.figures import save_figure

SAMPLES, SEED = 10_000, 0  # of the bootstrap
BEST = "LoRe, best K at each N"


class Difference(NamedTuple):
    """A mean of paired differences, with a 95% interval."""

    mean: float
    low: float
    high: float


def difference(accuracy_U: np.ndarray, generic_U: np.ndarray) -> Difference:
    """The mean over users, and the percentiles of its bootstrap: users are drawn with replacement."""
    gains_U = accuracy_U - generic_U
    drawn = np.random.default_rng(SEED).integers(len(gains_U), size=(SAMPLES, len(gains_U)))
    low, high = np.quantile(gains_U[drawn].mean(axis=1), (0.025, 0.975))
    return Difference(float(gains_U.mean()), float(low), float(high))


class Result(NamedTuple):
    """The accuracies of each row, (seeds, N, users); NaN where a row has no such N."""

    shots: tuple[int, ...]
    rows: dict[str, np.ndarray]

    def with_best(self, prefix: str) -> "Result":
        """With a row more: at each N the best of the rows whose names begin so, if any, chosen on these very accuracies."""
        of_prefix = [found for name, found in self.rows.items() if name.startswith(prefix)]
        if not of_prefix:
            return self
        of_prefix = np.stack(of_prefix)
        best_N = of_prefix.mean(axis=(1, 3)).argmax(axis=0)
        best = np.stack([of_prefix[k, :, n] for n, k in enumerate(best_N)], axis=1)
        return self._replace(rows={**self.rows, BEST: best})


def table(result: Result) -> str:
    """Each row's accuracy at each N in %, and the interval of its difference from the generic user at that N, in points.

    Accuracies are means over seeds of each user's. The last column is the largest standard deviation over seeds at any N.
    """
    generic_NU = result.rows["generic user"].mean(axis=0)
    lines = []
    for name, found in result.rows.items():
        cells = []
        for accuracy_U, generic_U in zip(found.mean(axis=0), generic_NU):
            mean, low, high = (100 * x for x in difference(accuracy_U, generic_U))
            shown = f"{100 * accuracy_U.mean():.1f}"
            alike = np.array_equal(accuracy_U, generic_U)
            cells.append("" if np.isnan(mean) else shown if alike else f"{shown} ({low:+.1f} to {high:+.1f})")
        spread = found.mean(axis=2).std(axis=0, ddof=1) if len(found) > 1 else np.full(len(result.shots), np.nan)
        lines.append([name, *cells, "" if np.isnan(spread).all() else f"{100 * np.nanmax(spread):.1f}"])
    return markdown_table(["N", *map(str, result.shots), "sd over seeds"], lines)


def less_table(result: Result) -> str:
    """Adapted less other rows, at each N in points, with the interval of the paired difference."""
    adapted_NU = result.rows["adapted"].mean(axis=0)
    lines = []
    for name, found in result.rows.items():
        if name in ("adapted", "generic user") or name.startswith("LoRe, K"):
            continue
        pairs = zip(adapted_NU, found.mean(axis=0))
        gains = [None if np.isnan(other_U).any() else difference(own_U, other_U) for own_U, other_U in pairs]
        cells = [f"{100 * g.mean:+.1f} ({100 * g.low:+.1f} to {100 * g.high:+.1f})" if g else "" for g in gains]
        lines.append([name, *cells])
    return markdown_table(["adapted less, N", *map(str, result.shots)], lines)


def calibration_table(shots: Sequence[int], errors: Sequence[tuple[float, float]]) -> str:
    """Expected calibration error of adapted users, in points."""
    rows = zip(("the vector as it is", "integrated"), zip(*errors))
    return markdown_table(
        ["calibration error, N", *map(str, shots)], [[name, *(f"{100 * e:.1f}" for e in es)] for name, es in rows]
    )


def draw(result: Result, path: Path, title: str) -> bool:
    """Accuracy against N, one line a row that is measured at all N, of LoRe the best K; False without matplotlib."""

    styles: dict[str, dict[str, Any]] = {
        "adapted": dict(color="black", linewidth=2.5),
        "generic user": dict(color="gray", linestyle="--"),
    }

    def lines(axes: Any) -> None:
        for name, found in result.rows.items():
            means_N = 100 * found.mean(axis=(0, 2))
            if not name.startswith("LoRe, K") and not np.isnan(means_N).any():
                axes.plot(means_N, label=name, marker=".", **styles.get(name, {}))
        axes.set(xticks=range(len(result.shots)), xticklabels=result.shots, title=title)
        axes.set(xlabel="comparisons of the new user (N)", ylabel="accuracy, %, mean over users")
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))

    return save_figure(path, (6, 3), lines)


def write(result: Result, folder: Path, said: Mapping[str, Any], text: str, title: str) -> None:
    """table.md, result.json with each user's accuracies (mean over seeds), and new_users.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    per_user = {name: json.loads(json.dumps(found.mean(axis=0).tolist()).replace("NaN", "null")) for name, found in
                result.rows.items()}  # fmt: skip
    write_json(folder / "result.json", {**said, "shots": list(result.shots), "accuracy": per_user})
    if not draw(result, folder / "new_users.png", title):
        print("no figure: matplotlib is not installed")
