"""What is said of a file's users whom a run does not know, and of a file without users."""

import json

import pytest

from prlhf.config.keys import DataConfig
from prlhf.config.load import load_config
from prlhf.data import __main__ as data_command
from prlhf.data.names import ALIKE
from prlhf.data.unknown import alike, check_users, users_fields, without_users
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.generate.asked import asked_names
from prlhf.store.runs import open_run

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
KNOWN = UserIndex(["Alice", "bob", "7", "Straße"])
ANY, NEW = DataConfig(), DataConfig(new_users=True)


def written(path, *records):
    path.write_text("".join(json.dumps({**PAIR, **record}) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "name, near", [("alice", "Alice"), ("Al\u200bice", "Alice"), ("b ob", "bob"), ("007", "7"), ("\uff37\uff17", None), ("STRASSE", "Straße"), ("8", None), ("", None)]
)  # fmt: skip
def test_names_that_people_do_not_tell_apart(name, near):
    assert KNOWN.near([name]) == ({name: near} if near else {})
    with pytest.raises(UserError, match=f"did you mean '{near}'" if near else "is not known to this model; expected"):
        KNOWN.required_number(name)


def test_unknown_users_are_counted_and_those_near_to_known_ones_named():
    names = ["Alice", "alice", "alice", "b\u200bob", "eve", None, "bob"]
    assert check_users("F", names, KNOWN, ANY) == (
        "F: users who are not known: 3 ('alice', 'b\\u200bob', 'eve'), with 4 of 7 comparisons; "
        f"known but for {ALIKE}: 'alice' (known: 'Alice'), 'b\\u200bob' (known: 'bob')"
    )
    assert check_users("F", ["7", *"abcd"], KNOWN, ANY, "prompt") == (
        "F: users who are not known: 4 ('a', 'b', 'c', ...), with 4 of 5 prompts"
    )
    assert check_users("F", ["Alice", None, "bob"], KNOWN, ANY) is None


def test_a_file_of_new_users_alone_is_refused_unless_asked_for():
    with pytest.raises(UserError) as error:
        check_users("F", ["alice", "eve", None], KNOWN, ANY)
    for part in ("F: users who are not known: 2", "2 of 3", "'alice' (known: 'Alice')", "the 4 known users ('Alice', "):
        assert part in str(error.value)
    assert str(error.value).endswith("or data.new_users=true for a file of new users")
    assert check_users("F", ["alice", "eve", None], KNOWN, NEW).startswith(
        "F: users who are not known: 2 ('alice', 'eve')"
    )
    assert check_users("F", ["alice"], UserIndex([]), ANY) is None  # a vanilla run of comparisons without users


WORKERS = [{"worker_id": 3, "batch": "x", "note": "n1"}, {"worker_id": 4, "batch": "y", "note": "n2"}] * 2


@pytest.mark.parametrize(
    "records, named, recurring",
    [
        (WORKERS, ["worker_id"], ["worker_id", "batch", "note"]),
        ([{**r, "worker_id": "long " * 20} for r in WORKERS], [], ["batch", "note"]),
        ([{"AnnotatorID": "a"}, {"User": "b", "user_prompt": "c"}], ["AnnotatorID", "User"], []),
        ([{"user": "", "batch": str(i), "data": {"user": "x"}} for i in range(4)], [], []),
        ([{"user": None, "judge_model": "m"}] * 3, [], []),
    ],
)
def test_fields_that_may_name_the_user(tmp_path, records, named, recurring):
    path = written(tmp_path / "f.jsonl", *records)
    assert users_fields(path, ANY)[:2] == (named, recurring)
    said = without_users(path, ANY)
    assert said.startswith(f"{path}: no comparison has a user, in the field 'user'")
    assert all(repr(name) in said for name in named or recurring)
    if named:
        with pytest.raises(UserError, match=f"'{named[0]}'.* or data.new_users=true for a file without"):
            check_users(path, [None] * len(records), KNOWN, ANY)
        assert check_users(path, [None] * len(records), KNOWN, NEW) == said
    else:  # a file for the generic user
        assert check_users(path, [None] * len(records), KNOWN, ANY) == said
    assert check_users(path, [None] * len(records), UserIndex([]), ANY) is None


def test_a_file_whose_users_are_all_null_is_for_the_generic_user(tmp_path):
    """Whatever its other fields are called."""
    path = written(tmp_path / "f.jsonl", *[{"user": None, "author": name} for name in ("ann", "ben")])
    assert "'author'" in check_users(path, [None, None], KNOWN, ANY)


def test_users_of_one_file_that_look_the_same():
    assert alike("F", ["bob", "Bob", "eve", None, "BOB", "Bob"]) == (
        f"F: different users whose names differ only in {ALIKE}: 'BOB' and 'Bob' and 'bob'"
    )
    assert alike("F", ["bob", "eve", None]) is None
    assert alike("F", [*"abcde", *"ABCDE"]).endswith("'A' and 'a', 'B' and 'b', 'C' and 'c' (and 2 more)")


@pytest.mark.parametrize(
    "text, names",
    [
        ("ann,bob,generic", ["ann", "bob", "generic"]),
        (" ann , bob", ["ann", "bob"]),
        ('"Smith, John",bob', ["Smith, John", "bob"]),
        ('bob, "Smith, John"', ["bob", "Smith, John"]),
        ('"Bo ""B"", Jr."', ['Bo "B", Jr.']),
        ("1.0,1", ["1", "1"]),
        ("ann\nbob\n", ["ann", "bob"]),  # $(cat names)
    ],
)
def test_asked_names_are_a_row_of_csv(text, names):
    assert asked_names(text, UserIndex(["ann", "bob", "Smith, John", 'Bo "B", Jr.', "1"])) == names


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "Smith, John",
            """--users Smith, John: a name with a comma stands in double quotes, as in --users '"Smith, John",bob'""",
        ),
        ("", "user '' is not known"),
        ("ann,,bob", "user '' is not known"),
        ('"Smith, Jon"', "user 'Smith, Jon' is not known to this model (did you mean 'Smith, John'?)"),
    ],
)
def test_asked_names_that_are_refused(text, message):
    with pytest.raises(UserError) as error:
        asked_names(text, UserIndex(["ann", "bob", "Smith, John"]))
    assert message in str(error.value)


def test_the_data_check_and_the_split_warn(call, tmp_path):
    train = written(tmp_path / "t.jsonl", *({"user": u, "prompt": p} for u in ("ann", "Ann", "bob") for p in "pqrst"))
    _, out, _ = call(data_command.main, "check", train, written(tmp_path / "v.jsonl", {"user": "BOB"}, {"user": "eve"}))
    assert f"warning: {train}: different users whose names differ only in {ALIKE}: 'Ann' and 'ann'\n" in out
    assert "v.jsonl: users who are not known: 2 ('BOB', 'eve')" in out and "'BOB' (known: 'bob')" in out
    bare = written(tmp_path / "b.jsonl", *({"worker": "w", "prompt": str(i)} for i in range(20)))
    _, out, _ = call(data_command.main, "check", train, bare)
    assert (
        f"warning: {bare}: no comparison has a user, in the field 'user'; fields that look like users: 'worker'" in out
    )
    status, out, _ = call(data_command.main, "split", bare, "--out", tmp_path / "o")
    assert status == 0 and f"warning: {bare}: no comparison has a user" in out and "'worker' (data.user_column" in out
    status, out, _ = call(
        data_command.main, "split", bare, "--out", tmp_path / "p", "--user-column", "worker", "--users", 1
    )
    assert status == 0 and "no comparison" not in out


def test_a_run_goes_on_whichever_way_new_users_are_asked_for(tmp_path):
    keys = ("model.family=llama", f"run_dir={tmp_path / 'run'}")
    run = open_run(load_config(None, keys), "x")
    run.begin(load_config(None, keys), overwrite=False)
    run.log({"step": 1})
    run.lock.close()
    open_run(load_config(None, (*keys, "data.new_users=true")), "x").lock.close()
    with pytest.raises(UserError, match="data.limit"):
        open_run(load_config(None, (*keys, "data.limit=5")), "x")
