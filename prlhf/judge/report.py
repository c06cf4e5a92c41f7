"""Verdicts as files: report.json, report.md, users.csv, verdicts.jsonl, and win_rate.png where matplotlib is installed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.data.check.tables import interval_text, markdown_table, percent
from prlhf.data.comparisons import GENERIC, words
from prlhf.data.files import write_json, write_json_lines
from prlhf.data.names import quoted
from prlhf.errors import UserError
from prlhf.evaluate.ends import USERS_CSV, ends, write_users
from prlhf.evaluate.figures import save_figure
from prlhf.evaluate.stats import metrics
from prlhf.evaluate.stats.paired import BOOTSTRAP_SAMPLES, LEVEL, SEED
from prlhf.judge.length import length_controlled, mark_sentences, rate_marks
from prlhf.judge.pairs import Pair
from prlhf.judge.server import ANSWERS_FOLDER
from prlhf.judge.verdicts import CERTAIN, Decision

VERDICTS_FILE = "verdicts.jsonl"
RATES = {
    "per_sample": "per sample: all pairs count the same",
    "per_user": "per user: all users count the same",
    "length_controlled": "length-controlled: at equal length",
}
USER_COLUMNS = ("user", "n", "wins", "ties", "losses", "win_rate", "p", "p_holm")


def judgement(pairs: Sequence[Pair], decisions: Sequence[Decision]) -> dict[str, Any]:
    """The numbers of report.json, all of A against B. Rates are in [0, 1], None where there is nothing to count.

    Pairs of which a verdict could not be parsed are in `pairs.unparsed` and nowhere else. The generic user is one user.
    """
    rows = [(pair, decision) for pair, decision in zip(pairs, decisions, strict=True) if decision.parsed]
    users = [pair.user or GENERIC for pair, _ in rows]
    wins_N = np.array([decision.win for _, decision in rows])
    words_N2 = np.array([(words(pair.a), words(pair.b)) for pair, _ in rows]).reshape(-1, 2)
    counts = metrics.right_by_user(users, wins_N)
    fit = length_controlled(wins_N, words_N2[:, 0] - words_N2[:, 1], users)
    intervals = [
        interval(counts, BOOTSTRAP_SAMPLES, np.random.default_rng(SEED))
        for interval in (metrics.pooled_interval, metrics.mean_interval)
    ]
    rates = (metrics.pooled(counts), metrics.mean(counts), fit.rate if fit else None)
    table = per_user(users, wins_N)
    better = [row["win_rate"] > 0.5 for row in table if row["p_holm"] <= LEVEL]
    return {
        "pairs": {"judged": len(rows), "unparsed": len(pairs) - len(rows), "users": len(table)},
        "win_rate": dict(zip(RATES, rates)),
        "interval": dict(zip(RATES, (*intervals, fit.interval if fit else None))),
        "verdicts": {name: sum(row[name] for row in table) for name in ("wins", "ties", "losses")},
        **_orders([decision for _, decision in rows]),
        **certain([pair.user or GENERIC for pair in pairs], decisions),
        "words": _words(words_N2),
        "length_fit": fit._asdict() if fit else None,
        "users_significantly": {"for_a": sum(better), "for_b": len(better) - sum(better)},
        "per_user": {row["user"]: {name: row[name] for name in USER_COLUMNS[1:]} for row in table},
    }


def certain(users: Sequence[str], decisions: Sequence[Decision]) -> dict[str, Any]:
    """{"certain": ...}, A's win rate per sample among pairs of which the judge says to be CERTAIN at least in both orders, with how
    many these are, and of how many it said anything; {} where no decision has a certainty."""
    stated = [d.parsed and d.certainties is not None and None not in d.certainties for d in decisions]
    if not any(stated):
        return {}
    rows = [(user, d.win) for user, d in zip(users, decisions, strict=True) if d.parsed and d.certain]
    counts = metrics.right_by_user([user for user, _ in rows], np.array([win for _, win in rows], dtype=float))
    rate = {"pairs": len(rows), "stated": sum(stated), "win_rate": metrics.pooled(counts)}
    interval = metrics.pooled_interval(counts, BOOTSTRAP_SAMPLES, np.random.default_rng(SEED)) if rows else None
    return {"certain": {"at_least": CERTAIN, **rate, "interval": interval}}


def certain_text(found: dict[str, Any], what: str) -> str:
    """The rate among the certain, in a sentence."""
    return (
        f"Among the {found['pairs']:,} pairs of which the judge says to be certain in both orders (at least {found['at_least']} of "
        f"100; it stated a certainty for {found['stated']:,}), {what} is {percent(found['win_rate'])}% "
        f"({interval_text(found['interval'])})."
    )


def _orders(decisions: Sequence[Decision]) -> dict[str, Any]:
    """How far verdicts depend on the order.

    consistency: share of pairs with the same outcome in both orders. position_bias.first: share of verdicts for the response
    that is read first, a tie counting one half. It is 1/2 without a bias, whatever the responses, for each is first once.
    """
    n = len(decisions)
    return {
        "consistency": sum(d.consistent for d in decisions) / n if n else None,
        "position_bias": {
            "first": sum(d.firsts for d in decisions) / (2 * n) if n else None,
            "always_first": sum(d.both == ("first", "first") for d in decisions),
            "always_second": sum(d.both == ("second", "second") for d in decisions),
        },
    }


def _words(words_N2: np.ndarray) -> dict[str, float | None]:
    """Mean words of both sides, and the share of pairs in which A's response is the longer one, or as long."""
    if not len(words_N2):
        return dict.fromkeys(("a", "b", "a_longer", "equal"))
    a_N, b_N = words_N2.T
    shares = {"a_longer": float((a_N > b_N).mean()), "equal": float((a_N == b_N).mean())}
    return {"a": float(a_N.mean()), "b": float(b_N.mean()), **shares}


def per_user(users: Sequence[str], wins_N: np.ndarray) -> list[dict[str, Any]]:
    """Each user's wins, ties, losses and win rate, in order of name; the sign test's p-value, and that after `holm`.

    p = P(|2 Binomial(k, 1/2) - k| >= |wins - losses|), k = wins + losses: ties say nothing of the sign. It is
    `exact_sign_flip_test` of +1 and -1.
    """
    names, index_N = metrics.distinct(users)
    counts = [
        np.bincount(index_N, weights=wins_N == outcome, minlength=len(names)).astype(int) for outcome in (1, 0.5, 0)
    ]
    table: list[dict[str, Any]] = []
    for name, won, tied, lost in zip(names, *(count.tolist() for count in counts)):
        row = {"user": name, "n": won + tied + lost, "wins": won, "ties": tied, "losses": lost}
        signs = np.repeat([1, -1], [won, lost])
        table.append({**row, "win_rate": (won + tied / 2) / row["n"], "p": metrics.exact_sign_flip_test(signs, 1.0)})
    for row, adjusted in zip(table, metrics.holm(np.array([row["p"] for row in table]))):
        row["p_holm"] = float(adjusted)
    return table


def markdown(report: dict[str, Any]) -> str:
    """The report as text: rates, verdicts, orders, lengths, users."""
    pairs, verdicts, fit = report["pairs"], report["verdicts"], report["length_fit"]
    rates = [(title, rate_text(report, k), interval_text(report["interval"][k])) for k, title in RATES.items()]
    parts = [
        "# Win rate",
        f"A, `{report['a']}`, against B, `{report['b']}`, judged by {report['judge']}: {pairs['judged']:,} pairs of "
        f"{pairs['users']:,} users, each in both orders.",
        markdown_table(("A against B", "win rate, %", "95% interval over users"), rates),
        f"Wins: {verdicts['wins']:,}, ties: {verdicts['ties']:,}, losses: {verdicts['losses']:,}. A tie counts one half. A pair "
        "is won or lost where both orders say so; all else is a tie.",
    ]
    if pairs["unparsed"]:
        parts.append(f"Pairs left out, of which a verdict could not be parsed: {pairs['unparsed']:,}.")
    parts += [report["said"]] if report["said"] else []
    parts += [quoted_validation(report["validation"])] if "validation" in report else []
    parts += [certain_text(report["certain"], "the win rate")] if "certain" in report else []
    if pairs["judged"]:
        parts += [_orders_text(report), _length_text(report["words"], fit), _users_text(report)]
    return "\n\n".join(parts) + "\n"


def _orders_text(report: dict[str, Any]) -> str:
    bias = report["position_bias"]
    return (
        f"Both orders have the same outcome in {percent(report['consistency'])}% of pairs. The response that is read first "
        f"wins {percent(bias['first'])}% of verdicts (50% without a bias): always the first in {bias['always_first']:,} pairs, "
        f"always the second in {bias['always_second']:,}."
    )


def _length_text(words: dict[str, float], fit: dict[str, Any] | None) -> str:
    text = (
        f"Words per response: A {words['a']:.1f}, B {words['b']:.1f}; A's is longer in {percent(words['a_longer'])}% of pairs, "
        f"as long in {percent(words['equal'])}%."
    )
    if fit is None:
        return f"{text} The difference is the same in all pairs, so there is no length-controlled rate."
    text += (
        f" Fitted: P(A wins) = s({fit['intercept']:.3f} + {fit['slope']:.3f} tanh(difference / {fit['scale']:.1f})), ties as "
        "half a win and half a loss; the length-controlled rate is that at difference 0."
    )
    return "\n\n".join([text, *mark_sentences([fit])])


def rate_text(report: Mapping[str, Any], name: str) -> str:
    """One of the report's win rates in %, with the signs of what is to be known of it (`mark_sentences`)."""
    return percent(report["win_rate"][name]) + (rate_marks(report["length_fit"]) if name == "length_controlled" else "")


def _users_text(report: dict[str, Any]) -> str:
    """For how many users A or B is significantly better, and the table of users, the two ends where they are many."""
    table = ends([{"user": user, **row} for user, row in report["per_user"].items()], "win_rate")
    found = report["users_significantly"]
    text = (
        f"Sign test of each user's wins and losses, Holm-adjusted over {len(report['per_user']):,} users: A is significantly "
        f"better for {found['for_a']:,}, B for {found['for_b']:,} at {LEVEL:.0%}. {table.said}"
    )
    rows = [
        (*(str(row[k]) for k in USER_COLUMNS[:5]), percent(row["win_rate"]), f"{row['p']:.4f}", f"{row['p_holm']:.4f}")
        for row in table.rows
    ]
    header = ("user", "pairs", "wins", "ties", "losses", "win rate, %", "p", "p after Holm")
    return f"{text.strip()}\n\n" + markdown_table(header, rows)


def quoted_validation(found: dict[str, Any]) -> str:
    """What the report says of the judge's validation."""
    rates = found["agreement"]
    said = [
        f"{name} {percent(r['per_sample'])}% ({interval_text(r['interval']['per_sample'])})"
        for name, r in rates.items()
    ]
    return (
        f"Validated on {found['comparisons']:,} choices of {found['users']:,} users, `{found['data']}`: {found['sentence']} "
        f"Agreement: {', '.join(said)}."
    )


def figure(report: dict[str, Any], path: Path) -> bool:
    """The win rates with their intervals, and each user's beside the rate per user. False without matplotlib."""

    def draw(axes: Any) -> None:
        each = [row["win_rate"] for row in report["per_user"].values()]
        axes.axhline(0.5, color="gray", linewidth=1)
        axes.plot(np.full(len(each), 1.15), each, "o", color="tab:gray", alpha=0.4, markersize=4, label="one user")
        for x, name in enumerate(RATES):
            rate, interval = report["win_rate"][name], report["interval"][name]
            if rate is not None:
                low, high = interval or (rate, rate)
                axes.errorbar(
                    x, rate, [[max(0, rate - low)], [max(0, high - rate)]], fmt="o", color="tab:blue", capsize=3
                )
        axes.set_xticks(range(len(RATES)), [name.replace("_", " ") for name in RATES])
        axes.set(xlim=(-0.5, len(RATES) - 0.5), ylim=(-0.02, 1.02), ylabel="win rate of A against B")
        axes.legend()

    return save_figure(path, (6, 3.6), draw)


def check_out(out: Path, asked: dict[str, Any]) -> None:
    """UserError unless `out` is not there, is empty but for a server's answers, or holds a judgement of what is asked:
    {"judge", "a", "b"}, a one file or, against one baseline, a list of them, and "settings" of a judge that has some."""
    expected = "expected a new or empty folder, or a judgement of the same files by the same judge"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: found a file, {expected}")
    entries = sorted({path.name for path in out.iterdir()} - {ANSWERS_FOLDER}) if out.is_dir() else []
    if not entries:
        return
    try:
        found = json.loads((out / "report.json").read_text(encoding="utf-8"))
        held = {name: found[name] for name in ("judge", "a", "b")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out {out}: holds something else ({quoted(entries)}), {expected}") from None
    if differing := [name for name, value in asked.items() if found.get(name) != value]:
        a = held["a"] if isinstance(held["a"], str) else ", ".join(map(str, held["a"]))
        raise UserError(
            f"--out {out}: holds {a} against {held['b']} by {held['judge']}, which differs in {', '.join(differing)}; {expected}"
        )


def write(out: Path, report: dict[str, Any], pairs: Sequence[Pair], decisions: Sequence[Decision]) -> bool:
    """Write all files; report.json first, by which the same command knows its folder. False without matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    records = (
        {
            "id": p.id,
            "user": p.user or GENERIC,
            "prompt": p.prompt,
            **{name: value for name, value in d._asdict().items() if value is not None},
            "win": d.win,
            "words": [words(p.a), words(p.b)],
        }
        for p, d in zip(pairs, decisions, strict=True)
    )
    write_json_lines(out / VERDICTS_FILE, records)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    write_users(out / USERS_CSV, [{"user": u, **row} for u, row in report["per_user"].items()], USER_COLUMNS)
    return figure(report, out / "win_rate.png")
