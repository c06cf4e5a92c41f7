"""Win rates: by hand, antisymmetric, with intervals that cover; the length-controlled rate beside another fit; refusals."""

import json
import math
import random
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import prlhf
from prlhf.evaluate.figures import optional_pyplot
from prlhf.judge import __main__ as command
from prlhf.judge.judges import Judge, find_judge
from prlhf.judge.length import RIDGE, length_controlled, separable
from prlhf.judge.pairs import Pair, read_pairs
from prlhf.judge.report import judgement
from prlhf.judge.verdicts import Decision, decide
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = ("first", "second", "tie", "unparsed")


def write(path, rows):
    """A file as generate.py writes it, from (prompt, user, response)."""
    records = (
        {"id": str(i), "user": u, "prompt": x, "user_text": None, "response": y} for i, (x, u, y) in enumerate(rows)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def words(n):
    return " ".join(["w"] * n)


def pair(user, a=1, b=1):
    return Pair("", "Hi?", user, None, None, words(a), words(b), "")


WON, LOST, TIED = Decision("first", "second"), Decision("second", "first"), Decision("tie", "tie")


@pytest.fixture
def judged(call, tmp_path):
    """Run the command; its exit status, what it wrote to stdout and stderr, and the report where there is one."""

    def run(a, b, judge="rule:shorter", out="out"):
        status, said, err = call(command.main, a, b, "--judge", judge, "--out", tmp_path / out)
        path = tmp_path / out / "report.json"
        return status, said, err, json.loads(path.read_text()) if path.is_file() else None

    return run


def test_rates_by_hand(judged, tmp_path):
    """alice's shorter answers: A, A, tie (2.5 of 3); bob's: B (0 of 1); nobody's: A."""
    prompts = [("x", "alice"), ("y", "alice"), ("z", "alice"), ("x", "bob"), ("x", "generic")]
    a = write(tmp_path / "a", [(*p, words(n)) for p, n in zip(prompts, [1, 2, 3, 9, 1])])
    b = write(tmp_path / "b", [(*p, words(n)) for p, n in zip(prompts, [2, 5, 3, 8, 7])][::-1])
    status, said, _, report = judged(a, b)
    assert status == 0
    assert report["pairs"] == {"judged": 5, "unparsed": 0, "users": 3}
    assert report["win_rate"]["per_sample"] == pytest.approx(3.5 / 5)
    assert report["win_rate"]["per_user"] == pytest.approx((2.5 / 3 + 0 + 1) / 3)
    assert report["verdicts"] == {"wins": 3, "ties": 1, "losses": 1}
    assert report["per_user"]["alice"] == {
        "n": 3,
        "wins": 2,
        "ties": 1,
        "losses": 0,
        "win_rate": 2.5 / 3,
        "p": 0.5,
        "p_holm": 1,
    }
    assert report["words"] == pytest.approx({"a": 16 / 5, "b": 25 / 5, "a_longer": 1 / 5, "equal": 1 / 5})
    assert report["consistency"] == 1 and report["position_bias"] == {
        "first": 0.5,
        "always_first": 0,
        "always_second": 0,
    }
    assert report["length_fit"]["slope"] < 0  # of A's words less B's: -1, -3, 0, 1, -6
    assert report["length_fit"]["scale"] == pytest.approx(math.sqrt((1 + 9 + 0 + 1 + 36) / 5))
    assert "70.00" in said and "61.11" in said and "A 3.2, B 5.0" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert [line["win"] for line in lines] == [1, 1, 0.5, 0, 1] and lines[3]["words"] == [9, 8]
    assert (lines[0]["a_first"], lines[0]["b_first"], lines[4]["user"]) == ("first", "second", "generic")
    left = {path.name for path in (tmp_path / "out").iterdir()} - ({"win_rate.png"} if optional_pyplot() else set())
    assert left == {"report.json", "report.md", "users.csv", "verdicts.jsonl"}
    assert judged(a, b)[::3] == (0, report)  # the same again
    assert judged(a, b, "rule:longer", "longer")[3]["win_rate"]["per_sample"] == pytest.approx(1.5 / 5)


def test_two_verdicts_make_one_decision():
    """A pair is won where both orders name one side; all else that could be parsed is a tie."""
    assert {both: Decision(*both).win for both in product(VERDICTS, repeat=2)} == {
        ("first", "first"): 0.5, ("first", "second"): 1, ("first", "tie"): 0.5, ("first", "unparsed"): None,
        ("second", "first"): 0, ("second", "second"): 0.5, ("second", "tie"): 0.5, ("second", "unparsed"): None,
        ("tie", "first"): 0.5, ("tie", "second"): 0.5, ("tie", "tie"): 0.5, ("tie", "unparsed"): None,
        ("unparsed", "first"): None, ("unparsed", "second"): None, ("unparsed", "tie"): None, ("unparsed", "unparsed"): None,
    }  # fmt: skip


def test_position_and_what_is_unparsed_are_counted():
    decisions = [WON, LOST, Decision("first", "first"), Decision("first", "tie"), TIED, Decision("first", "unparsed")]
    decisions += [Decision("first", "first"), Decision("second", "second")]
    report = judgement([pair("a")] * 8, decisions)
    assert report["pairs"] == {"judged": 7, "unparsed": 1, "users": 1}
    assert report["consistency"] == 3 / 7  # won, lost, tied
    assert report["position_bias"] == {
        "first": (1 + 1 + 2 + 1.5 + 1 + 2 + 0) / 14,
        "always_first": 2,
        "always_second": 1,
    }
    assert report["win_rate"]["per_sample"] == 0.5 and report["verdicts"] == {"wins": 1, "ties": 5, "losses": 1}


def test_nothing_parsed_is_no_rate():
    report = judgement([pair("a")] * 2, [Decision("unparsed", "first")] * 2)
    assert report["pairs"] == {"judged": 0, "unparsed": 2, "users": 0} and set(report["win_rate"].values()) == {None}


def any_verdict(queries):
    """Verdicts by the texts and their order alone, often for the first, of a judge who also ties and says nonsense."""
    return [
        random.Random(f"{q.prompt} {q.user} {q.first} {q.second}").choices(VERDICTS, weights=[5, 3, 1, 0.3])[0]
        for q in queries
    ]


@pytest.mark.parametrize(
    "judge", [Judge("any", any_verdict), find_judge("rule:shorter", []), find_judge("rule:longer", [])]
)
def test_a_against_b_and_b_against_a_add_up_to_one(tmp_path, judge):
    """Rates, and intervals mirrored, over random files in random order; a system against itself is 1/2 exactly."""
    rng = random.Random(1)
    for _ in range(15):
        users = ["generic", *map(str, range(rng.randrange(8)))]
        asked = [(f"Q{i}", u) for u in users for i in range(rng.randrange(1, 9))]
        for name in "ab":
            rng.shuffle(asked)
            write(tmp_path / name, [(*p, words(rng.randrange(1, 12)) + rng.choice("xyz")) for p in asked])
        found = []
        for one, other in ("ab", "ba", "aa"):
            pairs = read_pairs(tmp_path / one, tmp_path / other)
            found.append(judgement(pairs, decide(pairs, judge)))
        ab, ba, aa = found
        for name, rate in ab["win_rate"].items():
            assert rate + ba["win_rate"][name] == pytest.approx(1, abs=1e-9)
            mirrored = ba["interval"][name] and [1 - end for end in ba["interval"][name][::-1]]
            assert (ab["interval"][name] and list(ab["interval"][name])) == (
                mirrored and pytest.approx(mirrored, abs=1e-7)
            )
        assert ab["verdicts"]["wins"] == ba["verdicts"]["losses"] and ab["consistency"] == ba["consistency"]
        assert ab["position_bias"] == ba["position_bias"] and ab["pairs"] == ba["pairs"]
        assert set(aa["win_rate"].values()) == {0.5}


def test_sign_tests_are_binomial_and_adjusted_after_holm():
    """a: 9 wins, 1 loss, 4 ties; b: 6 wins; c: 9 losses; d: one of each. Tails of Binomial(k, 1/2), doubled.

    After Holm c's is times 4, a's times 3; b's, times 2, would be less than a's and is raised to it.
    """
    decisions = [WON] * 9 + [LOST] + [TIED] * 4 + [WON] * 6 + [LOST] * 9 + [WON, LOST]
    report = judgement([pair(u) for u in "a" * 14 + "b" * 6 + "c" * 9 + "d" * 2], decisions)
    p = {user: row["p"] for user, row in report["per_user"].items()}
    tail = {"a": 2 * (1 + 10) / 2**10, "b": 2 / 2**6, "c": 2 / 2**9, "d": 1}
    assert p == pytest.approx(tail)
    adjusted = {user: row["p_holm"] for user, row in report["per_user"].items()}
    assert adjusted == pytest.approx({"c": 4 * 2 / 2**9, "a": 3 * tail["a"], "b": 3 * tail["a"], "d": 1})
    assert report["users_significantly"] == {"for_a": 0, "for_b": 1}


def coverage(users, draws):
    """The share of intervals that cover the truth, for users of 8 or 24 pairs; half of a user's responses of A are ten words longer, half ten words shorter.

    Each user's rate of wins is from a beta distribution around a mean of their size and of whether A is longer; a fifth of
    all pairs is a tie. Two lengths determine intercept and slope, so the fit is right for the mean over all pairs.
    """
    rng = np.random.default_rng(0)
    sizes, means = np.array([8, 24]), np.array([[0.35, 0.55], [0.5, 0.8]])  # by size, by whether A is longer
    rates = 0.1 + 0.8 * means  # with a tie in a fifth of pairs
    by_length = sizes @ rates / sizes.sum()
    truth = {
        "per_sample": by_length.mean(),
        "per_user": rates.mean(),
        "length_controlled": 1 / (1 + math.exp(-np.log(by_length / (1 - by_length)).mean())),
    }
    assert max(truth.values()) - min(truth.values()) > 0.02
    covered, pairs = dict.fromkeys(truth, 0), {}
    for _ in range(draws):
        asked, decisions = [], []
        for user in map(str, range(users)):
            size = rng.integers(2)
            for longer in (0, 1):
                p = rng.beta(6 * means[size, longer], 6 * (1 - means[size, longer]))
                outcomes = np.where(rng.random(sizes[size] // 2) < 0.2, 2, rng.random(sizes[size] // 2) < p)
                decisions += [(LOST, WON, TIED)[i] for i in outcomes]
                key = user, longer
                pairs.setdefault(key, pair(user, 1 + 10 * longer, 11 - 10 * longer))
                asked += [pairs[key]] * len(outcomes)
        report = judgement(asked, decisions)
        for name, value in truth.items():
            low, high = report["interval"][name]
            covered[name] += low <= value <= high
    return {name: count / draws for name, count in covered.items()}


def test_intervals_cover_the_rates_of_the_users_there_could_have_been():
    found = coverage(users=12, draws=400)
    print(found)
    assert min(found.values()) >= 0.92 and max(found.values()) <= 0.98


def another_fit(wins, z, ridge):
    """Intercept and slope by iterated least squares: a tie is a win and a loss of weight 1/2, the ridge two more rows."""
    x = np.stack([np.ones(len(z)), z], axis=1)
    x, y = np.concatenate([x, x]), np.repeat([1.0, 0.0], len(z))
    weights = np.concatenate([wins, 1 - wins])
    beta = np.zeros(2)
    for _ in range(200):
        logits = x @ beta
        p = 1 / (1 + np.exp(-logits))
        v = p * (1 - p)
        rows = np.sqrt(weights * v)
        targets = np.concatenate([rows * (logits + (y - p) / v), np.zeros(2)])
        design = np.concatenate([rows[:, None] * x, math.sqrt(ridge) * np.eye(2)])
        beta = np.linalg.lstsq(design, targets, rcond=None)[0]
    return beta


@pytest.mark.parametrize("seed", range(4))
def test_the_length_controlled_rate_is_that_of_another_logistic_fit(seed):
    rng = np.random.default_rng(seed)
    differences = rng.integers(-30, 90, size=80)
    wins = rng.choice([0, 0.5, 1], size=80, p=[0.3, 0.2, 0.5])
    wins[differences > 50] = 1
    wins[differences < -15] = 0
    fit = length_controlled(wins, differences, ["a"] * 80)
    z = np.tanh(differences / math.sqrt(sum(int(d) ** 2 for d in differences) / 80))
    assert (fit.intercept, fit.slope) == pytest.approx(another_fit(wins, z, RIDGE), abs=1e-9)
    assert fit.rate == pytest.approx(
        1 / (1 + math.exp(-another_fit(wins, z, 0.0)[0])), abs=1e-3
    )  # the ridge hardly matters
    assert abs(fit.rate - wins.mean()) > 0.05 and not fit.separable and fit.interval is None  # of one user


def test_a_judge_of_length_alone_says_nothing_at_equal_length():
    """Longer wins: the raw rate is A's share of longer responses, 3/4; the length-controlled one is near 1/2, by the ridge."""
    differences = np.array([10, 1, 20, -1, 10, 1, 20, -1])
    fit = length_controlled((differences > 0).astype(float), differences, [*"abcdabcd"])
    assert fit.separable and fit.interval is None and 0.4 < fit.rate < 0.6 and fit.slope > 5
    one_sided = length_controlled(np.ones(8), differences, [*"abcdabcd"])
    assert one_sided.separable and one_sided.interval is None and one_sided.rate > 0.9
    assert length_controlled(np.array([1.0, 0.0]), np.array([3, 3]), ["a", "b"]) is None


def test_a_rate_at_a_length_that_no_pair_has_is_marked(judged, tmp_path):
    """A's words less B's: 1 and 3, 1 and -1, 0 and 2, and -1 and -3; 0 is between the ends of two. One user wins once, loses once."""
    rows = [("x", "u"), ("y", "u")]
    b = write(tmp_path / "b", [(*row, words(4)) for row in rows])
    beyond = "† At equal length: one side's responses are longer in every pair"
    found = {}
    for differences in ((1, 3), (1, -1), (0, 2), (-1, -3)):
        a = write(tmp_path / "a", [(*row, words(4 + d)) for row, d in zip(rows, differences)])
        _, said, _, report = judged(a, b, out=f"out{differences}")
        found[differences] = report["length_fit"]["extrapolated"]
        line = next(line for line in said.splitlines() if line.startswith("| length-controlled"))
        assert (" †" in line) == (beyond in said) == found[differences]
        assert (" ‡ |" in line) and "‡ At equal length: wins and losses are separable by length" in said
    assert found == {(1, 3): True, (1, -1): False, (0, 2): False, (-1, -3): True}
    fit = length_controlled(np.array([1, 0, 1, 0]), np.array([1, 2, 2, 1]), ["a"] * 4)
    assert fit.extrapolated and not fit.separable
    assert not length_controlled(np.array([1, 0, 1, 0]), np.array([-1, 2, 2, -1]), ["a"] * 4).extrapolated


def test_separable_is_that_a_direction_ranks_all():
    """Over all outcomes at up to four lengths, beside all directions (a, b) between those in which a + b z is 0 at a length."""
    angles = [math.atan2(-1, z) for z in (-1, 0, 2)]
    angles = [*angles, *[a + 0.1 for a in angles], *[a - 0.1 for a in angles]]
    directions = [(sign * math.cos(angle), sign * math.sin(angle)) for angle in angles for sign in (1, -1)]
    found = set()
    for z in ((-1, 0, 2), (-1, -1, 2), (0, 0, 2, 2), (2, 2, 2), (-1, 0, 0, 2)):
        for wins in product((0, 0.5, 1), repeat=len(z)):
            margins = [[(2 * y - 1) * (a + b * d) for y, d in zip(wins, z)] for a, b in directions]
            ties = [[abs(a + b * d) for y, d in zip(wins, z) if y == 0.5] for a, b in directions]
            expected = any(min(m) > -1e-9 and max(m) > 1e-9 and max(t, default=0) < 1e-9 for m, t in zip(margins, ties))
            assert separable(np.array(wins), np.array(z, dtype=float)) == expected, (wins, z)
            found.add(expected)
    assert found == {True, False}


def test_without_length_differences_the_controlled_rate_is_the_raw_one_with_the_robust_interval():
    """logit(2/3) +- t sqrt(2 sum over users (wins - 2/3 n)^2) / (6 * 2/9), t = 12.706 of two users."""
    wins, users = np.array([1, 1, 0.5, 1, 0.5, 0.0]), ["a", "a", "a", "b", "b", "b"]
    fit = length_controlled(wins, np.zeros(6, dtype=int), users)
    half = 12.7062 * math.sqrt(2 * (0.5**2 + 0.5**2)) / (6 * 2 / 9)
    expected = [1 / (1 + math.exp(-math.log(2) + half)), 1 / (1 + math.exp(-math.log(2) - half))]
    assert fit.rate == pytest.approx(2 / 3, abs=1e-3) and list(fit.interval) == pytest.approx(expected, rel=0.01)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A finished run of a tiny reward model."""
    run = tmp_path_factory.mktemp("run") / "prm"
    small = ("model.width=32", "model.heads=2", "optim.epochs=1", "data.limit=16", "data.valid_limit=12", "lora.rank=2")
    linear = ("user_model.aggregator=linear", "user_model.tokens=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        overrides = [f"run_dir={run}", *small, *linear, "method=prm", "train.eval_last=false"]
        patch.setattr(sys, "argv", ["train.py", "--config", "tiny", "--set", *overrides])
        train.main()
    torch.manual_seed(0)
    path = run / "final" / "users.safetensors"
    far = {name: t + torch.randn_like(t) * name.startswith("user_model.") for name, t in load_file(path).items()}
    save_file(far, path)  # one update leaves users much alike
    return run


def test_a_reward_model_judges_by_the_users_own_reward(judged, tmp_path, reward_model):
    """As `prlhf.load(...).score` has it; who is unknown is judged as the generic user, which is said."""
    model = prlhf.load(reward_model)
    known = list(model.users[:2])
    texts = [f"{'word ' * i}answer {i}" for i in range(1, 9)]
    asked = [(f"Question {i}?", user) for user in (*known, "stranger", "generic") for i in range(8)]
    a = write(tmp_path / "a", [(*p, texts[i % 8]) for i, p in enumerate(asked)])
    b = write(tmp_path / "b", [(*p, texts[(3 * i + i // 8) % 8]) for i, p in enumerate(asked)])
    status, said, err, report = judged(a, b, f"prm:{reward_model}")
    assert status == 0, err
    assert "does not know, judged as the generic user: 1 ('stranger')" in said
    prompts = [x for x, _ in asked]
    answers = [[json.loads(line)["response"] for line in path.read_text().splitlines()] for path in (a, b)]

    def wins(users):
        of_a, of_b = (np.array(model.score(prompts, responses, users)) for responses in answers)
        same = np.array([y == z for y, z in zip(*answers)])
        assert same.any() and np.abs(of_a - of_b)[~same].min() > 1e-6  # beyond rounding
        return np.where(same, 0.5, of_a > of_b).tolist()

    expected = wins([u if u in known else None for _, u in asked])
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert [line["win"] for line in lines] == expected and {0, 0.5, 1} == set(expected)
    assert report["consistency"] == 1 and wins(None) != expected  # whose reward it is matters
    back = judged(b, a, f"prm:{reward_model}", "back")[3]
    assert back["win_rate"]["per_sample"] == pytest.approx(1 - report["win_rate"]["per_sample"], abs=1e-12)


def test_b_may_be_a_file_of_comparisons(judged, tmp_path):
    """Its chosen responses count, those of null users for the generic one; prompts may be messages."""
    messages = [{"role": "user", "content": "x"}]
    a = write(tmp_path / "a", [("x", "u", words(2)), ("x", "generic", words(2)), (messages, "u", words(2))])
    asked = [("x", "u", 1), ("x", None, 3), (messages, "u", 9)]
    records = [{"prompt": x, "chosen": words(n), "rejected": words(30), "user": user} for x, user, n in asked]
    (tmp_path / "b").write_text("".join(json.dumps(record) + "\n" for record in records[::-1]))
    report = judged(a, tmp_path / "b")[3]
    assert {user: row["wins"] for user, row in report["per_user"].items()} == {"u": 1, "generic": 1}
    assert report["win_rate"]["per_sample"] == 2 / 3 and report["words"]["b"] == 13 / 3


def test_bad_input_is_refused_and_nothing_is_written(judged, tmp_path):
    rows = [("x", "u", "one"), ("y", "u", "two words")]
    a = write(tmp_path / "a", rows)
    files = {
        "other_user": [("x", "u", "one"), ("y", "v", "two")],
        "fewer": rows[:1],
        "twice": [*rows, ("x", "u", "three")],
        "empty": [],
    }
    files = {name: write(tmp_path / name, rows) for name, rows in files.items()}
    no_response = tmp_path / "no_response"
    no_response.write_text('{"prompt": "x", "user": "u", "reponse": "y"}\n')
    other_text = tmp_path / "other_text"
    lines = [{"prompt": x, "user": u, "response": y, "user_text": "likes tea"} for x, u, y in rows]
    other_text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with_text = tmp_path / "with_text"
    with_text.write_text(other_text.read_text().replace("tea", "coffee"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.json").write_text('{"accuracy": 1}')
    assert judged(a, a, out="done")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cases = {
        (a, files["other_user"]): ("prompts or users do not match: 1 (prompt \"y\" of user 'u') only in", "1 (prompt \"y\" of user 'v')"),
        (a, files["fewer"]): ("1 (prompt \"y\" of user 'u') only in", "none only in"),
        (files["fewer"], a): ("none only in", "1 (prompt \"y\" of user 'u') only in"),
        (files["twice"], a): (", line 3: prompt \"x\" of user 'u' was in", "line 1 already; expected it once"),
        (files["empty"], a): ("empty: empty, expected",),
        (a, no_response): ("line 1: no field 'response' (did you mean 'reponse'?)",),
        (a, tmp_path / "missing"): ("no such file",),
        (with_text, other_text): ("line 1, user_text: found another than in",),
        (a, a, "rule:shortest"): ("no such judge (did you mean 'rule:shorter'?); expected one of rule:shorter, rule:longer, prm:RUN",),
        (a, a, "openai:"): ("--judge openai:: no such judge", "expected one of"),
        (a, a, "prm:"): ("expected one of",),
        (a, a, f"prm:{tmp_path / 'nowhere'}"): ("no such checkpoint",),
        (a, a, "rule:shorter", "a"): ("found a file, expected a new or empty folder",),
        (a, a, "rule:shorter", "full"): ("holds something else ('report.json'), expected",),
        (a, a, "rule:longer", "done"): (f"holds {a} against {a} by rule:shorter, which differs in judge; expected",),
    }  # fmt: skip
    for arguments, parts in cases.items():
        status, _, err, _ = judged(*arguments)
        assert status == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, (arguments, err)
        for part in parts:
            assert part in err, err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert not (tmp_path / "out").exists()
