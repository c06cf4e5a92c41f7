"""Comparisons of hand-made margins, every number derived by hand; and what is refused."""

import json
import math

import numpy as np
import pytest

from prlhf.data.comparisons import Comparison
from prlhf.evaluate import compare
from prlhf.evaluate.figures import optional_pyplot
from prlhf.evaluate.report import write_margins

# Users a (4 comparisons) and b (2) are known; two comparisons of the unknown x and one of nobody are not.
IDS = ["a1", "a2", "a3", "a4", "b1", "b2", "x1", "x2", "n1"]
USERS = ["a", "a", "a", "a", "b", "b", "x", "x", None]
KNOWN = [True] * 6 + [False] * 3
BASE = [1, 1, -1, -1, 1, -1, 1, -1, 1]  # top 3/6, average (1/2 + 1/2) / 2, generic 2/3
GOOD = [1, 1, 1, 1, 1, 0, 1, 1, 1]  # top 5.5/6, average (1 + 3/4) / 2, generic 3/3


def write(folder, margins, ids=IDS, users=USERS, known=KNOWN, prompt="Hi?"):
    """An EVAL_DIR whose margins are `margins` under the user that counts, and the opposite under the other."""
    folder.mkdir(exist_ok=True)
    counted, sign = np.array(margins, dtype=float), np.where(known, 1, -1)
    comparisons = [Comparison(prompt, f"yes {i}", f"no {i}", user, None, i) for i, user in zip(ids, users)]
    write_margins(folder, comparisons, known, np.stack([counted * sign, -counted * sign, counted]))
    return folder


@pytest.fixture
def call(call, tmp_path):
    """Run prlhf.compare; its exit status and stderr, and the report where there is one."""

    def run(*models):
        status, _, err = call(compare.main, *models, "--out", tmp_path / "out")
        path = tmp_path / "out" / "report.json"
        return status, err, json.loads(path.read_text()) if path.exists() else None

    return run


def test_report_by_hand(call, tmp_path):
    base, good = write(tmp_path / "base", BASE), write(tmp_path / "good", GOOD)
    status, _, report = call(f"vanilla={base}", f"pdpo={good}")
    assert status == 0
    assert report["comparisons"] == {"known_users": 6, "unknown_users": 3}
    accuracy = {name: model["accuracy"] for name, model in report["models"].items()}
    assert accuracy["vanilla"] == pytest.approx(
        {"top": 3 / 6, "average_mean": 0.5, "average_std": 0, "generic": 2 / 3, "worst_user": 0.5}
    )
    assert accuracy["pdpo"] == pytest.approx(
        {"top": 5.5 / 6, "average_mean": 0.875, "average_std": 0.125, "generic": 1, "worst_user": 0.75}
    )
    assert set(report["models"]["pdpo"]["std_over_seeds"].values()) == {None}
    against = report["differences"]["pdpo"]
    assert against["top"]["difference"] == pytest.approx(2.5 / 6)
    assert against["top"]["win_rate"] == (3 + 3 / 2) / 6  # a3, a4, b2 are won, the other three equal
    assert against["average_mean"]["difference"] == pytest.approx(0.375)
    assert against["generic"]["difference"] == pytest.approx(1 / 3)
    assert against["generic"]["win_rate"] == (1 + 2 / 2) / 3  # x2
    for row in against.values():
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    users = report["per_user"]["pdpo"]
    assert [(row["user"], row["n"], row["difference"]) for row in users["users"]] == [("a", 4, 0.5), ("b", 2, 0.25)]
    assert [row["p"] for row in users["users"]] == pytest.approx([0.5, 1], abs=0.02)  # a: |T| = 2 in 2 of 4 flips
    assert [row["p_holm"] for row in users["users"]] == pytest.approx([1, 1], abs=0.02)
    assert (users["better"], users["worse"]) == (0, 0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| pdpo | 91.67 | 87.50 ± 12.50 | 100.00 |" in text
    assert "| pdpo | Accuracy-generic | +33.33 |" in text
    if optional_pyplot() is not None:
        assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000


def test_identical_models_are_never_called_different(call, tmp_path):
    base, same = write(tmp_path / "base", BASE), write(tmp_path / "same", BASE)
    _, _, report = call(f"one={base}", f"other={same}")
    assert report["models"]["one"]["interval"] == report["models"]["other"]["interval"]
    for name, row in report["differences"]["other"].items():
        assert (row["difference"], row["different"]) == (0, False)
        assert row["interval"][0] == -row["interval"][1]
        assert row["win_rate"] == (None if name == "average_mean" else 0.5)
    users = report["per_user"]["other"]
    assert (users["better"], users["worse"]) == (0, 0)
    assert all(row["p"] == row["p_holm"] == 1 and row["difference"] == 0 for row in users["users"])


def test_seeds_are_averaged(call, tmp_path):
    """Seeds BASE and GOOD: top 1/2 and 11/12, mean 17/24, standard deviation (5/12) / sqrt(2)."""
    base, good = write(tmp_path / "base", BASE), write(tmp_path / "good", GOOD)
    _, _, report = call(f"one={base}", f"two={base},{good}")
    two = report["models"]["two"]
    assert two["seeds"] == 2 and two["folders"] == [str(base), str(good)]
    assert two["accuracy"]["top"] == pytest.approx(17 / 24)
    assert two["std_over_seeds"]["top"] == pytest.approx(5 / 12 / np.sqrt(2))
    assert two["accuracy"]["average_std"] == pytest.approx(0.0625)
    against = report["differences"]["two"]["top"]
    assert against["difference"] == pytest.approx(17 / 24 - 1 / 2)
    assert against["win_rate"] == (3 + 3 / 2) / 6
    assert "| two | 70.83 ± 29.46 | 68.75 ± 26.52 (over users ± 6.25) |" in (tmp_path / "out" / "report.md").read_text()


def test_a_clear_difference_is_found_for_the_users_who_have_it(call, tmp_path):
    """Twelve users of 30 comparisons each: the model is better for the first, worse for the second, else the same."""
    users = np.repeat([f"user{i:02}" for i in range(12)], 30).tolist()
    sizes = {"ids": [str(i) for i in range(360)], "users": users, "known": [True] * 360}
    base = np.tile([1, -1], 180)
    model = base.copy()
    model[:30], model[30:60] = 1, -1
    folders = write(tmp_path / "base", base, **sizes), write(tmp_path / "model", model, **sizes)
    _, _, report = call(f"base={folders[0]}", f"model={folders[1]}")
    found = report["per_user"]["model"]
    assert (found["better"], found["worse"]) == (1, 1)
    assert {row["user"] for row in found["users"][:2]} == {"user00", "user01"}
    assert found["users"][0]["p_holm"] < 0.01 and found["users"][2]["p_holm"] == 1
    assert len(found["users"]) == 12
    text = (tmp_path / "out" / "report.md").read_text()
    assert "better for 1, worse for 1 at 5%.\n" in text and text.count("| user") == 1 + 12
    assert report["models"]["base"]["interval"]["generic"] is None
    assert report["differences"]["model"]["generic"]["difference"] is None


def test_a_difference_that_all_users_have_is_found(call, tmp_path):
    """60 users of 50 comparisons: always wrong against always right, and every second one against every second one.

    0.025^(1/60) = 0.9404 of users at least are like those: a difference of 1 is at least 0.9404 - 0.0596.
    """
    sizes = {
        "ids": [str(i) for i in range(3000)],
        "users": [f"user{i // 50}" for i in range(3000)],
        "known": [True] * 3000,
    }
    wrong, right = write(tmp_path / "wrong", [-1] * 3000, **sizes), write(tmp_path / "right", [1] * 3000, **sizes)
    half = write(tmp_path / "half", [1, -1] * 1500, **sizes)
    other = write(tmp_path / "other", [-1, 1] * 1500, **sizes)
    _, _, report = call(f"wrong={wrong}", f"right={right}", f"half={half}")
    for measure in ("top", "average_mean"):
        row = report["differences"]["right"][measure]
        assert (row["difference"], row["different"]) == (1, True)
        assert row["interval"] == pytest.approx([0.8808, 1], abs=1e-4)
        assert report["models"]["half"]["interval"][measure] == pytest.approx([0.4702, 0.5298], abs=1e-4)
    assert report["per_user"]["right"]["better"] == 60
    _, _, report = call(f"half={half}", f"other={other}")  # half each, on other comparisons
    row = report["differences"]["other"]["top"]
    assert (row["difference"], row["different"], row["win_rate"]) == (0, False, 0.5)


def test_many_users_are_tested_exactly(call, tmp_path):
    """400 users of 20 comparisons: the first always better, p = 2 / 2^20, times 400; the second in 15, worse in 5."""
    users = [f"user{i // 20:03}" for i in range(8000)]
    sizes = {"ids": [str(i) for i in range(8000)], "users": users, "known": [True] * 8000}
    base, model = np.full(8000, 1), np.full(8000, 1)
    base[:35], model[35:40] = -1, -1
    folders = write(tmp_path / "base", base, **sizes), write(tmp_path / "model", model, **sizes)
    _, _, report = call(f"base={folders[0]}", f"model={folders[1]}")
    found = report["per_user"]["model"]
    assert (found["better"], found["worse"]) == (1, 0)
    first, second, third = found["users"][:3]
    assert first["p"] == pytest.approx(2 / 2**20) and first["p_holm"] == pytest.approx(400 * 2 / 2**20)
    tail = 2 * sum(math.comb(20, k) for k in range(15, 21)) / 2**20
    assert second["p"] == pytest.approx(tail) and second["p_holm"] == 1
    assert third["p"] == 1


def write_reported(folder, calibration, gain):
    """An EVAL_DIR of GOOD with a report.json."""
    write(folder, GOOD)
    controls = {"personalisation_gain": {"accuracy": gain, "interval": None}}
    (folder / "report.json").write_text(json.dumps({"calibration": calibration, "controls": controls}))
    return folder


def test_what_evaluations_report_beside_margins(call, tmp_path):
    """Seeds of calibration errors 2 and 4, gains 10 and 20: means 3 and 15, standard deviations sqrt(2) and 5 sqrt(2)."""
    base = write(tmp_path / "base", BASE)
    seeds = [write_reported(tmp_path / f"seed{i}", {"top": 0.02 * i, "generic": None}, 0.1 * i) for i in (1, 2)]
    status, _, report = call(f"base={base}", f"model={seeds[0]},{seeds[1]}")
    assert status == 0
    model = report["models"]["model"]
    assert model["reported"] == {
        "calibration_top": pytest.approx(0.03), "calibration_generic": None, "personalisation_gain": pytest.approx(0.15),
        "own_record": None, "gain_over_generic": None,
    }  # fmt: skip
    text = (tmp_path / "out" / "report.md").read_text()
    measures = "Accuracy-top | Accuracy-average | Accuracy-generic"
    header = f"| % | {measures} | calibration error, known users | personalisation gain |"
    assert header + "\n|---|---|---|---|---|---|\n" in text
    assert "| base | 50.00 | 50.00 ± 0.00 | 66.67 | - | - |" in text
    assert "| 3.00 ± 1.41 | 15.00 ± 7.07 |" in text
    call(f"base={base}", f"good={write(tmp_path / 'good', GOOD)}")
    assert f"| % | {measures} |\n|---|---|---|---|\n" in (tmp_path / "out" / "report.md").read_text()
    for damage in ('{"calibration"', '{"calibration": {"top": "much"}}'):
        (seeds[0] / "report.json").write_text(damage)
        refused(call(f"base={base}", f"model={seeds[0]}"), str(seeds[0] / "report.json"))


def test_whose_gain_the_own_record_explains(call, tmp_path):
    """Of two seeds of b the rule explains the first one's gain; c does not say, as evaluations of before did not."""
    base = write(tmp_path / "base", BASE)
    folders = {name: write(tmp_path / name, GOOD) for name in ("a", "b0", "b1", "c")}

    def says(name, accuracy, explains):
        own = {"own_record": {"accuracy": accuracy, "explains_gain": explains}}
        (folders[name] / "report.json").write_text(json.dumps(own))

    for name, explains in (("a", True), ("b0", True), ("b1", False)):
        says(name, 0.9, explains)
    models = f"a={folders['a']}", f"b={folders['b0']},{folders['b1']}", f"c={folders['c']}"
    status, _, report = call(f"base={base}", *models)
    assert status == 0 and report["models"]["b"]["own_record_explains_gain"] == [True, False]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| Accuracy-generic | the rule own_record, known users |\n" in text
    assert "| b | 91.67 ± 0.00 | 87.50 ± 0.00 (over users ± 12.50) | 100.00 ± 0.00 | 90.00 ± 0.00 |" in text
    rule = "explained by the rule own_record, which only remembers each user's own record of the responses in training."
    names = "a, b (1 of 2 seeds)"
    assert text.endswith(f"\nThe gain of {names} over the generic user can be {rule} Not known of base, c.\n")
    says("a", 0.5, False)
    call(f"a={folders['a']}", f"b={folders['b1']}")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.endswith(f"\nNo model's gain over the generic user can be {rule}\n")
    call(f"base={base}", f"c={folders['c']}")
    assert "own_record" not in (tmp_path / "out" / "report.md").read_text()
    says("a", 0.5, 1)
    result = call(f"a={folders['a']}", f"base={base}")
    refused(result, "own_record.explains_gain: expected true or false or null, found 1")


def test_a_run_stands_for_its_evaluation(call, tmp_path):
    run, base = tmp_path / "run", write(tmp_path / "base", BASE)
    run.mkdir()
    refused(call(f"one={base}", f"two={run}"), f"{run}: found neither margins.jsonl nor eval/margins.jsonl")
    write(run / "eval", GOOD)
    status, _, report = call(f"one={base}", f"two={run}")
    assert status == 0 and report["models"]["two"]["accuracy"]["top"] == pytest.approx(5.5 / 6)
    refused(call(f"one={base}", f"two={run},{run}"), "two: ", "same evaluation", "two seeds")
    own = run / "eval"
    refused(call(f"one={base}", f"two={run},{base},{own}"), f"{own} and {run} are the same evaluation")


def test_the_order_of_the_lines_does_not_matter(call, tmp_path):
    base = write(tmp_path / "base", BASE)
    turned = write(tmp_path / "turned", BASE[::-1], IDS[::-1], USERS[::-1], KNOWN[::-1])
    _, _, report = call(f"one={base}", f"other={turned}")
    assert report["differences"]["other"]["top"]["win_rate"] == 0.5


def refused(result, *parts):
    status, err, _ = result
    assert status == 2 and "Traceback" not in err
    for part in parts:
        assert part in err, err


def test_other_comparisons_are_refused(call, tmp_path):
    base = write(tmp_path / "base", BASE)
    other = write(tmp_path / "other", BASE, ids=["a0", *IDS[1:]])
    refused(call(f"one={base}", f"two={other}"), "1 (id 'a1' of user 'a'", "1 (id 'a0' of user 'a'", str(other))
    users = write(tmp_path / "users", BASE, users=["b", *USERS[1:]])
    refused(call(f"one={base}", f"two={users}"), "id 'a1' of user 'b'", str(users))
    fewer = write(tmp_path / "fewer", BASE[1:], IDS[1:], USERS[1:], KNOWN[1:])
    refused(call(f"one={base},{fewer}", f"two={base}"), "1 (id 'a1' of user 'a'", "none only in")
    texts = write(tmp_path / "texts", BASE, prompt="Ho?")  # of another file of the same name, say
    refused(call(f"one={base}", f"two={texts}"), "in 9 of them", "id 'a1' of user 'a'", str(texts))
    known = write(tmp_path / "known", BASE, known=[False, *KNOWN[1:]])
    refused(call(f"one={base}", f"two={known}"), "in 1 comparisons", "'a1'", f"unknown in {known}")


def test_users_of_an_earlier_evaluation_are_those_of_today(call, tmp_path):
    """Which wrote "1.0" where a file had it."""
    old, new = (write(tmp_path / name, BASE, users=[user, *USERS[1:]]) for name, user in (("old", "1.0"), ("new", "1")))
    assert call(f"one={old}", f"two={new}")[0] == 0


def test_unknown_users_near_to_known_ones_are_told(tmp_path, capsys, monkeypatch):
    users = [*USERS[:6], "A", "A", None]
    base, good = (
        str(write(tmp_path / name, margins, users=users)) for name, margins in (("base", BASE), ("good", GOOD))
    )
    monkeypatch.setattr("sys.argv", ["compare", f"one={base}", f"two={good}", "--out", str(tmp_path / "out")])
    compare.main()
    said = "users who are not known: 1 ('A'), with 2 of 9 comparisons; known but for "
    assert said in capsys.readouterr().out


def test_damaged_files_are_refused(call, tmp_path):
    base = write(tmp_path / "base", BASE)
    refused(call(f"one={base}", f"two={tmp_path / 'nothing'}"), f"{tmp_path / 'nothing'}: found no such folder")
    damaged = write(tmp_path / "damaged", BASE)
    lines = (damaged / "margins.jsonl").read_text().splitlines()

    def with_third(line):
        (damaged / "margins.jsonl").write_text("\n".join([*lines[:2], line]) + "\n")
        return call(f"one={base}", f"two={damaged}")

    refused(with_third(lines[2][:20]), "margins.jsonl, line 3", "JSON")
    record = json.loads(lines[2])
    for field, value in {
        "true": "much",
        "generic": float("nan"),
        "known": 1,
        "user": 3,
        "id": None,
        "text": None,
    }.items():
        refused(with_third(json.dumps({**record, field: value})), f"line 3, {field}: expected")
    del record["shuffled"]
    refused(with_third(json.dumps(record)), "line 3, shuffled: expected a finite number, found")


def test_arguments_of_another_form_are_refused(call, tmp_path):
    base = write(tmp_path / "base", BASE)
    refused(call(f"one={base}"), "two or more models")
    refused(call(f"one={base}", f"one={base}"), "two models are named 'one'")
    refused(call(f"one={base}", str(base)), str(base), "expected NAME=EVAL_DIR")
    refused(call(f"one={base}", f"two={base},"), "expected NAME=EVAL_DIR")
