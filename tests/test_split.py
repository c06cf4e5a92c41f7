"""`python -m prlhf.data split --by response`: nobody judged a held-out response of theirs in training. Counts by hand."""

import json
from collections import Counter

import pytest

from prlhf.data import __main__ as data_command
from prlhf.data.comparisons import parse_comparison
from prlhf.data.sets.splits import Shares, judged, recurring, split_by_response

SHARES = Shares(1.0, 0.7)  # all users known, 70% of each one's responses trained on


def lines(path, records):
    """A file of these records."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_pairs(user, n, prompt="Agree?"):
    """Every pair of n statements, under one prompt, as a user judged it."""
    pairs = [(a, b) for a in range(n) for b in range(a)]
    return [{"prompt": prompt, "chosen": f"statement {a}", "rejected": f"statement {b}", "user": user,
             "id": f"{user} {a} {b}"} for a, b in pairs]  # fmt: skip


def by_response(records, shares=SHARES, seed=0, k=0):
    return split_by_response(records, [judged(parse_comparison(r, "f", "f")) for r in records], shares, seed, k)


def responses(records):
    """(user, response) of what these records judge."""
    return {(r["user"], r[side]) for r in records for side in ("chosen", "rejected")}


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_by_response_nobody_judged_a_held_out_response_in_training(k, seed):
    """Users of 2 to 12 statements, the last without a name."""
    records = [r for n in range(2, 14) for r in all_pairs(f"u{n}" if n < 13 else None, n)]
    made = by_response(records, Shares(0.8, 0.7), seed, k)
    parts = made.train, made.valid, made.few_shot
    ids = [r["id"] for part in parts for r in part]
    assert len(ids) == len(set(ids)) == len(records) - made.left_out - made.straddling
    assert [[r["id"] for r in part] for part in parts] == [
        [r["id"] for r in records if r in part] for part in parts
    ]  # in their order
    assert not responses(made.valid) & (responses(made.train) | responses(made.few_shot))
    known = {r["user"] for r in made.train}
    assert None in known and {r["user"] for r in made.valid} - known
    assert not known & {r["user"] for r in made.few_shot}
    assert set(Counter(r["user"] for r in made.few_shot).values()) == ({k} if k else set())
    assert by_response(records, Shares(0.8, 0.7), seed, k) == made != by_response(records, Shares(0.8, 0.7), 7, k)


@pytest.mark.parametrize("user", ["ann", None])
def test_by_response_counts_by_hand(user):
    """Ten statements: seven are trained on, C(7, 2) = 21 pairs; of the other three 3 pairs are held out; 7 x 3 straddle.

    A pair alone straddles when one of its responses is trained on: the user of whom nothing could be is unknown."""
    made = by_response(all_pairs(user, 10))
    assert [*map(len, made[:3]), made.left_out, made.straddling] == [21, 3, 0, 0, 21]
    made = by_response([*all_pairs(user, 10), *all_pairs("bob", 2)])
    assert [*map(len, made[:3]), made.left_out, made.straddling] == [21, 4, 0, 0, 21]
    assert made.valid[-1]["user"] == "bob" and "bob" not in {r["user"] for r in made.train}


def test_by_response_few_shot_by_hand():
    """An unknown user of ten statements, 45 pairs. Three of these have 3 pairs: the other seven 21, and 3 x 7 straddle.

    Four pairs need four statements, which have 6: two are left out, and 15 of the other six are held out, 24 straddle.
    """
    known = by_response(all_pairs("ann", 10))
    for k, few, held_out, beyond, straddling in ((0, 0, 45, 0, 0), (3, 3, 21, 0, 21), (4, 4, 15, 2, 24)):
        for seed in range(3):  # whoever of the two is unknown
            made = by_response([*all_pairs("ann", 10), *all_pairs("bob", 10)], Shares(0.5, 0.7), seed, k)
            assert len(made.few_shot) == few and made.left_out == beyond
            assert len(made.valid) == len(known.valid) + held_out
            assert made.straddling == known.straddling + straddling
    users = set()
    for seed in range(9):  # bob's three pairs leave nothing to hold out: they are all held out, ann's are divided
        made = by_response([*all_pairs("ann", 10), *all_pairs("bob", 3)], Shares(0.5, 0.7), seed, 3)
        (known,) = {r["user"] for r in made.train}
        assert len(made.few_shot) == (0 if known == "ann" else 3)
        assert known == "bob" or sum(r["user"] == "bob" for r in made.valid) == 3
        users.add(known)
    assert users == {"ann", "bob"}


def test_which_responses_recur():
    def found(*votes):
        records = [dict(zip(("user", "prompt", "chosen", "rejected"), vote)) for vote in votes]
        return recurring(judged(parse_comparison(record, "f", "f")) for record in records)

    assert found(("ann", "p", "a", "b"), ("ann", "p", "c", "b ")) == "ann"  # read, b is the same
    assert found(("ann", "p", "a", "b"), ("ann", "p", "b", "a"), ("ann", "p", "a", "b")) is None  # one pair
    assert found(("ann", "p", "a", "b"), ("bob", "p", "a", "c"), ("ann", "q", "a", "c")) is None  # others
    assert found((None, "p", "a", "b"), (None, "p", "a", "c")) is None  # nobody knows whose
    assert found() is None


def test_a_file_of_votes_is_divided_by_response_unless_told_otherwise(tmp_path, call):
    votes = [{**r, "response": "no field", "prompt": f"Agree {i % 2}?"} for user in (0, "7", None)
             for i, r in enumerate(all_pairs(user, 12))]  # fmt: skip
    file, out = lines(tmp_path / "votes.jsonl", votes), tmp_path / "o"
    split_it = ("split", file, "--out", out, "--users", 1)
    status, text, err = call(data_command.main, *split_it)
    assert status == 0, err
    assert "divided by response: users judged one response in two different pairs, '0' for one, " in text
    record = json.loads((out / "split.json").read_text())
    assert (record["settings"]["by"], record["settings"]["groups"]) == ("response", 0.7)
    parts = [rows(out / f"{name}.jsonl") for name in ("train", "valid")]
    (straddling,) = [n for reason, n in record["left_out"].items() if "one response trained on" in reason]
    assert straddling and straddling + sum(map(len, parts)) == len(votes) == 3 * 66
    assert f"the other held out: {straddling}\n" in text and "warning" not in text
    judged_in = [{(r["user"], r["prompt"], r[side]) for r in part for side in ("chosen", "rejected")} for part in parts]
    assert not judged_in[0] & judged_in[1] and {r["user"] for r in parts[1]} == {"0", "7", None}
    _, text, _ = call(data_command.main, "check", out / "train.jsonl", out / "valid.jsonl")
    assert "judged by the same user in training: both | 0 | 0" in text and "split --by response" not in text
    assert "| valid.jsonl | own_record | 50.00% | 50.00% | 50.00% | 0 |" in text
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "is there already" in call(data_command.main, *split_it)[1]
    assert "is there already" in call(data_command.main, *split_it, "--by", "response", "--groups", 0.7)[1]
    status, _, err = call(data_command.main, *split_it, "--by", "prompt")
    assert status == 2 and "groups: 0.7 -> 0.9; by: 'response' -> 'prompt'" in err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert call(data_command.main, *split_it, "--by", "prompt", "--groups", 0.5, "--overwrite")[0] == 0
    assert {r["prompt"] for r in rows(out / "train.jsonl")} != {r["prompt"] for r in rows(out / "valid.jsonl")}


def test_a_split_by_prompt_of_before_is_there_already(tmp_path, call):
    records = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "user": "u"} for i in range(20)]
    split_it = ("split", lines(tmp_path / "mine.jsonl", records), "--out", tmp_path / "o", "--users", 1)
    text = call(data_command.main, *split_it)[1]
    assert "divided by prompt: no user judged one response in two different pairs" in text
    saved = tmp_path / "o" / "split.json"
    record = json.loads(saved.read_text())
    assert (record["settings"]["by"], record["settings"]["groups"]) == ("prompt", 0.9)
    assert not any("one response trained on" in reason for reason in record["left_out"])
    saved.write_text(json.dumps({**record, "settings": {**record["settings"], "by": None}}))
    for said in ((), ("--by", "prompt")):
        assert "is there already" in call(data_command.main, *split_it, *said)[1]


def test_one_pair_cannot_be_divided_by_response(tmp_path, call):
    file = lines(tmp_path / "one.jsonl", all_pairs("ann", 2))
    status, _, err = call(data_command.main, "split", file, "--out", tmp_path / "o", "--by", "response", "--users", 1)
    assert status == 2 and "0 comparisons would be trained on and 1 held out" in err
    status, _, err = call(data_command.main, "split", file, "--out", tmp_path / "o", "--groups", 1.5)
    assert status == 2 and "--groups: found 1.5" in err
