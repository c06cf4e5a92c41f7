import json
import sys

import pytest

from prlhf.data.comparisons import parse_comparison
from prlhf.data.sets import simulate
from prlhf.data.sets.simulate import assign_workers, preferences, relabel
from prlhf.errors import UserError
from prlhf.evaluate import lengths as length_report
from prlhf.evaluate.lengths import lengths


def record(chosen, rejected, user=None, **extra):
    return {"prompt": "p", "chosen": chosen, "rejected": rejected, "user": user, **extra}


def pair(r):
    return r, parse_comparison(r, "f, line 1", "f:1")


def test_the_papers_seed_makes_4_5_and_6_the_minority_of_ten():
    assert [i + 1 for i, shorter in enumerate(preferences(10, 0.3, 3456)) if shorter] == [4, 5, 6]


def test_relabelling_by_words():
    responses = ("one two three", "incomprehensibilities word")
    assert relabel(responses, prefers_shorter=True) == ("incomprehensibilities word", "one two three")
    assert relabel(responses, prefers_shorter=False) == ("one two three", "incomprehensibilities word")


def test_ties_are_dropped_and_counted_whatever_their_order():
    records = [pair(record("a b", "c d", "u")), pair(record("c d", "a b", "u")), pair(record("a", "b c", "u"))]
    kept, _, ties = simulate.simulate(records, None, 0.3, 3456)
    assert (len(kept), ties) == (1, 2)


def test_users_of_the_file_are_ranked_by_comparisons_and_other_fields_stay():
    records = [pair(record("a b c", "d", user, split="x")) for user in ["rare"] + ["often"] * 3]
    kept, prefers_shorter, _ = simulate.simulate(records, None, 0.3, 3456)
    assert list(prefers_shorter) == ["often", "rare"]
    assert all(r["split"] == "x" for r in kept)
    for r in kept:
        assert (r["chosen"] == "d") == prefers_shorter[r["user"]]


def test_unknown_users_have_no_preference_and_are_left_out():
    kept, _, _ = simulate.simulate([pair(record("a b", "c", None)), pair(record("a b", "c", "u"))], None, 0.3, 0)
    assert [r["user"] for r in kept] == ["u"]
    with pytest.raises(UserError, match="no comparison has a user"):
        simulate.simulate([pair(record("a b", "c", None))], None, 0.3, 0)


def test_workers_get_equal_shares():
    names = assign_workers(100, 10, 3456)
    assert {names.count(f"worker{i + 1}") for i in range(10)} == {10}
    assert names[:10] != [f"worker{i + 1}" for i in range(10)]


def test_the_share_of_shorter_is_the_probability():
    assert sum(preferences(20000, 0.3, 0)) / 20000 == pytest.approx(0.3, abs=0.01)


def test_the_command(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(record("a b c " * (i % 3), "d e f", id=str(i))) + "\n" for i in range(30)))
    monkeypatch.setattr(sys, "argv", ["simulate", str(source), "--out", str(out), "--workers", "5"])
    simulate.main()
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 20 and {r["user"] for r in found} == {f"worker{i}" for i in range(1, 6)}
    assert "10 ties dropped" in capsys.readouterr().out


def test_length_report_by_hand():
    table = lengths([("a", "one two"), ("b", ""), ("a", "one two three four"), ("a", "")])
    assert table["a"].n == 3 and table["a"].mean == 2.0
    assert table["a"].standard_error == pytest.approx(2.0 / 3**0.5)  # sample deviation of 2, 4, 0 is 2
    assert table["b"] == (1, 0.0, 0.0)


def test_lengths_of_users_with_any_name(call, tmp_path):
    """A dollar sign would begin a formula of matplotlib's, a bar a cell of Markdown."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps({"user": user, "response": "x y"}) + "\n" for user in (r"a$\frac$", "b|c")))
    status, _, err = call(length_report.main, file, "--out", tmp_path / "out")
    assert status == 0, err
    assert r"| b\|c | 1 | 2.0 | 0.0 |" in next((tmp_path / "out").glob("*.md")).read_text()
