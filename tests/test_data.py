import csv
import datetime
import gzip
import io
import json
import math
import sys
from decimal import Decimal

import pytest

from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import ComparisonFile, parse_comparison, read_comparisons, words
from prlhf.data.files import write_json_lines
from prlhf.data.users import UserIndex
from prlhf.errors import UserError

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b", "user": "u"}


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def read(tmp_path, content, name="f.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return read_comparisons(path)


def fault(tmp_path, content, name="f.jsonl"):
    with pytest.raises(UserError) as error:
        read(tmp_path, content, name)
    return str(error.value)


def test_plain_and_gzip_hold_the_same(tmp_path):
    content = lines(GOOD, {**GOOD, "user": None, "user_text": "I am old.", "extra": [1], "id": 7})
    found = read(tmp_path, content).comparisons
    assert found[1].user is None and found[1].user_text == "I am old." and found[1].id == "7"
    assert found[0].id == "f.jsonl:1" and found[0].user_text is None
    zipped = read(tmp_path, gzip.compress(content), "f.jsonl.gz").comparisons
    assert [c.prompt for c in zipped] == [c.prompt for c in found]


def test_empty_user_is_unknown_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    found = read(tmp_path, b"\xef\xbb\xbf" + lines({**GOOD, "user": ""}) + b"\n\n" + lines(GOOD)).comparisons
    assert [c.user for c in found] == [None, "u"]


def test_conversational_records(tmp_path):
    record = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    (c,) = read(tmp_path, lines(record)).comparisons
    assert c.prompt == ({"role": "user", "content": "hi"},) and (c.chosen, c.rejected) == ("yes", "no")


def test_which_response_came_first_is_kept_where_it_is_known(tmp_path):
    found = read(tmp_path, lines(*[{**GOOD, "first": f} for f in ("chosen", "rejected", None)], GOOD)).comparisons
    assert [c.first for c in found] == ["chosen", "rejected", None, None]


CSV = b'prompt,chosen,rejected,user,margin\r\n"say ""hi""","yes,\nmore",no,u1,\r\np,a,b,,2.5\r\n'


def test_csv_rows_are_comparisons(tmp_path):
    for name, content in (("f.csv", b"\xef\xbb\xbf" + CSV), ("f.csv.gz", gzip.compress(CSV))):
        one, other = read(tmp_path, content, name).comparisons
        assert (one.prompt, one.chosen, one.user, one.margin) == ('say "hi"', "yes,\nmore", "u1", 1.0)
        assert (other.user, other.user_text, other.margin, other.id) == (None, None, 2.5, f"{name}:4")


@pytest.mark.parametrize(
    "content, message",
    [
        (CSV + b"p,a,b\r\n", "line 5: found 3 cells, expected 5 as in the header"),
        (CSV + b"p,a,b,u,1,x\r\n", "line 5: found 6 cells, expected 5 as in the header"),
        (CSV + b"p,,b,u,1\r\n", "line 5: no field 'chosen'"),
        (CSV + b"p,a,b,u,many\r\n", "line 5, margin: expected a number"),
        (CSV + b'p,"a,b,u,1\r\n', "after line 4: not valid CSV"),
        (CSV + b"p,\xe9,b,u,1\r\n", "expected UTF-8, found byte 0xe9"),
        (b"prompt,chosen,rejected\r\n", "empty, expected a header"),
        (b"user,prompt,chosen,rejected,user\r\nu,p,a,b,v\r\n", "line 1: two columns are named 'user'"),
        (b"user,prompt,chosen,rejected, user\r\nu,p,a,b,v\r\n", "line 1: two columns are named 'user'"),
        (b"prompt,choosen,rejected\r\np,a,b\r\n", "line 2: no field 'chosen' (did you mean 'choosen'?)"),
    ],
)
def test_bad_csv_names_file_and_line(tmp_path, content, message):
    text = fault(tmp_path, content, "f.csv")
    assert str(tmp_path / "f.csv") in text and message in text


def test_a_gzipped_csv_file_has_no_two_columns_of_one_name_either(tmp_path):
    content = gzip.compress(b"prompt,chosen,chosen,user\r\np,a,b,u\r\n")
    assert "f.csv.gz, line 1: two columns are named 'chosen', expected each name once" in fault(
        tmp_path, content, "f.csv.gz"
    )


def test_names_of_csv_columns_are_stripped_and_empty_ones_ignored(tmp_path):
    """As a spreadsheet writes them; ` user` would be an unknown field, and every user unknown."""
    (c,) = read(tmp_path, b"prompt, chosen, rejected, user,,\r\np,a,b,u,,\r\n", "f.csv").comparisons
    assert (c.chosen, c.user) == ("a", "u")


def csv_of(**cells):
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([cells.keys(), cells.values()])
    return file.getvalue().encode()


def test_a_csv_cell_of_messages_is_read_as_messages(tmp_path):
    messages = [{"role": "user", "content": 'say "hi",\nnow'}]
    prompt, chosen = json.dumps(messages), json.dumps([{"role": "assistant", "content": "hi"}], indent=1)
    (c,) = read(tmp_path, csv_of(prompt=prompt, chosen=chosen, rejected="[no]"), "f.csv").comparisons
    assert (c.prompt, c.chosen, c.rejected) == (tuple(messages), "hi", "[no]")
    for text in (
        '[1] {"role"',
        "[{x: 'role'}]",
        'a list: [{"role": "user", "content": "x"}]',
        "{}",
    ):  # text, and only that
        (c,) = read(tmp_path, csv_of(prompt=text, chosen="a", rejected="b"), "f.csv").comparisons
        assert c.prompt == text


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    "cell, message",
    [
        (
            str(MESSAGES),
            "line 2, prompt: looks like messages, but is no JSON (Expecting property name",
        ),  # pandas, a list
        ("\n ".join(map(str, MESSAGES)).join("[]"), "line 3, prompt: looks like messages, but is no JSON"),  # numpy
        (json.dumps(MESSAGES[0]), "line 2, prompt: expected text or a list of {role, content} messages, found {"),
        ('[{"role": "user", "role": "user", "content": "x"}]', "no JSON (the field 'role' is given twice)"),
    ],
)
def test_a_csv_cell_that_only_looks_like_messages_is_refused(tmp_path, cell, message):
    assert message in fault(tmp_path, csv_of(prompt=cell, chosen="a", rejected="b"), "f.csv")


def test_a_parquet_file_has_no_two_columns_of_one_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    names = ["prompt", "chosen", "rejected", "user", "user"]
    parquet.write_table(pyarrow.table([pyarrow.array([name]) for name in names], names=names), tmp_path / "f.parquet")
    with pytest.raises(UserError, match="f.parquet: two columns are named 'user', expected each name once"):
        read_comparisons(tmp_path / "f.parquet")


def test_parquet_rows_are_comparisons(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    messages = [{"role": "user", "content": "hi"}]
    rows = [{**GOOD, "prompt": messages, "user": None}, {**GOOD, "prompt": messages, "chosen": "z"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    one, other = read_comparisons(tmp_path / "f.parquet").comparisons
    assert one.prompt == ({"role": "user", "content": "hi"},) and (one.user, other.user) == (None, "u")
    assert (other.chosen, other.id) == ("z", "f.parquet:2")
    for column, value in (("prompt", b"x"), ("user", datetime.date(2020, 1, 1)), ("margin", Decimal("1.5"))):
        parquet.write_table(pyarrow.Table.from_pylist([{**GOOD, column: value}]), tmp_path / "h.parquet")
        with pytest.raises(UserError, match=f"h.parquet, row 1, {column}: expected"):
            read_comparisons(tmp_path / "h.parquet")
    damaged = (tmp_path / "f.parquet").read_bytes()[:-20]
    assert "not a whole parquet file" in fault(tmp_path, damaged, "f.parquet")
    rows = [{"prompt": "p", "chosen": "a", "user": "u"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "g.parquet")
    with pytest.raises(UserError, match="g.parquet, row 1: no field 'rejected'"):
        read_comparisons(tmp_path / "g.parquet")


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'prlhf[parquet]'" in fault(tmp_path, b"PAR1", "f.parquet")


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


@pytest.mark.parametrize(
    "prompt",
    [{}, {"prompt": "hi"}, {"prompt": chat("hi")}],
    ids=["implicit", "the last message beside it", "the messages beside it"],
)
def test_whole_conversations_are_split_where_they_part(tmp_path, prompt):
    record = {**prompt, "chosen": chat("hi", "yes"), "rejected": chat("hi", "no"), "user": "u"}
    (c,) = read(tmp_path, lines(record)).comparisons
    assert (c.prompt, c.chosen, c.rejected) == (({"role": "user", "content": "hi"},), "yes", "no")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"chosen": chat("hi", "yes"), "rejected": chat("ho", "no")}, "no field 'prompt'"),
        ({"prompt": "hey", "chosen": chat("hi", "yes"), "rejected": chat("hi", "no")}, "list of one assistant message"),
        ({"chosen": "yes", "rejected": "no"}, "no field 'prompt'"),
    ],
)
def test_conversations_that_do_not_agree_are_refused(tmp_path, record, message):
    assert message in fault(tmp_path, lines(record))


def test_another_column_may_name_the_user(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(lines({**GOOD, "annotator": 7.0}, {**GOOD, "annotator": "x"}, {**GOOD, "user": 8}))
    found = read_comparisons(path, DataConfig(user_column="annotator")).comparisons
    assert [c.user for c in found] == ["7", "x", None]
    assert [c.user for c in read_comparisons(path).comparisons] == [GOOD["user"], GOOD["user"], "8"]
    with pytest.raises(
        UserError, match="no record has the field data.user_column: 'anotator' .did you mean 'annotator'"
    ):
        read_comparisons(path, DataConfig(user_column="anotator"))


def test_chosen_attributes_make_the_user_text(tmp_path):
    path = tmp_path / "f.jsonl"
    about = {"age": "30", "city": "Rome", "job": ""}
    path.write_bytes(lines({**GOOD, "user_text": "all", "attributes": about}, {**GOOD, "user_text": "all"}))

    def texts(*names):
        config = DataConfig(attributes=names) if names else DataConfig()
        return [c.user_text for c in read_comparisons(path, config).comparisons]

    assert texts() == ["all", "all"]
    assert texts("city", "age") == ["city: Rome\nage: 30", None] and texts("job") == [None, None]
    with pytest.raises(UserError, match="no record has the attribute 'agee' of data.attributes .did you mean 'age'"):
        texts("agee")
    path.write_bytes(lines({**GOOD, "attributes": {"age": 30}}))
    with pytest.raises(UserError, match="line 1, attributes: expected texts by name"):
        texts("age")


def test_words_are_what_white_space_separates():
    assert [words(text) for text in ("", " a\n b-c\td ", "one")] == [0, 3, 1]


def test_equal_responses_are_counted_not_kept(tmp_path):
    file = read(tmp_path, lines(GOOD, {**GOOD, "rejected": "a"}))
    assert (len(file.comparisons), file.equal_responses) == (1, 1)


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["empty"]),
        (b"\n \n", ["empty"]),
        (lines(GOOD) + b'{"prompt": "p", "chos', ["line 2", "not valid JSON"]),
        (lines(GOOD) + b"[1]\n", ["line 2", "expected a JSON object"]),
        (lines(GOOD) + b'{"n": ' + b"1" * 5000 + b"}\n", ["line 2", "not readable as JSON"]),
        (lines(GOOD) + b"[" * 100_000, ["line 2", "not"]),
        (
            lines(GOOD) + lines(GOOD).replace(b'{"prompt"', b'{"user": "v", "prompt"'),
            ["line 2", "the field 'user' is given twice"],
        ),
        (b'{"prompt": "\\uD800", "chosen": "a", "rejected": "b"}\n', ["line 1", "half of a surrogate pair"]),
        (lines(GOOD) + b'{"prompt": "caf\xe9"}\n', ["line 2", "expected UTF-8", "0xe9"]),
        (lines(GOOD, {"prompt": "p", "choosen": "a", "rejected": "b"}), ["line 2", "no field 'chosen'", "'choosen'"]),
        (lines({**GOOD, "prompt": ""}), ["line 1, prompt", "expected text"]),
        (lines({**GOOD, "prompt": [{"role": "user"}]}), ["line 1, prompt", "{role, content}"]),
        (lines({**GOOD, "chosen": None}), ["line 1, chosen", "found null"]),
        (lines({**GOOD, "rejected": ["x", "y"]}), ["line 1, rejected", "one assistant message"]),
        (lines({**GOOD, "user": 7.5}), ["line 1, user", "expected a string, a whole number or null, found 7.5"]),
        (lines({**GOOD, "user": "generic"}), ["line 1, user", "unknown user"]),
        (lines({**GOOD, "user_text": ["x"]}), ["line 1, user_text"]),
        (lines({**GOOD, "first": "left"}), ["line 1, first", "'chosen', 'rejected' or null", 'found "left"']),
        (lines({**GOOD, "first": ["chosen"]}), ["line 1, first", 'found ["chosen"]']),
        (lines({**GOOD, "rejected": "a"}), ["two different responses"]),
    ],
)
def test_bad_files_name_file_line_and_field(tmp_path, content, parts):
    text = fault(tmp_path, content)
    assert str(tmp_path / "f.jsonl") in text
    for part in parts:
        assert part in text


def test_a_missing_file_names_a_near_one(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(UserError, match=r"trian.jsonl: no such file \(did you mean 'train.jsonl'"):
        read_comparisons(tmp_path / "trian.jsonl")


def test_a_folder_is_no_file_and_names_those_in_it(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: is a folder, expected a file$"):
        read_comparisons(tmp_path)
    for name in ("valid.jsonl", "train.jsonl", ".hidden"):
        (tmp_path / name).write_bytes(lines(GOOD))
    with pytest.raises(UserError, match="is a folder, expected one of those in it: train.jsonl, valid.jsonl$"):
        read_comparisons(tmp_path)


@pytest.mark.parametrize("cut", [20, 60])
def test_a_truncated_gzip_file(tmp_path, cut):
    whole = gzip.compress(lines(*[{**GOOD, "id": str(i * 7919)} for i in range(500)]))
    assert "truncated or damaged gzip" in fault(tmp_path, whole[: -len(whole) * cut // 100], "f.jsonl.gz")


def test_not_gzip_at_all(tmp_path):
    assert "truncated or damaged gzip" in fault(tmp_path, lines(GOOD), "f.jsonl.gz")


def comparisons(*users):
    return [parse_comparison({**GOOD, "user": u}, "f", "i") for u in users]


def test_users_rank_by_comparisons_then_name():
    index = UserIndex.from_comparisons(comparisons("c", "b", "a", "b", None, "c", "d"), known_users=3)
    assert index.names == ("b", "c", "a")
    assert [index.number(u) for u in ("b", "c", "a", "d", None, "")] == [1, 2, 3, 0, 0, 0]


@pytest.mark.parametrize(
    "spellings",
    [
        [1, 1.0, "1", "1.0", " 1\n", "1.00"],
        [1000, 1000.0, 1e3],
        [0, 0.0, -0.0, "0.0"],
        [-2, "-2.0"],
        [2**53 - 1, float(2**53 - 1), "9007199254740991.0"],
        ["Zoë", "Zoe\u0308", "\xa0Zoë "],
        ["007"],
        ["1e3"],
        ["7.5"],
        ["1.0.0"],
        ["Ann"],
        ["ann"],
    ],
)
def test_a_user_has_one_name_however_it_is_spelt(spellings):
    """pandas writes a column of whole numbers as floats where one of them is missing."""
    first = spellings[0] if isinstance(spellings[0], str) else str(spellings[0])
    assert {c.user for c in comparisons(*spellings)} == {first}
    index = UserIndex([first])
    assert all(index.number(s) == index.required_number(s) == 1 for s in spellings if isinstance(s, str))


def test_fields_that_are_nan_are_not_there(tmp_path):
    """As json.dumps writes what pandas has where there is nothing."""
    nothing = dict.fromkeys(("user", "user_text", "id", "margin", "first"), math.nan)
    (c,) = read(tmp_path, lines({**GOOD, **nothing})).comparisons
    assert c == parse_comparison({**GOOD, "user": None}, "f", "f.jsonl:1")
    assert "line 1: no field 'chosen'" in fault(tmp_path, lines({**GOOD, "chosen": math.nan}))


def test_no_name_is_the_unknown_user():
    assert [c.user for c in comparisons(None, "", " \t", math.nan)] == [None] * 4
    with pytest.raises(UserError, match="f, user: expected a string, a whole number or null, found Infinity"):
        comparisons(math.inf)


@pytest.mark.parametrize(
    "name", [1.2345678901234568e17, "1.2345678901234568e+17", float(2**53), "9007199254740993.0", "1.23E+05"]
)
def test_a_number_that_lost_its_last_digits_names_nobody(name):
    """Two users would be one: 2**53 + 1 and 2**53 are the same float."""
    with pytest.raises(UserError, match="f, user: .* is a number without its last digits"):
        comparisons(name)


@pytest.mark.parametrize("name", [str(math.nan), str(None), " <NA>", "null"])
def test_the_text_for_no_name_names_nobody(name):
    """pandas' astype(str) makes one user "nan" of all unknown ones."""
    with pytest.raises(UserError, match=f"f, user: '{name.strip()}' is what programs write where there is no name"):
        comparisons(name)


def test_an_index_of_an_earlier_version_is_found_by_the_names_of_today():
    index = UserIndex(["1.0", " Zoe\u0308", "2", "2.0"])
    assert [index.number(name) for name in ("1", "1.0", "Zoë", " Zoe\u0308", "2", "2.0")] == [1, 1, 2, 2, 3, 4]
    assert index.names == ("1.0", " Zoe\u0308", "2", "2.0")


def test_users_without_data_are_not_known():
    index = UserIndex(["a", "b", "c"]).with_data(comparisons("c", "a", None, "x"))
    assert index.names == ("a", "c") and index.number("b") == 0


def test_written_lines_read_back_plain_and_gzipped(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_json_lines(tmp_path / "new" / name, [GOOD, GOOD])
        assert len(read_comparisons(tmp_path / "new" / name).comparisons) == 2


def test_user_index_survives_the_disk(tmp_path):
    index = UserIndex(["Zoë", "x y"])
    index.save(tmp_path / "users.json")
    assert UserIndex.load(tmp_path / "users.json").names == index.names
    (tmp_path / "users.json").write_text("{")
    with pytest.raises(UserError, match="no user index"):
        UserIndex.load(tmp_path / "users.json")


def test_an_unknown_name_is_refused_with_a_near_match():
    index = UserIndex(["alice", "bob"])
    assert (index.required_number("generic"), index.required_number("bob")) == (0, 2)
    with pytest.raises(UserError, match="'alcie' is not known.*did you mean 'alice'"):
        index.required_number("alcie")


def test_sample_is_seeded_ordered_and_without_repeats():
    file = ComparisonFile([parse_comparison({**GOOD, "id": i}, "f", "i") for i in range(100)], 2)

    def ids(limit, seed):
        return [int(c.id) for c in file.sample(limit, seed).comparisons]

    one, again, other = (ids(10, seed) for seed in (1, 1, 2))
    assert one == again != other and one == sorted(set(one)) and len(one) == 10
    assert ids(None, 0) == ids(100, 0) == ids(900, 0) == list(range(100))
    assert file.sample(10, 1).equal_responses == 2
