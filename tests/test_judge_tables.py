"""Several systems against one baseline, the judge of simulated users, and the commands that make the papers' tables."""

import json
import random
from pathlib import Path

import pytest

from prlhf.data.comparisons import Comparison
from prlhf.data.sets.simulate import simulate
from prlhf.judge import __main__ as command
from prlhf.judge import table
from prlhf.judge.judges import Query, find_judge


def words(n):
    return " ".join(["w"] * n)


def responses(path, lengths):
    """A file as generate.py writes it, of {(prompt, user): number of words}."""
    path.parent.mkdir(exist_ok=True)
    records = ({"id": x, "user": u, "prompt": x, "response": words(n)} for (x, u), n in lengths.items())
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def comparisons(path, rows):
    """A file of comparisons, from (user, words of the chosen response, words of the rejected one)."""
    records = ({"prompt": "x", "chosen": words(a), "rejected": words(b), "user": u} for u, a, b in rows)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ASKED = [("x", "ann"), ("y", "ann"), ("x", "bob")]


@pytest.fixture
def systems(tmp_path):
    """Two files of one name, which tell systems apart by their folders alone, and a baseline of two words everywhere."""
    a = responses(tmp_path / "p" / "out.jsonl", dict(zip(ASKED, (1, 3, 1))))
    b = responses(tmp_path / "q" / "out.jsonl", dict(zip(ASKED, (2, 3, 3))))
    return a, b, responses(tmp_path / "base.jsonl", dict.fromkeys(ASKED, 2))


def test_each_system_is_judged_as_a_pair_of_files_is(call, systems, tmp_path):
    """Shorter wins: the first system two of three, ann 1/2 and bob 1; the second a tie and two losses, ann 1/4 and bob 0."""
    a, b, base = systems
    status, said, err = call(command.main, a, b, base, "--judge", "rule:shorter", "--out", tmp_path / "all")
    assert status == 0, err
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert (report["judge"], report["a"], report["b"]) == ("rule:shorter", [str(a), str(b)], str(base))
    rates = {file: own["win_rate"] for file, own in report["systems"].items()}
    assert rates[str(a)]["per_sample"] == pytest.approx(2 / 3) and rates[str(a)]["per_user"] == 0.75
    assert rates[str(b)]["per_sample"] == pytest.approx(1 / 6) and rates[str(b)]["per_user"] == 0.125
    row = next(line for line in said.splitlines() if line.startswith(f"| `{b}`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("16.67 (") and cells[2].startswith("12.50 (")
    assert cells[4:] == ["3", "0", "1", "2", "2.7", "2"]
    for file, folder in ((a, "1_out"), (b, "2_out")):
        assert call(command.main, file, base, "--judge", "rule:shorter", "--out", tmp_path / "one" / folder)[0] == 0
        assert contents(tmp_path / "one" / folder) == contents(tmp_path / "all" / folder)
        alone = json.loads((tmp_path / "one" / folder / "report.json").read_text())
        assert report["systems"][str(file)] == alone


def test_a_half_done_judgement_goes_on_and_what_was_judged_is_kept(call, systems, tmp_path, monkeypatch):
    a, b, base = systems
    asked = (a, b, base, "--judge", "rule:shorter", "--out", tmp_path / "out")
    decided = []

    def counted(pairs, judge, decide=table.decide):
        decided.append(Path(pairs[0].where.split(",")[0]))
        if len(decided) == 2:
            raise KeyboardInterrupt
        return decide(pairs, judge)

    monkeypatch.setattr(table, "decide", counted)
    assert call(command.main, *asked)[0] not in (0, 2)
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["systems"]) == [str(a)]
    status, said, _ = call(command.main, *asked)
    assert status == 0 and decided == [a, b, b] and f"{a}: was judged already, and is kept" in said
    before = contents(tmp_path / "out")
    assert call(command.main, *asked)[0] == 0 and len(decided) == 3
    assert contents(tmp_path / "out") == before
    responses(a, dict(zip(ASKED, (3, 3, 1))))  # another answer: judged anew
    assert call(command.main, *asked)[0] == 0 and decided[3:] == [a]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["systems"][str(a)]["win_rate"]["per_sample"] == pytest.approx(1 / 3)


def test_another_state_of_the_judge_judges_anew(call, systems, tmp_path):
    a, b, base = systems
    rules = comparisons(tmp_path / "rules", [("ann", 1, 2), ("bob", 1, 2)])
    asked = (a, b, base, "--judge", f"simulated:{rules}", "--out", tmp_path / "out")
    assert call(command.main, *asked)[0] == 0
    comparisons(rules, [("ann", 2, 1), ("bob", 2, 1)])
    assert call(command.main, *asked)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["systems"][str(a)]["win_rate"]["per_sample"] == pytest.approx(1 / 3)


def test_bad_input_of_several_is_refused_and_changes_nothing(call, systems, tmp_path):
    a, b, base = systems
    other = responses(tmp_path / "other.jsonl", dict(list(zip(ASKED, (1, 2, 3)))[:2]))
    assert call(command.main, a, b, base, "--judge", "rule:shorter", "--out", tmp_path / "done")[0] == 0
    before = contents(tmp_path)
    cases = {
        (a, a, base, "rule:shorter", "out"): "found a file twice, expected each system once",
        (a, other, base, "rule:shorter", "out"): f"none only in {other}, 1 (prompt \"x\" of user 'bob') only in {base}",
        (a, b, base, "rule:longer", "done"): f"holds {a}, {b} against {base} by rule:shorter, expected",
        (b, a, base, "rule:shorter", "done"): f"holds {a}, {b} against",
        (a, base, "rule:shorter", "done"): f"holds {a}, {b} against",
        (a, b, base, "simulated:", "out"): "expected one of",
        (a, b, base, f"simulated:{tmp_path / 'nowhere'}", "out"): "no such file",
    }
    for (*files, judge, out), part in cases.items():
        status, _, err = call(command.main, *files, "--judge", judge, "--out", tmp_path / out)
        assert status == 2 and part in err and len(err.splitlines()) == 1, err
        assert contents(tmp_path) == before and not (tmp_path / "out").exists()


# Simulated users


def queries(users, lengths):
    return [Query("x", user, None, None, words(a), words(b), "") for user in users for a, b in lengths]


def test_simulated_users_judge_as_they_chose(tmp_path):
    """The rule that prlhf.simulate drew for each worker, of whom 4, 5 and 6 prefer the shorter response."""
    rng = random.Random(0)
    records = [
        {"prompt": "x", "chosen": words(rng.randrange(1, 30)), "rejected": words(rng.randrange(30, 60))}
        for _ in range(80)
    ]
    read = [(r, Comparison("x", r["chosen"], r["rejected"], None, None, "")) for r in records]
    kept, _, _ = simulate(read, workers=10, shorter=0.3, seed=3456)
    path = tmp_path / "workers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    workers = [f"worker{i}" for i in range(1, 11)]
    judge = find_judge(f"simulated:{path}", workers)
    shorter = [worker in ("worker4", "worker5", "worker6") for worker in workers]
    found = judge.verdicts(queries(workers, [(2, 7), (7, 2), (3, 3)]))
    expected = [
        verdict for s in shorter for verdict in (("first", "second", "tie") if s else ("second", "first", "tie"))
    ]
    assert found == expected and judge.said is None


def test_who_is_not_simulated_is_judged_as_most_comparisons_are(tmp_path):
    """Two comparisons of ann's, who prefers the shorter, against one each of bob and cleo, then against three."""
    rows = [("ann", 1, 2), ("ann", 1, 2), ("bob", 2, 1), ("cleo", 2, 1)]
    even = find_judge(f"simulated:{comparisons(tmp_path / 'even', rows)}", ["ann", None, "dan", "dan"])
    assert even.verdicts(queries([None, "dan", "ann"], [(1, 2)])) == ["tie", "tie", "first"]
    assert even.said.endswith("does not know, judged as the generic user: 1 ('dan').")
    most = find_judge(f"simulated:{comparisons(tmp_path / 'most', [*rows, ('bob', 9, 1)])}", ["ann"])
    assert most.verdicts(queries([None, "dan", "ann"], [(1, 2)])) == ["second", "second", "first"]


def test_a_file_of_real_people_is_no_simulation(call, systems, tmp_path):
    a, _, base = systems
    cases = {
        (
            ("ann", 1, 2),
            ("bob", 2, 1),
            ("ann", 3, 2),
        ): ", line 3: user 'ann' chose the longer response here, and the other before",
        (("ann", 1, 2), ("ann", 2, 2)): ", line 2: found responses of equal length, expected",
        ((None, 1, 2),): ", line 1: found no user, expected",
    }
    for rows, part in cases.items():
        path = comparisons(tmp_path / "people", rows)
        status, _, err = call(command.main, a, base, "--judge", f"simulated:{path}", "--out", tmp_path / "out")
        assert status == 2 and part in err and not (tmp_path / "out").exists(), err
