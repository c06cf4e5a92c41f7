"""`python -m prlhf.data check` as a person uses it, on two files of which every number is counted by hand."""

import gzip
import json

import pytest

from prlhf.data.__main__ import main

A, B, C = "one two three", "four five", "six"  # 3, 2, 1 words; 13, 9, 3 bytes
P, Q, R = "tell me", "and you there", "why"  # 2, 3, 1 words; 7, 13, 3 bytes


def vote(name, user, prompt, chosen, rejected, **extra):
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected, "user": user, **extra}


TRAIN = [
    vote("t1", "ann", P, A, B),
    vote("t2", "ann", P, A, B),  # a duplicate
    vote("t3", "ann", P, B, A),  # a contradiction
    vote("t4", "bob", P, B, A),  # bob differs from ann
    vote("t5", "bob", Q, "x y", "z"),
    vote("t6", None, P, A, C, user_text="old"),
    vote("t7", "cid", P, A, A),  # left out
]
VALID = [
    vote("v1", "ann", P, A, B),  # ann's own pair
    vote("v2", "cid", P, B, C),  # known responses, a new pair
    vote("v3", "dee", R, "x y", "z"),  # a new prompt: the responses are new under it
    vote("v4", None, Q, "z", "w"),
]


@pytest.fixture
def check(call):
    """Run the command on files; its exit status and what it wrote to stdout and stderr."""
    return lambda *arguments: call(main, "check", *arguments)


@pytest.fixture
def train(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in TRAIN))
    return path


@pytest.fixture
def valid(tmp_path):
    path = tmp_path / "valid.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in VALID).encode()))
    return path


def rows(out):
    """All rows of all tables."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in out.splitlines() if line[:1] == "|"]


def warnings(out):
    return [line for line in out.splitlines() if line.startswith("warning:")]


def test_what_is_in_the_files(check, train, valid):
    status, out, err = check(train, valid)
    assert (status, err) == (0, "")
    found = {row[0]: row[1:] for row in rows(out) if len(row) == 3}
    assert found == {
        "": ["train.jsonl", "valid.jsonl.gz"],
        "comparisons": ["6", "4"],
        "pairs of equal responses, left out": ["1", "0"],
        "prompts": ["2", "3"],
        "distinct pairs": ["3", "4"],
        "comparisons with user_text": ["1", "0"],
        "users": ["2", "3"],
        "known users": ["2", "1"],
        "unknown users": ["0", "2"],
        "comparisons of known users": ["5", "1"],
        "comparisons of unknown users": ["0", "2"],
        "comparisons without a user": ["1", "1"],
    }
    assert ["train.jsonl", "2", "2.5", "3", "ann (3), bob (2)"] in rows(out)
    assert ["valid.jsonl.gz", "1", "1", "1", "ann (1), cid (1), dee (1)"] in rows(out)


def test_votes_that_repeat_and_contradict(check, train, valid):
    _, out, _ = check(train, valid)
    # {A, B} has two votes each way, the other two pairs one vote: a user-blind model gets at most 2 + 1 + 1 of 6 right.
    assert ["train.jsonl", "1", "1", "1", "1", "1", "66.67%"] in rows(out)
    assert ["valid.jsonl.gz", "0", "0", "0", "0", "0", "100.00%"] in rows(out)


def test_a_contradiction_is_seen_through_white_space_and_without_users(check, tmp_path):
    """Three votes on one pair, 2:1, so two of three are the majority's; with users ann contradicts herself."""
    path = tmp_path / "f.jsonl"
    choices = [("yes", "no"), ("no ", "yes"), ("yes ", "no")]
    own_warning = "a user's votes for both responses of the same pair: 1, e.g. 'ann' in comparison 0"
    for user, own in (("ann", ["1", "1", "0"]), (None, ["0", "0", "0"])):  # duplicates, contradictions, disputes
        records = [vote(str(i), user, f"{P}{' ' * i}", *choice) for i, choice in enumerate(choices)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        _, out, _ = check(path)
        assert ["f.jsonl", *own, "1", "1", "66.67%"] in rows(out)
        assert {row[0]: row[1] for row in rows(out) if len(row) == 2}["distinct pairs"] == "1"
        assert (own_warning in out) == bool(user)


def test_leaks_between_the_files(check, train, valid):
    _, out, _ = check(train, valid)
    assert [row[2:] for row in rows(out) if row[:2] == ["valid.jsonl.gz", "train.jsonl"]] == [
        ["prompts", "2", "3", "75.00%", "v1"],  # P and Q: v1, v2, v4
        ["prompts with a response", "4", "3", "75.00%", "v1"],  # P with A, B, C, and Q with z
        ["pairs", "1", "1", "25.00%", "v1"],
        ["pairs judged by the same user", "1", "1", "25.00%", "v1"],
        ["responses judged by the same user in training: both", "2", "1", "25.00%", "v1"],  # ann's A and B
        ["responses judged by the same user in training: one", "0", "0", "0.00%", "-"],
    ]


def test_a_leak_is_seen_through_white_space_unicode_and_form_and_between_held_out_files(check, train, tmp_path):
    paths = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    paths[0].write_text(json.dumps(vote("1", "zoe", "Un caf\u00e9?", "oui", "non  merci")) + "\n")
    message = [{"role": "user", "content": "Un  cafe\u0301? "}]
    paths[1].write_text(json.dumps(vote("2", "zoe", message, "non merci ", "oui")) + "\n")
    _, out, _ = check(train, *paths)
    shared = {row[2]: row[3:] for row in rows(out) if row[:2] == ["two.jsonl", "one.jsonl"]}
    assert shared["pairs judged by the same user"] == shared["pairs"] == ["1", "1", "100.00%", "2"]
    assert f"warning: {paths[1]}: comparisons of pairs that are also in {paths[0]}: 1 (100.00%), e.g. 2" in out


def test_lengths_in_words(check, train, valid):
    _, out, _ = check(train, valid)
    # 95th percentile of six numbers: three quarters of the way from the fifth to the sixth in order.
    assert ["train.jsonl", "prompt", "2.2", "2", "2.8", "3"] in rows(out)  # 2 2 2 2 2 3
    assert ["train.jsonl", "chosen", "2.5", "2.5", "3", "3"] in rows(out)  # 2 2 2 3 3 3
    assert ["train.jsonl", "rejected", "2", "2", "3", "3"] in rows(out)  # 1 1 2 2 3 3
    assert ["train.jsonl", "66.67%", "0.00%", "33.33%"] in rows(out)  # longer: t1 t2 t5 t6
    assert ["valid.jsonl.gz", "75.00%", "25.00%", "0.00%"] in rows(out)


def test_what_trivial_rules_get_right(check, train, valid):
    _, out, _ = check(train, valid)
    # v1 is a known user's, v2 v3 v4 are not. In training ann chose the longer response 2:1, all users 4:2, bob 1:1.
    # Shares: A (3+1)/(3+2+2) = 4/7, B 3/6, C 1/3, z under Q 1/3, w and everything under R 1/2.
    assert [row[1:] for row in rows(out) if row[0] == "valid.jsonl.gz" and row[-1] in "013" and len(row) == 6][-5:] == [
        ["longer", "87.50%", "100.00%", "83.33%", "3"],  # 1, 1 1 .5
        ["own_length", "87.50%", "100.00%", "83.33%", "3"],  # the same
        ["pair_majority", "50.00%", "50.00%", "50.00%", "0"],  # {A, B} is even, the rest new
        ["response_share", "62.50%", "100.00%", "50.00%", "3"],  # 1, 1 .5 0
        ["own_record", "62.50%", "100.00%", "50.00%", "1"],  # ann's A +1, B -1; the others judged nothing
    ]
    # In-sample: t1 t2 t5 t6 are the longer ones, t6 is nobody's.
    assert ["train.jsonl *", "longer", "66.67%", "60.00%", "100.00%", "6"] in rows(out)
    assert "in-sample" in out and "| first |" not in out


def test_the_first_response_is_a_rule_where_the_file_says_which(check, tmp_path):
    path = tmp_path / "f.jsonl"
    records = [vote(str(i), "ann", P, A, B, first=first) for i, first in enumerate(["chosen", "chosen", "rejected"])]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert ["f.jsonl *", "first", "66.67%", "66.67%", "-", "3"] in rows(check(path)[1])


def test_warnings(check, train, valid):
    _, out, _ = check(train, valid)
    assert warnings(out) == [
        f"warning: {train}: known users with fewer than 5 comparisons: 2 of 2, e.g. 'ann'",
        f"warning: {train}: a user's votes for both responses of the same pair: 1, e.g. 'ann' in comparison t1",
        f"warning: {valid}: comparisons of responses judged by the same user in training: 1 (25.00%; of known users' "
        "100.00%), e.g. v1; a rule that only remembers each user's own record (own_record) is right on 100.00% of them. "
        "`python -m prlhf.data split --by response` divides without this",
        f"warning: {valid}: comparisons of pairs that are also in the training file: 1 (25.00%), e.g. v1",
    ]


def statements(name, user, chosen, rejected):
    return vote(name, user, "Which do you agree with?", f"yes to {chosen}", f"no to {rejected}")


def test_pairs_of_the_same_votes_on_both_sides_are_warned_of(check, tmp_path):
    """Each voter agreed with a, b, c and disagreed with d, e, f: nine pairs, three of them, of no pair in training, held out.

    Of each response two pairs are left in training: a, b, c +2, the others -2. The rule is always right.
    """
    pairs = [(user, good, bad) for user in ("ann", "bob") for good in "abc" for bad in "def"]
    held_out = {"ad", "be", "cf"}
    files = {"train.jsonl": [p for p in pairs if p[1] + p[2] not in held_out],
             "valid.jsonl": [p for p in pairs if p[1] + p[2] in held_out]}  # fmt: skip
    files["valid.jsonl"] += [("ann", "a", "z"), ("cid", "a", "d")]  # z is new to ann, and all is to cid
    for name, votes in files.items():
        lines = [json.dumps(statements(f"{name[0]}{i}", *one)) + "\n" for i, one in enumerate(votes)]
        (tmp_path / name).write_text("".join(lines))
    _, out, _ = check(tmp_path / "train.jsonl", tmp_path / "valid.jsonl")
    found = {row[2]: row[3:] for row in rows(out) if row[:2] == ["valid.jsonl", "train.jsonl"]}
    both = found["responses judged by the same user in training: both"]
    assert both == ["12", "6", "75.00%", "v0"]  # two users' six responses
    assert found["responses judged by the same user in training: one"] == ["1", "1", "12.50%", "v6"]
    assert ["valid.jsonl", "own_record", "93.75%", "100.00%", "50.00%", "7"] in rows(out)  # 7 right, cid's a tie
    (warning,) = [line for line in warnings(out) if "judged by the same user" in line]
    assert "in training: 7 (87.50%; of known users' 100.00%), e.g. v0; " in warning
    assert "is right on 100.00% of them" in warning


def test_a_file_with_nothing_to_warn_of_and_files_of_one_name(check, tmp_path):
    paths = [tmp_path / name / "f.jsonl" for name in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        text = f"{path.parent.name} {A}"
        path.write_text("".join(json.dumps(vote(str(i), "ann", f"{text} {i}", text, B)) + "\n" for i in range(5)))
    _, out, _ = check(*paths)
    assert not warnings(out) and "No warnings." in out
    assert ["comparisons", "5", "5"] in rows(out) and ["", *map(str, paths)] in rows(out)
    assert ["comparisons", "5"] in rows(check(paths[0])[1])  # without held-out files


def test_no_users_at_all(check, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(vote("1", None, P, A, B)) + "\n")
    status, out, _ = check(path)
    assert status == 0 and ["f.jsonl", "-", "-", "-", ""] in rows(out)
    assert warnings(out) == [f"warning: {path}: no comparison has a user, in the field 'user'"]
    assert ["f.jsonl *", "own_length", "100.00%", "-", "100.00%", "1"] in rows(out)


def test_a_config_tells_what_becomes_tokens_and_who_is_known(check, train, valid):
    status, out, _ = check(train, valid, "--config", "tiny", "--set", "data.known_users=1")
    # The byte tokenizer, without BOS; each response has an EOS. t1 to t4: 7 + 14 + 10 = 31 tokens, t5: 13 + 4 + 2 = 19,
    # t6: "old\n" 4 + 7 + 14 + 4 = 29: 172 in all, 28.67 on average.
    assert status == 0
    summary = "6 comparisons, 1 equal responses dropped, 172 tokens"
    assert ["train.jsonl", summary, "28.7", "31", "31", "31"] in rows(out)
    assert ["known users", "1", "1"] in rows(out) and ["comparisons of unknown users", "2", "2"] in rows(out)
    assert "Known users: 1 of the 2 in the training file" in out
    assert "known users with fewer than 5 comparisons: 1 of 1" in out


@pytest.mark.parametrize(
    "overrides, warning",
    [
        # Beside the longer response 6 tokens are left for the 7 of P (t6: 2), and 16 for the 13 of Q.
        (["data.max_tokens=20"], "83.33% of 6 comparisons are dropped"),
        (["data.max_prompt_tokens=10", "data.min_prompt_tokens=4"], "16.67% of 6 comparisons lose part of the prompt"),
        (["data.max_user_text_tokens=3"], "16.67% of 6 comparisons lose part of the user text"),
    ],
)
def test_much_dropped_or_cut_is_warned_of(check, train, overrides, warning):
    status, out, _ = check(train, "--config", "tiny", "--set", *overrides)
    assert status == 0 and f"warning: {train}: {warning}" in out


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["{folder}/trian.jsonl"], ["trian.jsonl: no such file", "did you mean 'train.jsonl'"]),
        (["{folder}/train.jsonl", "{folder}/bad.jsonl"], ["bad.jsonl, line 2", "not valid JSON"]),
        (["{folder}/left.jsonl"], ["left.jsonl, line 1, first", 'found "left"']),
        (["{folder}/train.jsonl", "--config", "tinny"], ["config 'tinny' not found"]),
        (["{folder}/train.jsonl", "--config", "tiny", "--set", "data.known_user=3"], ["'data.known_users'"]),
        (["{folder}/train.jsonl", "--config", "tiny", "--set", "model.family=null", "model.name=no/such"], ["model 'no/such'"]),
        (["{folder}/train.jsonl", "--config", "tiny", "--set", "data.max_tokens=4"], ["data.max_tokens: found 4", "none of 6"]),
        (["{folder}/train.jsonl", "--set", "data.known_users=3"], ["--set data.known_users=3", "--config"]),
        ([], ["FILE"]),
    ],
)  # fmt: skip
def test_bad_input(check, train, tmp_path, arguments, parts):
    (tmp_path / "bad.jsonl").write_text(json.dumps(TRAIN[0]) + '\n{"prompt": "p", "chos\n')
    (tmp_path / "left.jsonl").write_text(json.dumps({**TRAIN[0], "first": "left"}) + "\n")
    status, _, err = check(*(argument.format(folder=tmp_path) for argument in arguments))
    assert status == 2 and "Traceback" not in err
    for part in parts:
        assert part in err, err
