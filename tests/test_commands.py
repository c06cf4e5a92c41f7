"""The three commands as a person uses them: what they leave, and what they say to bad input."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch.tokens import Encoder
from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import read_comparisons, read_prompts
from prlhf.evaluate import __main__ as evaluate
from prlhf.evaluate import held_out
from prlhf.generate import __main__ as generate
from prlhf.generate import rewards
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("model.width=32", "model.heads=2", "optim.epochs=1", "lora.rank=2", "data.limit=16", "data.valid_limit=12")

SECRET = "hf_not_to_be_written_anywhere"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tiny config."""
    path = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(path.parent / "cache"))
        patch.setenv("HF_TOKEN", SECRET)
        patch.setattr(sys, "argv", ["train.py", "--config", "tiny", "--set", f"run_dir={path}", *SMALL])
        train.main()
    return path


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def refused(result, *parts):
    """Exit status 2, a short message with all `parts`, no traceback."""
    status, _, err = result
    assert status == 2, err
    message = err[err.index("error:") :]
    for part in parts:
        assert part in message, message
    assert "Traceback" not in message and len(message) < 1200


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("tuning", ["lora.rank=2", "lora.rank=0"])
def test_train_evaluate_generate(call, tmp_path, monkeypatch, family, tuning):
    run = tmp_path / "run"
    overrides = [f"run_dir={run}", *SMALL, f"model.family={family}", tuning]
    assert call(train.main, "--config", "tiny.yaml", "--set", *overrides)[0] == 0
    assert call(evaluate.main, "--checkpoint", run)[0] == 0
    report = json.loads((run / "eval" / "report.json").read_text())
    assert set(report["accuracy"]) == {"top", "average_mean", "average_std", "generic", "worst_user"}
    for name, value in report["accuracy"].items():
        assert 0 <= value <= 1, name
        interval = report["interval"][name]
        assert interval is None or interval[0] <= value + 1e-9 and value - 1e-9 <= interval[1], name
    assert all(set(row) >= {"n", "accuracy"} for row in report["per_user"].values())
    assert {"generic_user", "shuffled_users"} <= set(report["controls"])
    assert report["comparisons"]["known_users"] == sum(row["n"] for row in report["per_user"].values())

    # The evaluation at the end of training and the one of the saved model are the same.
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["eval"] and last["accuracy_top"] == report["accuracy"]["top"]

    # On another machine, where the reference is computed anew: from the base model, which a full fine-tune has left.
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "another cache"))
    assert call(evaluate.main, "--checkpoint", run, "--out", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["accuracy"] == report["accuracy"] and again["calibration"] == pytest.approx(report["calibration"])

    out = tmp_path / "responses.jsonl"
    arguments = ["--checkpoint", run, "--prompts", "examples/tiny/prompts.jsonl", "--users", "alice,generic",
                 "--out", out, "--max-new-tokens", 5]  # fmt: skip
    assert call(generate.main, *arguments)[0] == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["id"], r["user"]) for r in found] == [(f"p{i}", u) for i in range(4) for u in ("alice", "generic")]


@pytest.mark.parametrize("family, method", [("llama", "pdpo"), ("gptj", "pdpo"), ("llama", "prm")])
def test_a_model_trained_in_half_precision_is_evaluated_in_it(call, tmp_path, monkeypatch, family, method):
    """As it was in training, from the same reference; in float32 where that is asked for, with other margins."""
    run, half = tmp_path / "run", ("lora.rank=0", "model.compute_dtype=bfloat16")
    overrides = [f"run_dir={run}", *SMALL, f"model.family={family}", f"method={method}", *half]
    assert call(train.main, "--config", "tiny", "--set", *overrides)[0] == 0
    assert {t.dtype for t in load_file(run / "final" / "model.safetensors").values()} == {torch.float32}
    known = held_out.reference_model
    monkeypatch.setattr(held_out, "reference_model", lambda loaded: pytest.fail("is in the cache"))
    status, _, err = call(evaluate.main, "--checkpoint", run)
    assert status == 0, err

    def margins(folder):
        return [json.loads(line)["true"] for line in (folder / "margins.jsonl").read_text().splitlines()]

    report = json.loads((run / "eval" / "report.json").read_text())
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["eval"] and last["accuracy_top"] == report["accuracy"]["top"]
    monkeypatch.setattr(held_out, "reference_model", known)
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "another cache"))
    assert call(evaluate.main, "--checkpoint", run, "--out", tmp_path / "again")[0] == 0
    assert margins(tmp_path / "again") == pytest.approx(margins(run / "eval"), abs=1e-6)
    whole = ("--out", tmp_path / "whole", "--set", "model.compute_dtype=null")
    assert call(evaluate.main, "--checkpoint", run, *whole)[0] == 0
    assert margins(tmp_path / "whole") != margins(run / "eval")
    assert margins(tmp_path / "whole") == pytest.approx(margins(run / "eval"), abs=0.1)


LINEAR = ("user_model.aggregator=linear", "user_model.tokens=1")


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=prm",),
        ("method=prm", "lora.rank=0", "model.family=gptj"),
        ("method=prm", *LINEAR),
        ("method=prm", *LINEAR, "lora.rank=0", "model.frozen=true"),
        ("method=pairwise",),
    ],
)
def test_reward_models_through_the_same_commands(call, tmp_path, overrides):
    run = tmp_path / "run"
    status, _, err = call(train.main, "--config", "tiny", "--set", f"run_dir={run}", *SMALL, *overrides)
    assert status == 0, err
    assert call(evaluate.main, "--checkpoint", run)[0] == 0
    report = json.loads((run / "eval" / "report.json").read_text())
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["eval"] and last["accuracy_top"] == report["accuracy"]["top"]
    assert {"longer", "own_length", "pair_majority", "response_share"} <= set(report["rules"])
    margins = [json.loads(line) for line in (run / "eval" / "margins.jsonl").read_text().splitlines()]
    known = [m for m in margins if m["known"]]
    assert sum(m["true"] > 0 for m in known) / len(known) == pytest.approx(report["accuracy"]["top"])

    # The rewards of single responses have the margins of the evaluation.
    records = [json.loads(line) for line in Path("examples/tiny/valid.jsonl").read_text().splitlines()]
    chosen = {r["id"]: r for r in records if r["id"] in {m["id"] for m in margins}}
    responses, out = tmp_path / "responses.jsonl", tmp_path / "rewards.jsonl"
    lines = [
        {**r, "id": f"{name} {side}", "response": r[side]}
        for name, r in chosen.items()
        for side in ("chosen", "rejected")
    ]
    responses.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = call(generate.main, "--checkpoint", run, "--score", responses, "--out", out)
    if overrides[0] == "method=pairwise":
        return refused(result, "method pairwise, expected prm")
    assert result[0] == 0 and lines
    rewards = {r["id"]: r["reward"] for r in map(json.loads, out.read_text().splitlines())}
    for m in margins:
        assert rewards[f"{m['id']} chosen"] - rewards[f"{m['id']} rejected"] == pytest.approx(m["true"], abs=1e-5)
    refused(call(generate.main, "--checkpoint", run, "--score", responses, "--out", out), str(out), "--overwrite")
    other = ["user_model.softmax=true", "model.width=64"]
    other += ["model.frozen=true"] if "lora.rank=0" in overrides and "model.frozen=true" not in overrides else []
    for changed in other:
        refused(call(evaluate.main, "--checkpoint", run, "--set", changed), "another model", changed.split("=")[0])
    how = [
        "model.layout=rows",
        "model.recompute=every:2",
    ]
    result = call(evaluate.main, "--checkpoint", run, "--set", *how, "--out", tmp_path / "computed_otherwise")
    assert result[0] == 0, result
    prompts = ("--prompts", "examples/tiny/prompts.jsonl", "--users", "alice", "--out", tmp_path / "o")
    refused(call(generate.main, "--checkpoint", run, *prompts), "does not generate")


def test_what_was_generated_can_be_scored(call, tmp_path, finished):
    responses, run = tmp_path / "responses.jsonl", tmp_path / "run"
    prompts = ("--prompts", "examples/tiny/prompts.jsonl", "--users", "alice,generic", "--max-new-tokens", 3)
    assert call(generate.main, "--checkpoint", finished, *prompts, "--out", responses)[0] == 0
    vanilla = ("method=prm", "loss.alpha=0")  # all users are one to it
    assert call(train.main, "--config", "tiny", "--set", f"run_dir={run}", *SMALL, *vanilla)[0] == 0
    out = tmp_path / "rewards.jsonl"
    assert call(generate.main, "--checkpoint", run, "--score", responses, "--out", out)[0] == 0
    rewards = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rewards) == 8 and all(r["known"] == (r["user"] == "alice") for r in rewards)
    for line in responses.read_text().splitlines():  # alice's text about herself goes along
        assert "user_text" in json.loads(line)


def test_bad_lines_to_score(call, tmp_path, finished):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    arguments = ["--checkpoint", finished, "--score", path, "--out", tmp_path / "o.jsonl"]
    refused(call(generate.main, *arguments), "method pdpo, expected prm")
    run = tmp_path / "run"
    assert call(train.main, "--config", "tiny", "--set", f"run_dir={run}", *SMALL, "method=prm")[0] == 0
    arguments[1] = run
    for line, parts in (
        ('{"prompt": "a", "respnse": "b"}', ["line 2: no field 'response'", "did you mean 'respnse'"]),
        ('{"prompt": "a", "response": 3}', ["line 2, response"]),
        ('{"prompt": "a", "response": "b", "user": 7.5}', ["line 2, user"]),
    ):
        path.write_text('{"prompt": "a", "response": "b", "user": "nobody knows"}\n' + line + "\n")
        refused(call(generate.main, *arguments), str(path), *parts)
    assert not (tmp_path / "o.jsonl").exists()
    path.write_text('{"prompt": "a", "response": "b", "user": "nobody knows"}\n')
    itself = ["--checkpoint", run, "--score", path, "--out", tmp_path / "." / path.name, "--overwrite"]
    refused(call(generate.main, *itself), "is --score itself")
    assert "nobody knows" in path.read_text()
    refused(
        call(generate.main, *arguments), "r.jsonl: users who are not known: 1 ('nobody knows')", "data.new_users=true"
    )
    assert not (tmp_path / "o.jsonl").exists()
    status, said, _ = call(generate.main, *arguments, "--set", "data.new_users=true")
    assert status == 0 and "1 of users who are not known" in said and "with 1 of 1 responses" in said
    assert json.loads((tmp_path / "o.jsonl").read_text())["known"] is False


def test_an_id_that_is_null_is_none(tmp_path):
    """As pandas writes it."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": null, "prompt": "a", "response": "b"}\n{"id": 0, "prompt": "a", "response": "b"}\n')
    assert [line.id for line in rewards.read_lines(path)] == ["1", "0"]
    assert [prompt.id for prompt in read_prompts(path)] == ["1", "0"]
    path.write_text('{"id": null, "prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert read_comparisons(path).comparisons[0].id == "r.jsonl:1"


def test_the_column_that_names_the_user_does_so_where_responses_are_scored(tmp_path):
    path = tmp_path / "r.jsonl"
    records = [{"worker": "ann"}, {"worker": 7, "user": "bob"}, {"user": "bob"}, {"worker": "generic"}, {}]
    path.write_text("".join(json.dumps({"prompt": "a", "response": "b", **r}) + "\n" for r in records))
    found = rewards.read_lines(path, DataConfig(user_column="worker"))
    assert [line.user for line in found] == ["ann", "7", "bob", None, None]


def test_responses_to_one_prompt_are_scored_after_the_same_prompt():
    """The prompt is cut as the longest of its responses demands, whichever is scored."""
    config = DataConfig(max_tokens=40, min_prompt_tokens=4)
    lines = [
        rewards.ScoredLine(prompt, response, None, None, "", "")
        for prompt, response in (("p" * 60, "r"), ("p" * 60, "r" * 20), ("q" * 60, "r"))
    ]
    short, long, other = rewards.encode(lines, Encoder(byte_tokenizer(), config), [0, 0, 0])
    assert short.reading.prefix == long.reading.prefix and len(long.reading.prefix) + len(long.reading.response) == 40
    assert len(other.reading.prefix) + len(other.reading.response) == 40 and short.cut and long.cut and other.cut


def test_generation_goes_on_where_it_stopped(call, finished, tmp_path):
    out = tmp_path / "r.jsonl"
    arguments = ["--checkpoint", finished, "--prompts", "examples/tiny/prompts.jsonl", "--users", "alice,bob",
                 "--out", out, "--max-new-tokens", 6, "--temperature", 1, "--batch-size", 3]  # fmt: skip
    assert call(generate.main, *arguments)[0] == 0
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:20])  # killed in the middle of a line
    status, said, _ = call(generate.main, *arguments)
    assert (status, out.read_text()) == (0, whole) and "5 new responses, 8 in all" in said
    refused(call(generate.main, *arguments, "--seed", 9), str(out), "seed: 0 -> 9", "--overwrite")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(Path("examples/tiny/prompts.jsonl").read_text().replace("apples", "pears"))
    changed = [prompts if a == "examples/tiny/prompts.jsonl" else a for a in arguments]
    refused(call(generate.main, *changed), "another prompt")
    assert out.read_text() == whole


def test_the_saved_lora_and_user_model_are_those_trained(finished):
    step = max((finished / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    (shard,) = step.glob("*.safetensors")
    trained = load_file(shard)
    users = load_file(finished / "final" / "users.safetensors")
    assert all((users[name] == trained[f"model.{name}"]).all() for name in users) and len(users) == 2


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--config", "tinny.yaml"], ["config 'tinny.yaml' not found", "did you mean 'tiny.yaml'"]),
        (["--config", "tiny", "--set", "loss.bta=1", "optim.lr=fast"], ["2 faults", "'loss.beta'", "found 'fast', expected number"]),
        (["--config", "tiny", "--set", "data.train=examples/tiny/trian.jsonl"], ["trian.jsonl: no such file", "train.jsonl"]),
        (["--config", "tiny", "--set", "data.train=null"], ["data.train is not set"]),
        (["--config", "tiny", "--set", "model.family=null", "model.name=no/such"], ["model 'no/such'", "safetensors"]),
        (["--config", "tiny", "--set", "data.max_tokens=20"], ["data.max_tokens: found 20", "none of"]),
        (["--config", "tiny", "--set", "run_dir=README.md"], ["README.md is a file"]),
        (["--config", "tiny", "--set", "device=cuda"], ["device: found 'cuda'"]),
        (["--config", "tiny", "--set", "lora.targets=[]"], ["lora.targets=[]: found no names"]),
        (["--config", "tiny", "--set", "run_dir=2024-13-45"], ["run_dir=2024-13-45", "not a YAML value"]),
        (["--config", "tiny", "--set", "model.dtype=bfloat16"], ["model.dtype", "full fine-tuning"]),
        (["--config", "tiny", "--set", "method=prm", "loss.kind=ipo", "loss.nll=1"], ["2 faults", "'ipo'", "loss.nll"]),
        (["--config", "tiny", "--set", "loss.margin=1"], ["loss.margin", "part of reward models"]),
        (["--config", "tiny", "--set", "method=prm", "user_model.aggregator=linear"], ["user_model.tokens", "expected 1"]),
        (["--config", "tiny", "--set", "model.frozen=true", "lora.rank=2"], ["lora.rank", "expected 0 with model.frozen"]),
        (["--config", "tiny", "--set", "lora.rank=2", "lora.targets=[q]"], ["no linear layer 'q'", "q_proj"]),
    ],
)  # fmt: skip
def test_bad_input_to_train(call, tmp_path, monkeypatch, arguments, parts):
    if "device=cuda" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    extra = [] if any(text.startswith("run_dir") for text in arguments) else [f"run_dir={tmp_path / 'run'}"]
    refused(call(train.main, *arguments[:2], "--set", *arguments[3:], *extra), *parts)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "empty"),
        (b'{"prompt": "a", "chosen": "b"}', "line 1: no field 'rejected'"),
        (b'{"prompt": "a", "cho', "line 1, column"),
        (b"\xff\xfe", "line 1: expected UTF-8"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "user": "\\ud800"}', "line 1: half of a surrogate pair"),
    ],
)
def test_bad_data_files(call, finished, tmp_path, content, part):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    refused(
        call(train.main, "--config", "tiny", "--set", f"data.train={path}", f"run_dir={tmp_path / 'r'}"),
        str(path),
        part,
    )
    refused(call(evaluate.main, "--checkpoint", finished, "--data", path), str(path), part)
    assert not (tmp_path / "r").exists()  # nothing was begun


def test_bad_checkpoints(call, finished, copied, tmp_path):
    refused(call(evaluate.main, "--checkpoint", str(finished) + "x"), "no such checkpoint", str(finished))
    refused(call(evaluate.main, "--checkpoint", tmp_path), "no finished model")
    (copied / "final" / "users.json").write_text("[]")
    refused(call(evaluate.main, "--checkpoint", copied), "users.json", "no user index")
    shutil.rmtree(copied / "final")
    refused(call(evaluate.main, "--checkpoint", copied), "no finished model", "stopped at step")


@pytest.mark.parametrize("file", ["users.safetensors", "adapter_model.safetensors", "base.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_models(call, copied, file, damage):
    path = copied / "final" / file
    path.write_bytes(path.read_bytes()[:-30])
    if damage == "missing":
        path.unlink()
    refused(call(evaluate.main, "--checkpoint", copied), str(copied / "final"))


def test_a_damaged_fully_fine_tuned_model(call, tmp_path):
    run = tmp_path / "run"
    full = [*SMALL, "lora.rank=0"]
    assert call(train.main, "--config", "tiny", "--set", f"run_dir={run}", *full)[0] == 0
    path = run / "final" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    refused(call(evaluate.main, "--checkpoint", run), str(run / "final"))


def test_no_user_at_all_is_no_personal_model(call, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "usr": "alice"}\n' * 9)
    refused(
        call(train.main, "--config", "tiny", "--set", f"data.train={path}", f"run_dir={tmp_path / 'r'}"),
        "no comparison has a user, in the field 'user'; fields that look like users: 'usr' (data.user_column",
        "expected users, or user_model.kind=uniform",
    )
    vanilla = (*SMALL, "user_model.kind=uniform", "user_model.tokens=0", "data.valid=null", "data.min_prompt_tokens=1")
    path.write_text(path.read_text().replace("usr", "worker"))
    told = call(train.main, "--config", "tiny", "--set", f"data.train={path}", f"run_dir={tmp_path / 'r'}", *vanilla)
    assert (
        told[0] == 0
        and "no comparison has a user, in the field 'user'; fields that look like users: 'worker'" in told[1]
    )


def with_users(path, **names):
    """The tiny validation file with other names for its users, or with the names in another field (`user="worker"`)."""
    field = names.pop("user", "user")
    records = [json.loads(line) for line in Path("examples/tiny/valid.jsonl").read_text().splitlines()]
    records = [{**r, field: names.get(r["user"], r["user"])} for r in records]
    if field != "user":
        records = [{name: value for name, value in r.items() if name != "user"} for r in records]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path, [r.get("user") for r in records]


def test_held_out_users_whom_nobody_knows_are_told(call, finished, tmp_path):
    """In another field, all of them under other names, and one of them under another name."""
    train_it = ("--config", "tiny", "--set", f"run_dir={tmp_path / 'r'}", *SMALL)
    out = ("--out", tmp_path / "eval", "--set", "evaluate.bootstrap=100")
    for names, part in (
        ({"user": "worker"}, "no comparison has a user, in the field 'user'; fields that look like users: 'worker'"),
        ({u: u.upper() for u in ("alice", "bob", "carol", "dave")}, "'ALICE' (known: 'alice')"),
    ):
        path, _ = with_users(tmp_path / "v.jsonl", **names)
        refused(call(train.main, *train_it, f"data.valid={path}"), str(path), part, "data.new_users=true")
        refused(call(train.main, *train_it, f"data.valid={path}", "--dry-run"), str(path), part)
        refused(call(evaluate.main, "--checkpoint", finished, "--data", path), str(path), part, "data.new_users=true")
        status, said, _ = call(evaluate.main, "--checkpoint", finished, "--data", path, *out, "data.new_users=true")
        assert status == 0 and part in said
        assert json.loads((tmp_path / "eval" / "report.json").read_text())["comparisons"]["known_users"] == 0
    path, users = with_users(tmp_path / "v.jsonl", alice="Alice")
    count = f"1 ('Alice'), with {users.count('Alice')} of {len(users)} comparisons; known but for"
    status, said, _ = call(evaluate.main, "--checkpoint", finished, "--data", path, *out)
    assert status == 0 and f"{path}: users who are not known: {count}" in said
    status, said, _ = call(train.main, *train_it, f"data.valid={path}")
    assert status == 0 and f"{path}: users who are not known: {count}" in said


def test_users_of_an_earlier_run_are_found(call, copied, tmp_path):
    """Whose users.json has names as a file of pandas spelt them."""
    (copied / "final" / "users.json").write_text(json.dumps({"users": ["1.0", "2.0", "3.0", "4.0"]}))
    numbers = {"alice": 1, "bob": 2.0, "carol": "3", "dave": "4.0"}
    path, users = with_users(tmp_path / "v.jsonl", **numbers)
    assert call(evaluate.main, "--checkpoint", copied, "--data", path)[0] == 0
    report = json.loads((copied / "eval" / "report.json").read_text())
    assert report["comparisons"]["known_users"] == sum(user is not None for user in users) > 0
    assert set(report["per_user"]) == {str(i) for i in range(1, 5)}


def test_own_users_whom_nobody_knows_are_told(call, finished, tmp_path):
    path, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    arguments = ["--checkpoint", finished, "--prompts", path, "--users", "@own", "--out", out, "--max-new-tokens", 1]
    path.write_text('{"prompt": "a", "user": "Bob"}\n{"prompt": "b"}\n')
    refused(call(generate.main, *arguments), "not known: 1 ('Bob'), with 1 of 2 prompts", "'Bob' (known: 'bob')")
    path.write_text('{"prompt": "a", "user_id": "bob"}\n{"prompt": "b"}\n')
    refused(call(generate.main, *arguments), "no prompt has a user", "'user_id'")
    assert not out.exists()
    path.write_text('{"prompt": "a", "user": "Bob"}\n{"prompt": "b", "user": " bob"}\n')
    status, said, _ = call(generate.main, *arguments)
    assert status == 0 and "not known: 1 ('Bob'), with 1 of 2 prompts" in said
    assert [json.loads(line)["user"] for line in out.read_text().splitlines()] == ["Bob", "bob"]


def test_an_evaluation_is_not_lost_for_its_figure_nor_mixed_with_another(call, copied, monkeypatch):
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "user_acc')
    status, _, err = call(evaluate.main, "--checkpoint", copied)
    assert status == 0 and "warning: no curve" in err and "not valid JSON" in err
    report = copied / "eval" / "report.json"
    assert report.is_file()
    monkeypatch.setattr(evaluate, "write_report", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    assert call(evaluate.main, "--checkpoint", copied)[0] == 2
    assert not report.exists()  # its margins were replaced


def test_a_report_cannot_replace_a_file(call, finished, tmp_path):
    (tmp_path / "notes").write_text("mine")
    refused(call(evaluate.main, "--checkpoint", finished, "--out", tmp_path / "notes"), str(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_sequence_beyond_the_models_positions(call, finished, tmp_path):
    arguments = ["--checkpoint", finished, "--prompts", "examples/tiny/prompts.jsonl", "--users", "alice"]
    refused(call(generate.main, *arguments, "--out", tmp_path / "o", "--max-new-tokens", 5000), "the model reads 4096")


def test_another_base_model_is_noticed(call, copied):
    base = json.loads((copied / "final" / "base.json").read_text())
    (copied / "final" / "base.json").write_text(json.dumps({**base, "fingerprint": "0" * 32}))
    refused(call(evaluate.main, "--checkpoint", copied), "not those that this model was trained from")


def test_weights_that_are_not_finite_are_no_accuracy(call, copied):
    path = copied / "final" / "users.safetensors"
    save_file({name: t * math.nan for name, t in load_file(path).items()}, path)
    refused(call(evaluate.main, "--checkpoint", copied), "not finite")


def test_bad_input_to_generate(call, finished, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"prompt": "hi"}\n{"promt": "hi"}\n')
    common = ["--checkpoint", finished, "--out", out]
    good = [*common, "--prompts", "examples/tiny/prompts.jsonl"]
    refused(call(generate.main, *good, "--users", "alcie"), "'alcie' is not known", "'alice'")
    refused(call(generate.main, *good, "--users", ""), "user '' is not known")
    out.write_text("kept")
    bad = [*common, "--prompts", prompts, "--users", "alice", "--overwrite"]
    refused(call(generate.main, *bad), f"{prompts}, line 2", "'prompt'")
    prompts.write_text('{"prompt": "hi", "id": 1}\n{"prompt": "ho", "id": "1"}\n')
    refused(call(generate.main, *bad), f"{prompts}, line 2", "'1' was given in line 1")
    assert out.read_text() == "kept"  # --overwrite has not begun
    out.unlink()
    refused(call(generate.main, *good, "--users", "alice", "--top-p", "2"), "--top-p: found 2, expected")
    refused(call(generate.main, *good, "--users", "alice", "--max-new-tokens", "0"), "--max-new-tokens: found 0")
    assert not out.exists()
    out.write_text("my notes\n")
    refused(call(generate.main, *good, "--users", "alice"), str(out), "--overwrite")
    assert out.read_text() == "my notes\n"


def test_no_secret_of_the_environment_is_written(call, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    chosen = ["--checkpoint", finished]
    answers = ["--prompts", "examples/tiny/prompts.jsonl", "--users", "alice", "--max-new-tokens", 2]
    said = [
        call(evaluate.main, *chosen, "--out", tmp_path / "eval"),
        call(generate.main, *chosen, *answers, "--out", tmp_path / "answers.jsonl"),
        call(train.main, "--config", "tiny", "--set", f"model.name={tmp_path}", f"run_dir={tmp_path / 'none'}"),
    ]
    assert [status for status, *_ in said] == [0, 0, 2]
    assert SECRET not in "".join(text for _, *texts in said for text in texts)
    files = [file for folder in (finished.parent, tmp_path) for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 15 and not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_a_gpu_that_is_full_says_what_to_change(call):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    def broken():
        raise RuntimeError("a bug")

    status, _, err = call(full)
    assert status == 1 and "CUDA out of memory. Tried to allocate 2.00 GiB." in err and "evaluate.batch_size" in err
    assert "Traceback" not in err
    with pytest.raises(RuntimeError, match="a bug"):
        call(broken)


def test_replicas_that_do_not_fit_the_processes_are_refused(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(call(train.main, "--config", "tiny", "--set", "fsdp.replicas=3"), "fsdp.replicas: found 3", "2 processes")


def test_generating_is_one_process(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = ("--checkpoint", "c", "--prompts", "p", "--users", "generic", "--out", "o")
    refused(call(generate.main, *asked), "generate.py: found 2 processes, expected one")


def test_training_without_any_evaluation(call, tmp_path):
    run = tmp_path / "run"
    keys = ("train.eval_every=null", "train.eval_last=false")
    assert call(train.main, "--config", "tiny", "--set", f"run_dir={run}", *SMALL, *keys)[0] == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records and not any(record.get("eval") for record in records)
    refused(
        call(train.main, "--config", "tiny", "--set", f"run_dir={tmp_path / 'r'}", *keys, "train.final=best"),
        "train.final",
        "needs evaluations",
    )
