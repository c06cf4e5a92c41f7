"""The papers' data sets: their readers on hand-written files in the raw form (tests/raw), splits, configs, commands."""

import json
import operator
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from prlhf.config import load as config_module
from prlhf.config.keys import KEYS, Config
from prlhf.data import __main__ as data_command
from prlhf.data.sets import multipref, persona, prepare, prism, psoups, tldr
from prlhf.data.sets.raw import Options
from prlhf.data.sets.splits import Shares, split, with_few_shot
from prlhf.errors import UserError
from prlhf.evaluate import __main__ as evaluate
from prlhf.generate import __main__ as generate
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "tests" / "raw"
DOG = "My dog barks at the neighbours all night and they complain every morning. What should I do?"
CAR = "The car that I bought last week makes a noise like a small bird whenever it rains."


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def persona_raw(tmp_path_factory):
    """The raw parquet file of PERSONA, of the rows in tests/raw/persona."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("persona")
    parquet.write_table(pyarrow.Table.from_pylist(rows(RAW / "persona" / "rows.jsonl")), folder / "train-00000.parquet")
    return folder


def changed(tmp_path, name: str, file: str, old: str, new: str) -> Path:
    """A copy of a raw folder in which a text occurs that should not."""
    folder = tmp_path / "raw"
    shutil.copytree(RAW / name, folder)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder


# TL;DR


def test_tldr_keeps_supervised_policies_and_ranks_workers_by_their_training_comparisons():
    found = tldr.read(RAW / "tldr", Options(known_users=2))
    train, valid, pool = found.official
    assert Counter(r["user"] for r in train) == {"anna": 4, "bert": 3} and {r["user"] for r in pool} == {"cleo"}
    assert Counter(r["user"] for r in valid) == {"anna": 1, "bert": 1, "cleo": 1, "zoe": 3}
    assert [count.found for count in found.counts] == [10, 7, 8, 7, 2, 4]  # one of the 7 has no post
    assert found.dropped == {"of other policies": 2, "without a post": 1, "with equal summaries": 1}
    # files in the order of their numbers, not of their names
    assert [r["id"] for r in train[:4]] == ["batch3:1", "batch3:2", "batch3:3", "batch12:1"]


def test_tldr_prompts_and_responses_by_hand():
    train, _, pool = tldr.read(RAW / "tldr", Options(known_users=2)).official
    assert train[0]["prompt"] == f"SUBREDDIT: r/relationships\nTITLE: Tired of the neighbours\nPOST: {DOG}\nTL;DR:"
    assert train[0]["chosen"] == " Dog barks at night, neighbours complain." and train[0]["rejected"] == " Dog."
    assert train[1]["chosen"].startswith(" Dog barks all night")  # choice 1
    without_keys = pool[0]  # no title, no subreddit; a text that does not begin with a space
    assert without_keys["prompt"] == f"SUBREDDIT: r/\nTITLE: \nPOST: {CAR}\nTL;DR:"
    assert (without_keys["chosen"], without_keys["rejected"]) == (" A noise.", " Car sings in the rain.")


def test_tldr_length_gives_each_worker_one_preference_and_drops_ties():
    found = tldr.read_length(RAW / "tldr", Options(known_users=2))
    draws = np.random.RandomState(3456).random_sample(4) >= 0.7  # anna, bert, cleo by training, then zoe
    shorter = dict(zip(("anna", "bert", "cleo", "zoe"), draws))
    train, valid, pool = found.official
    for record in (*train, *valid, *pool):
        chosen, rejected = len(record["chosen"]), len(record["rejected"])  # in characters
        assert chosen != rejected and (chosen < rejected) == shorter[record["user"]]
    assert found.dropped["as long as each other"] == 1 and shorter["zoe"] and not shorter["anna"]
    # the share whose worker prefers longer: of anna's and bert's, and of cleo's and zoe's three
    shares = [f"{100 * (2 - shorter['anna'] - shorter['bert']) / 2:.2f} %", f"{100 * (1 - shorter['cleo']) / 4:.2f} %"]
    assert [count.found for count in found.counts] == [10, 7, 8, 7, 2, 4, *shares]
    assert {r["user"] for r in tldr.read_length(RAW / "tldr", Options()).official.train} == {"anna", "bert", "cleo"}


def test_the_papers_minority_is_workers_4_5_and_6():
    assert [i + 1 for i, d in enumerate(tldr.preferences(10, tldr.SHORTER, tldr.SEED)) if d] == [4, 5, 6]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"choice": 0', '"choice": 2', "batch3.json, line 1: found choice 2.*expected choice 0 or 1"),
        ('"split": "train"', '"split": "test"', "batch3.json, line 1: .*split 'test'"),
        ('"worker": "anna"', '"worker": 7', "line 1, worker: expected text, found 7"),
        ('"policy": "sup1"', '"polcy": "sup1"', r"line 1, summaries\[0\], policy: expected text, found nothing"),
        ('"summaries": [', '"summaries": [{"text": "x", "policy": "sup"}, ', "line 1, summaries: expected 2, found 3"),
        ('{"info"', '{"info', "line 1, column .*not valid JSON"),
    ],
)
def test_tldr_faults_name_file_line_and_field(tmp_path, old, new, message):
    folder = changed(tmp_path, "tldr", "batch3.json", old, new)
    with pytest.raises(UserError, match=message):
        tldr.read(folder, Options())


# PRISM


def test_prism_comparisons_by_hand():
    found = prism.read(RAW / "prism", Options())
    by_id = {r["id"]: r for r in found.records}
    assert list(by_id)[:4] == ["c0:0:1", "c0:0:2", "c0:1:1", "c1:0:1"]  # each unchosen one; EMPTY STRING is none
    later = by_id["c0:1:1"]
    assert later["prompt"] == [
        {"role": "user", "content": "What is rain?"},
        {"role": "assistant", "content": "Water from the sky."},
        {"role": "user", "content": "And snow?"},
    ]
    assert (later["chosen"], later["rejected"], later["user"]) == ("Frozen water.", "No idea.", "user0")
    assert later["split_group"] == "c0"
    assert "c1:1:1" not in by_id  # both rows are chosen: the same text twice
    assert by_id["c1:2:1"]["prompt"][3] == {"role": "assistant", "content": "Trust."}
    assert not any(
        r["split_group"] in ("c5", "c11") for r in found.records
    )  # an empty question, an empty chosen answer
    assert "c6:0:1" not in by_id and "c6:1:1" in by_id
    assert found.dropped == {"turns without two answers that differ": 2, "turns behind one without a chosen answer": 3}
    assert [count.found for count in found.counts] == [6, 5, 15]
    assert all(isinstance(r["rejected"], str) for r in found.records)


def test_prism_may_take_the_best_scored_unchosen_answer():
    by_id = {r["id"]: r for r in prism.read(RAW / "prism", Options(rejected="best")).records}
    assert by_id["c0:0:2"]["rejected"] == "Rain is a form of precipitation." and "c0:0:1" not in by_id
    assert "c8:0:1" in by_id and "c8:0:2" not in by_id  # a score of null is the least


def test_prism_user_text_by_hand():
    by_user = {r["user"]: r for r in prism.read(RAW / "prism", Options()).records}
    assert by_user["user0"]["user_text"] == (
        "self_description: I like rain.\nage: 25-34 years old\ngender: Female\neducation: University Bachelors Degree\n"
        "employment_status: Working full-time\nmarital_status: Never been married\n"
        "english_proficiency: Native speaker\nstated_prefs: factuality, creativity, fluency"
    )
    assert "self_description" not in by_user["user2"]["attributes"]  # EMPTY STRING
    assert by_user["user3"]["attributes"].keys() == {
        "self_description", "age", "gender", "education", "marital_status", "english_proficiency",
    }  # fmt: skip


def test_prism_faults_name_file_line_and_field(tmp_path):
    with pytest.raises(UserError, match="conversations.jsonl, line 1, user_id: 'user9' is not in .*survey.jsonl"):
        prism.read(changed(tmp_path, "prism", "conversations.jsonl", '"user0"', '"user9"'), Options())
    shutil.rmtree(tmp_path / "raw")
    with pytest.raises(UserError, match="line 1, turn 0, role: expected text, found 3"):
        prism.read(changed(tmp_path, "prism", "conversations.jsonl", '"role": "model"', '"role": 3'), Options())
    (tmp_path / "raw" / "survey.jsonl").unlink()
    with pytest.raises(UserError, match="no file survey.jsonl; expected the raw files of The PRISM"):
        prism.read(tmp_path / "raw", Options())


# Personalized Soups, PERSONA, MultiPref


def test_psoups_takes_the_sentence_off_and_drops_duplicates():
    found = psoups.read(RAW / "psoups", Options())
    assert Counter(r["user"] for r in found.records) == {
        "P1A": 10,
        **dict.fromkeys(("P1B", "P2A", "P2B", "P3A", "P3B"), 10),
    }
    assert not any("Generate a response" in r["prompt"] for r in found.records)
    assert found.records[0] == {
        "prompt": "Explain what rain is.", "chosen": "Easy: It is so.", "rejected": "Formally, It is so.", "user": "P1A",
        "id": "P1A:1", "split_group": found.records[10]["split_group"], "attributes": {"preference": psoups.SENTENCES["P1A"]},
    }  # fmt: skip
    assert found.dropped == {"exact duplicates": 1, "equal completions": 1, psoups.UNNAMED: 1}
    assert [p["prompt"] for p in found.prompts] == [
        "What is the best way to learn to swim?",
        "Compare a cat and a dog.",
    ]


@pytest.mark.parametrize(
    "asked, prompt",
    [
        ("What is rain? Generate a response in an unfriendly manner.", "What is rain?"),
        ("What is rain?\nGENERATE A RESPONSE, in an unfriendly manner", "What is rain?"),
        ("\u0130stanbul nedir? Generate a response in an unfriendly manner.", "\u0130stanbul nedir?"),
        (
            "Generate a response to a letter. Generate a response in an unfriendly manner.",
            "Generate a response to a letter.",
        ),
        ("What is rain? Generate a response that answers in an unfriendly manner.", None),
        ("Generate a response in an unfriendly manner.", None),
        ("What is rain?", None),
    ],
)
def test_only_the_preferences_own_sentence_is_taken_off(asked, prompt):
    assert psoups.without_sentence(asked, psoups.SENTENCES["P3B"]) == prompt


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"user_input": "x"', "P2A.json, line 1, column .*not valid JSON"),
        ('{"a": 1}', "P2A.json: expected a list of objects"),
        ("[1]", "P2A.json, item 1: expected an object, found int"),
        ('[{"user_input": "x", "completion_a": "y"}]', "P2A.json, item 1, completion_b: expected text, found nothing"),
    ],
)
def test_psoups_faults_name_file_and_item(tmp_path, content, message):
    shutil.copytree(RAW / "psoups", tmp_path / "raw")
    (tmp_path / "raw" / "rm_training" / "P2A.json").write_text(content)
    with pytest.raises(UserError, match=message):
        psoups.read(tmp_path / "raw", Options())


def test_persona_by_hand(persona_raw):
    found = persona.read(persona_raw, Options())
    assert len(found.records) == 24 and found.dropped == {"equal responses": 1}
    assert [(c.found, c.published) for c in found.counts] == [(4, 1_000), (25, 200_000)]
    first = found.records[0]
    assert (first["user"], first["chosen"], first["rejected"]) == (
        "persona1", "For you: explain what rain is. 0", "In general: explain what rain is.",
    )  # fmt: skip
    assert first["user_text"] == "age: 34\nsex: Male\njob: baker\nlikes: rain"
    assert first["attributes"] == {"age": "34", "sex": "Male", "job": "baker", "likes": "rain"}
    assert found.records[23]["user"] == "persona4"


def test_multipref_each_vote_is_a_comparison_and_ties_are_none():
    found = multipref.read(RAW / "multipref", Options())
    by_id = {r["id"]: r for r in found.records}
    assert by_id["m0:n1"]["chosen"].startswith("A: ") and by_id["m1:n1"]["chosen"].startswith("B says")
    assert by_id["m0:e1"]["chosen"].startswith("B says") and "m3:e2" not in by_id and "m4:e1" not in by_id
    # 10 rows of 4 votes, less 2 + 2 without expert annotations, 1 tie, and 4 votes on equal completions
    assert len(by_id) == 40 - 4 - 1 - 4 and found.dropped == {"ties": 1, "votes on equal completions": 4}


def test_multipref_faults_name_file_line_and_field(tmp_path):
    folder = changed(tmp_path, "multipref", "MultiPref-Train.jsonl", "A-is-slightly-better", "A-is-slighly-better")
    message = r"line 1, normal_worker_annotations\[1\], overall_pref: found 'A-is-slighly-better' \(did you mean"
    with pytest.raises(UserError, match=message):
        multipref.read(folder, Options())


# What is published, written out once more


def test_counts_are_compared_with_the_published_ones(persona_raw):
    def published(reading):
        return [count.published for count in reading.counts]

    filtered = [38_487, 16_294]
    assert published(tldr.read(RAW / "tldr", Options())) == [*filtered, 23_299, 23_292, 4_921, 11_373]
    assert published(tldr.read(RAW / "tldr", Options(known_users=40))) == [*filtered, None, None, None, None]
    assert published(tldr.read_length(RAW / "tldr", Options()))[6:] == ["68.50 %", "63.63 %"]
    assert published(tldr.read_length(RAW / "tldr", Options(known_users=40)))[6:] == ["63.56 %", "71.34 %"]
    assert published(prism.read(RAW / "prism", Options())) == [1_500, 1_396, 8_011]
    assert prepare.SAMPLE_SIZES == {"prism": (6_431, 3_982)}
    rows_and_kept = [48_300, 8_959, 48_825, 9_069, 47_350, 8_239, 49_220, 8_626, 49_155, 9_356, 48_565, 9_222]
    found = published(psoups.read(RAW / "psoups", Options()))
    assert found == [*rows_and_kept, 0] and sum(found[1:12:2]) == 53_471
    assert published(persona.read(persona_raw, Options())) == [1_000, 200_000]
    assert published(multipref.read(RAW / "multipref", Options())) == [10_461]


PAPERS = {  # what the papers give; all but the first have T_u = 10, LoRA of rank 8, a cosine schedule and 2 epochs
    "tldr_pdpo": {"user_model.tokens": 1, "optim.lr": 1e-6, "loss.beta": 0.5, "optim.batch_size": 64, "optim.epochs": 1,
                  "loss.alpha": 0.5, "data.max_prompt_tokens": 550, "lora.rank": 0},
    "tldr_prm": {"user_model.tokens": 1, "optim.lr": 5e-6, "optim.batch_size": 64, "optim.epochs": 1, "loss.alpha": 0.5,
                 "data.max_prompt_tokens": 550, "lora.rank": 0, "method": "prm"},
    "tldr_length_pdpo": {"loss.beta": 0.5, "lora.alpha": 16, "lora.dropout": 0.05, "data.max_prompt_tokens": 550,
                         "data.max_tokens": 600},
    "prism_pdpo": {"loss.beta": 0.1, "lora.alpha": 32, "lora.dropout": 0.1, "data.max_tokens": 800},
    "psoups_pdpo": {"loss.beta": 0.1, "lora.alpha": 32, "lora.dropout": 0.1, "data.max_prompt_tokens": 200,
                    "data.max_tokens": 1000, "data.template": "tulu"},
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_configs_have_the_papers_hyper_parameters(name):
    config = config_module.load_config(config_module.find_config(name))
    found = {key: operator.attrgetter(key)(config) for key in KEYS}
    expected = {"optim.warmup_steps": 150, "optim.weight_decay": 0.0, **PAPERS[name]}
    if name not in ("tldr_pdpo", "tldr_prm"):
        expected |= {"user_model.tokens": 10, "lora.rank": 8, "optim.lr": 5e-5, "optim.schedule": "cosine",
                     "optim.batch_size": 32, "optim.epochs": 2}  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["user_model.lr"] == found["optim.lr"] and found["user_model.kind"] == "individual"


# Splits


def own_groups(users=20, groups=6):
    return [{"user": f"u{u}", "split_group": f"g{u}-{g}", "id": f"{u}-{g}-{i}"}
            for u in range(users) for g in range(groups if u else 1) for i in range(2)]  # fmt: skip


def shared_groups(users=10, groups=30):
    return [{"user": f"u{u}", "split_group": f"g{g}", "id": f"{u}-{g}"} for u in range(users) for g in range(groups)]


@pytest.mark.parametrize(
    "dialogues, records", [(True, own_groups()), (False, shared_groups())], ids=["dialogues", "prompts"]
)
@pytest.mark.parametrize("k", [0, 3])
def test_nothing_leaks(dialogues, records, k):
    made = split(records, Shares(), 1, k, dialogues)
    ids = [r["id"] for part in made[:3] for r in part]
    assert len(ids) == len(set(ids)) == len(records) - made.left_out
    groups = [{r["split_group"] for r in part} for part in made[:3]]
    assert not groups[1] & (groups[0] | groups[2])
    known = {r["user"] for r in made.train}
    unknown = {r["user"] for r in made.valid} - known
    assert known and unknown and known & {r["user"] for r in made.valid}
    few = Counter(r["user"] for r in made.few_shot)
    assert few == ({user: k for user in unknown if user != "u0" or len(records) == 300} if k else {})
    assert split(records, Shares(), 1, k, dialogues) == made != split(records, Shares(), 2, k, dialogues)


def test_dialogues_are_divided_as_the_papers_code_does():
    """Its procedure, on numpy's global state: shuffle the users, then each known one's dialogues."""
    records = own_groups()
    np.random.seed(123)
    users = np.array([f"u{u}" for u in range(20)])
    np.random.shuffle(users)
    expected = set()
    for user in users[: int(20 * 0.9)]:
        dialogues = np.array(list(dict.fromkeys(r["split_group"] for r in records if r["user"] == user)))
        if len(dialogues) > 1:
            np.random.shuffle(dialogues)
            expected.update(dialogues[: int(len(dialogues) * 0.9)])
    assert {r["split_group"] for r in split(records, Shares(), seed=123, dialogues=True).train} == expected


def test_an_unknown_user_keeps_something_to_be_evaluated_on():
    train = [{"user": "b", "split_group": "t"}]
    valid = [{"user": "a", "split_group": f"g{i}"} for i in range(2)]
    assert with_few_shot(train, valid, [], 2, 0).few_shot == []
    made = with_few_shot(train, valid, [], 1, 0)
    assert len(made.few_shot) == len(made.valid) == 1


def test_few_shot_takes_no_held_out_prompt_that_somebody_else_has():
    train = [{"user": "b", "split_group": "t"}]
    valid = [
        {"user": user, "split_group": group} for user, group in (("a", "g0"), ("b", "g0"), ("a", "g1"), ("a", "g2"))
    ]
    for seed in range(5):
        (taken,) = with_few_shot(train, valid, [], 1, seed).few_shot
        assert taken["split_group"] in ("g1", "g2")
    pool = [{"user": "a", "split_group": "g1"}, {"user": "a", "split_group": "t"}]  # one prompt is held out as well
    assert with_few_shot(train, valid, pool, 1, 0).few_shot == [pool[1]]


def test_a_dialogue_of_two_users_is_refused_and_unnamed_comparisons_are_trained_on():
    records = [*own_groups(), {"user": "u1", "split_group": "g2-0", "id": "x"}]
    with pytest.raises(UserError, match="dialogue 'g2-0' has the users 'u2' and 'u1', expected one"):
        split(records, Shares(), 0, dialogues=True)
    unnamed = [{"user": None, "split_group": f"n{i}", "id": f"n{i}"} for i in range(10)]
    for dialogues, records in ((True, own_groups()), (False, shared_groups())):
        assert sum(r["user"] is None for r in split([*records, *unnamed], Shares(), 0, dialogues=dialogues).train) > 0


def test_too_little_to_split_is_told():
    with pytest.raises(UserError, match="0 comparisons would be trained on and 1 held out"):
        split([{"user": "a", "split_group": "g"}], Shares(), 0)


# Through the public commands

TINY = ("model.name=null", "model.family=llama", "model.width=32", "model.heads=2", "model.layers=1", "model.dtype=float32",
        "model.compute_dtype=null", "device=cpu", "train.save_every=null")  # fmt: skip
CONFIGS = {  # config -> data set, and where its raw files lie
    "tldr_pdpo": ("tldr", "tldr"),
    "tldr_prm": ("tldr", "tldr"),
    "tldr_length_pdpo": ("tldr_length", "tldr"),
    "prism_pdpo": ("prism", "prism"),
    "psoups_pdpo": ("psoups", "psoups"),
    "persona_prm": ("persona", "persona"),
}


@pytest.fixture
def prepared(request, tmp_path, call):
    """A data set's files, made by `prepare` of the raw ones."""

    def make(name: str, raw: str, *options: str) -> Path:
        folder = request.getfixturevalue("persona_raw") if raw == "persona" else RAW / raw
        status, out, err = call(data_command.main, "prepare", name, "--raw", folder, "--out", tmp_path / name, *options)
        assert status == 0, err
        return tmp_path / name

    return make


@pytest.mark.parametrize("config", CONFIGS)
def test_every_published_config_passes_the_check_and_the_dry_run(config, prepared, call):
    name, raw = CONFIGS[config]
    data = prepared(name, raw)
    keys = ("--set", *TINY, f"data.train={data}/train.jsonl", f"data.valid={data}/valid.jsonl")
    status, out, err = call(
        data_command.main, "check", data / "train.jsonl", data / "valid.jsonl", "--config", config, *keys
    )
    assert status == 0 and "Known users" in out, err
    status, out, err = call(train.main, "--config", config, "--dry-run", *keys)
    assert status == 0 and "updates" in out, err


OTHERS = sorted({path.stem for path in (ROOT / "configs").glob("*.yaml")} - set(CONFIGS))


@pytest.mark.parametrize("config", OTHERS)
def test_every_other_config_passes_the_dry_run(config, call):
    keys = [key for key in TINY if config != "tiny" or not key.startswith("model.")]
    data = ("data.train=examples/tiny/train.jsonl", "data.valid=examples/tiny/valid.jsonl")
    status, out, err = call(train.main, "--config", config, "--dry-run", "--set", *keys, *data)
    assert status == 0 and "updates" in out, err


@pytest.mark.parametrize("config, name", [("tldr_pdpo", "tldr"), ("tldr_length_pdpo", "tldr_length"), ("prism_pdpo", "prism"), ("psoups_pdpo", "psoups"),
                                          ("persona_prm", "persona"), ("psoups_pdpo", "multipref")])  # fmt: skip
def test_every_data_set_trains_evaluates_and_generates(config, name, prepared, tmp_path, call):
    few = ("--known-users", 2) if name.startswith("tldr") else ()
    data = prepared(name, "tldr" if name == "tldr_length" else name, "--few-shot", 1, *few)
    assert (
        call(
            data_command.main, "check", data / "train.jsonl", data / "valid.jsonl", "--config", config, "--set", *TINY
        )[0]
        == 0
    )
    run = tmp_path / "run"
    keys = (f"data.train={data}/train.jsonl", f"data.valid={data}/valid.jsonl", f"run_dir={run}", "optim.max_steps=3",
            "optim.batch_size=2", "train.log_every=1", "train.eval_last=false", "evaluate.bootstrap=100")  # fmt: skip
    status, out, err = call(train.main, "--config", config, "--set", *TINY, *keys)
    assert status == 0, err
    assert [r["step"] for r in rows(run / "metrics.jsonl")] == [1, 2, 3]
    assert call(evaluate.main, "--checkpoint", run)[0] == 0
    assert json.loads((run / "eval" / "report.json").read_text())["accuracy"]["top"] is not None
    users = sorted({r["user"] for r in rows(data / "train.jsonl")})
    if config == "persona_prm":  # a reward model scores
        asked = [{"prompt": r["prompt"], "response": r["chosen"], "user": r["user"], "user_text": r["user_text"]}
                 for r in rows(data / "valid.jsonl")]  # fmt: skip
        (tmp_path / "responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
        scoring = ("--score", tmp_path / "responses.jsonl", "--out", tmp_path / "rewards.jsonl")
        assert call(generate.main, "--checkpoint", run, *scoring)[0] == 0
        assert [r["user"] for r in rows(tmp_path / "rewards.jsonl")] == [r["user"] for r in asked]
        return
    short = ("--checkpoint", run, "--prompts", data / "prompts.jsonl", "--max-new-tokens", 3)
    status, out, err = call(generate.main, *short, "--users", "@all", "--out", tmp_path / "o.jsonl", "--limit", 1)
    assert status == 0, err
    if name == "prism":  # each prompt answered to who asked, with their own text before it
        assert call(generate.main, *short, "--users", "@own", "--out", tmp_path / "own.jsonl")[0] == 0
        asked = [(r["id"], r["user"], r["user_text"]) for r in rows(data / "prompts.jsonl")]
        assert [(r["id"], r["user"], r["user_text"]) for r in rows(tmp_path / "own.jsonl")] == asked
    assert Counter(r["user"] for r in rows(tmp_path / "o.jsonl")) == dict.fromkeys((*users, "generic"), 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_say_only_what_differs_from_the_defaults(name):
    path = config_module.find_config(name)
    said = {f"{group}.{key}": value for group, keys in yaml.safe_load(path.read_text()).items()
            for key, value in (keys.items() if isinstance(keys, dict) else ())}  # fmt: skip
    assert said and not {key for key, value in said.items() if value == operator.attrgetter(key)(Config())}


def test_prepare_records_what_it_did_and_does_it_once(prepared, tmp_path, call):
    data = prepared("prism", "prism", "--few-shot", 1)
    record = json.loads((data / "split.json").read_text())
    assert record["settings"]["seed"] == 123 and record["settings"]["few_shot"] == 1
    assert record["settings"]["raw"].keys() == {"survey.jsonl", "conversations.jsonl"}
    assert record["files"]["train.jsonl"]["records"] == len(rows(data / "train.jsonl"))
    assert set(record["known_users"]) == {r["user"] for r in rows(data / "train.jsonl")}
    before = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    again = ("prepare", "prism", "--raw", RAW / "prism", "--out", data)
    assert "is there already" in call(data_command.main, *again, "--few-shot", 1)[1]
    status, _, err = call(data_command.main, *again, "--few-shot", 2)
    assert status == 2 and "few_shot: 1 -> 2" in err
    assert {path: path.stat().st_mtime_ns for path in data.iterdir()} == before
    assert call(data_command.main, *again, "--overwrite")[0] == 0
    assert not (data / "few_shot.jsonl").exists()  # of the split before
    (data / "valid.jsonl").write_text("{}")
    status, _, err = call(data_command.main, *again)
    assert status == 2 and "valid.jsonl: not as it was written" in err


def test_an_interrupted_prepare_is_not_taken_for_a_whole_one(prepared, call, monkeypatch):
    data = prepared("prism", "prism")
    again = ("prepare", "prism", "--raw", RAW / "prism", "--out", data)
    write = prepare.write_json_lines

    def interrupted(path, records):
        if path.name == "valid.jsonl":
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(prepare, "write_json_lines", interrupted)
    assert call(data_command.main, *again, "--seed", 5, "--overwrite")[0] == 130
    monkeypatch.setattr(prepare, "write_json_lines", write)
    status, _, err = call(data_command.main, *again)
    assert status == 2 and "train.jsonl: exists, of an unfinished or another split" in err
    assert call(data_command.main, *again, "--overwrite")[0] == 0


def test_nothing_that_is_there_is_replaced_unasked(tmp_path, call):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b", "user": f"u{i % 3}"}) + "\n"
                            for i in range(20)))  # fmt: skip
    before = file.read_bytes()
    for options in ((), ("--overwrite",)):
        status, _, err = call(data_command.main, "split", file, "--out", tmp_path, *options)
        assert status == 2 and "itself would be replaced" in err
    status, _, err = call(data_command.main, "prepare", "prism", "--raw", RAW / "prism", "--out", tmp_path)
    assert status == 2 and "train.jsonl: exists" in err and file.read_bytes() == before


def test_a_count_that_is_not_the_published_one_is_a_warning_with_both(call, tmp_path):
    _, out, _ = call(data_command.main, "prepare", "tldr", "--raw", RAW / "tldr", "--out", tmp_path / "o")
    assert "warning: comparisons for training after the filter of policies: found 10, published 38,487" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("prepare", "tlrd"), "found 'tlrd' (did you mean 'tldr'?), expected the name of a data set: tldr, "),
        (("prepare", "tldr", "--raw", "/nowhere"), "/nowhere: no file batch*.json; expected the raw files of TL;DR"),
        (("prepare", "tldr_length"), "which `python -m prlhf.data fetch tldr` downloads"),
        (
            ("split", "x.jsonl", "--out", "o", "--seed", "99999999999"),
            "--seed: found 99999999999, expected at least 0, at most",
        ),
        (("prepare", "psoups", "--rejected", "best"), "--rejected: an option of prism, not of psoups"),
        (("prepare", "prism", "--few-shot", "-1"), "--few-shot: found -1, expected at least 0"),
        (("split", "nowhere.jsonl", "--out", "o"), "nowhere.jsonl: no such file"),
    ],
)
def test_wrong_use_is_told(call, arguments, message):
    status, _, err = call(data_command.main, *arguments)
    assert status == 2 and message in err


def test_any_file_can_be_split(tmp_path, call):
    records = [{"prompt": f"p{i % 10}", "chosen": f"a{i}", "rejected": "b", "user": f"u{i % 7}", "talk": i // 2, "n": i}
               for i in range(70)]  # fmt: skip
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert call(data_command.main, "split", file, "--out", tmp_path / "by_prompt", "--few-shot", 2)[0] == 0
    parts = [rows(tmp_path / "by_prompt" / f"{name}.jsonl") for name in ("train", "valid")]
    assert not {r["prompt"] for r in parts[0]} & {r["prompt"] for r in parts[1]}
    assert parts[0][0]["n"] in range(70)  # other fields are kept
    records = [{**r, "who": i // 2 % 7} for i, r in enumerate(records)]  # a talk is one person's
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    by_talk = ("split", file, "--out", tmp_path / "by_talk", "--by", "talk", "--user-column", "who")
    assert call(data_command.main, *by_talk)[0] == 0
    parts = [rows(tmp_path / "by_talk" / f"{name}.jsonl") for name in ("train", "valid")]
    assert not {r["talk"] for r in parts[0]} & {r["talk"] for r in parts[1]}
    assert {r["user"] for part in parts for r in part} == {str(i) for i in range(7)}
    status, _, err = call(data_command.main, "split", file, "--out", tmp_path / "o", "--by", "tlak")
    assert status == 2 and "line 1, tlak: expected text or a number" in err
    implicit = [{"chosen": [{"role": "user", "content": f"p{i}"}, {"role": "assistant", "content": "a"}],
                 "rejected": [{"role": "user", "content": f"p{i}"}, {"role": "assistant", "content": "b"}], "user": f"u{i % 4}"}
                for i in range(40)]  # fmt: skip
    file.write_text("".join(json.dumps(r) + "\n" for r in implicit))
    assert call(data_command.main, "split", file, "--out", tmp_path / "trl")[0] == 0
    assert rows(tmp_path / "trl" / "train.jsonl")[0]["prompt"][0]["role"] == "user"


def test_a_missing_prepared_file_says_how_to_make_it(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(train.main, "--config", "tldr_pdpo")
    assert status == 2 and "`python -m prlhf.data prepare tldr` makes it" in err and "fetch" in err
