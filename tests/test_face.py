"""`import prlhf` and the console command: text and names in, the numbers of evaluate.py and generate.py out."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import prlhf
from prlhf import __main__ as console
from prlhf.errors import UserError
from prlhf.evaluate import __main__ as evaluate
from prlhf.generate import __main__ as generate
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "model.width=32", "model.heads=2", "optim.epochs=1", "data.limit=16", "data.valid_limit=12", "evaluate.bootstrap=100",
    "train.eval_last=false",
)  # fmt: skip
MODELS = {
    "pdpo": ("lora.rank=2",),
    "full": ("lora.rank=0",),
    "simpo": ("lora.rank=2", "loss.kind=simpo"),
    "prm": ("lora.rank=2", "method=prm"),
    "pairwise": ("lora.rank=2", "method=pairwise"),
}
VALID = [json.loads(line) for line in (ROOT / "examples/tiny/valid.jsonl").read_text().splitlines()]
PROMPTS = [json.loads(line)["prompt"] for line in (ROOT / "examples/tiny/prompts.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of a finished run by name, trained when first asked for."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(ROOT)
                overrides = [f"run_dir={folder / name}", *SMALL, *MODELS[name]]
                patch.setattr(sys, "argv", ["train.py", "--config", "tiny", "--set", *overrides])
                train.main()
            found[name] = folder / name
        return found[name]

    return run


@pytest.mark.parametrize("name", MODELS)
def test_margins_are_those_of_evaluate(call, runs, tmp_path, name):
    run, out = runs(name), tmp_path / "eval"
    assert call(evaluate.main, "--checkpoint", run, "--data", "examples/tiny/valid.jsonl", "--out", out)[0] == 0
    written = [json.loads(line) for line in (out / "margins.jsonl").read_text().splitlines()]
    model = prlhf.load(run)
    assert [c["id"] for c in VALID] == [line["id"] for line in written]
    assert model.margins(VALID) == pytest.approx([line["true"] for line in written], abs=1e-5)
    users = [None, "generic"] * (len(VALID) // 2)
    assert model.margins(VALID, users=users) == pytest.approx([line["generic"] for line in written], abs=1e-5)
    assert model.margins([]) == []


def test_a_comparison_names_its_user_in_either_column(runs):
    by_user = {**VALID[0], "user": "alice"}
    by_column = {**{key: value for key, value in VALID[0].items() if key != "user"}, "worker": "alice"}
    model = prlhf.load(runs("prm"), "data.user_column=worker")
    assert model.margins([by_user]) == model.margins([by_column]) != model.margins([by_user], users="generic")


def test_generate_answers_as_the_command_does(call, runs, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    arguments = ("--checkpoint", runs("pdpo"), "--prompts", prompts, "--users", "alice,generic", "--out", out, *options)
    assert call(generate.main, *arguments)[0] == 0
    written = {(r["id"], r["user"]): r["response"] for r in map(json.loads, out.read_text().splitlines())}
    model = prlhf.load(runs("pdpo"))
    names = ["alice", None, "generic", "alice"]
    expected = [written[str(i + 1), name or "generic"] for i, name in enumerate(names)]
    assert model.generate(PROMPTS, users=names, batch_size=3, **settings) == expected
    assert model.generate(PROMPTS, users="alice", **settings) == [written[str(i + 1), "alice"] for i in range(4)]


def test_a_reward_model_scores_as_the_command_does(call, runs, tmp_path):
    lines = [{key: c.get(key) for key in ("prompt", "user", "user_text")} | {"response": c["chosen"]} for c in VALID]
    lines.append({"prompt": "Tell me about rain.\n", "response": "Rain. " * 10, "user": "bob", "user_text": None})
    responses, out = tmp_path / "responses.jsonl", tmp_path / "rewards.jsonl"
    responses.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call(generate.main, "--checkpoint", runs("prm"), "--score", responses, "--out", out)[0] == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    model = prlhf.load(runs("prm"))
    users = [line["user"] if record["known"] else None for line, record in zip(lines, written)]
    prompts, answers, texts = ([line[key] for line in lines] for key in ("prompt", "response", "user_text"))
    found = model.score(prompts, answers, users=users, user_texts=texts)
    assert found == pytest.approx([record["reward"] for record in written], abs=1e-5)
    assert any(users) and len(set(found)) > len(found) // 2


def test_a_language_model_scores_log_probs(runs):
    """SimPO's margin, which evaluate.py agrees with, is beta times the difference of log pi(y | x, u) / |y|."""
    model = prlhf.load(runs("simpo"))
    assert "alice" in model.users and len(set(model.users)) == len(model.users)
    comparisons = [{**c, "user_text": None} for c in VALID]
    prompts, beta, encoder = [c["prompt"] for c in VALID], model.config.loss.beta, model.encoder
    sides = []
    for side in ("chosen", "rejected"):
        texts = [c[side] for c in VALID]
        log_probs = model.score(prompts, texts, users="alice")
        assert all(value < 0 for value in log_probs)
        lengths = [len(encoder.response_ids(encoder.read(x, "f"), y)[0].ids) for x, y in zip(prompts, texts)]
        sides.append([value / length for value, length in zip(log_probs, lengths)])
    expected = [beta * (chosen - rejected) for chosen, rejected in zip(*sides)]
    assert model.margins(comparisons, users="alice") == pytest.approx(expected, abs=1e-5)
    assert model.score([], []) == []


def test_a_message_list_goes_through_the_template(runs):
    model = prlhf.load(runs("prm"), "data.template=tulu")
    as_text = model.score(["Hi"], ["Hello."])
    assert as_text == model.score([[{"role": "user", "content": "Hi"}]], ["Hello."])
    assert as_text != prlhf.load(runs("prm")).score(["Hi"], ["Hello."])


def test_what_a_model_cannot_do_is_said(runs, tmp_path):
    model, reward, pairwise = (prlhf.load(runs(name)) for name in ("pdpo", "prm", "pairwise"))
    refusals = [
        (lambda: model.generate(["Hi"], users="alicia"), "did you mean 'alice'"),
        (lambda: model.generate(["Hi", "Ho"], users=["alice"]), "users: found 1, expected 2"),
        (lambda: model.generate("Hi"), "expected a list"),
        (lambda: model.score(["Hi"], "Ho"), "expected a list"),
        (lambda: model.margins(VALID[0]), "expected a list"),
        (lambda: model.generate(["Hi"], temperature=-1.0), "temperature: found -1, expected at least 0"),
        (lambda: model.generate(["Hi"], max_new_tokens=0), "max_new_tokens: found 0, expected at least 1"),
        (lambda: model.generate(["Hi", 3]), r"prompts\[1\], prompt: expected text"),
        (lambda: reward.generate(["Hi"]), "method prm does not generate"),
        (lambda: pairwise.score(["Hi"], ["Ho"]), "method pairwise compares two responses"),
        (lambda: model.score(["Hi"], [None]), r"responses\[0\]: expected text"),
        (lambda: model.margins([VALID[0], {"prompt": "Hi", "chosen": "Ho"}]), r"comparisons\[1\]: no field 'rejected'"),
        (lambda: model.margins([{**VALID[0], "chosen": "Ho " * 2000}]), r"comparisons\[0\].*data.max_tokens"),
        (lambda: prlhf.load(tmp_path / "none"), "no such checkpoint"),
        (lambda: prlhf.load(runs("pdpo"), "lora.rank=4"), "another model"),
    ]
    for refused, message in refusals:
        with pytest.raises(UserError, match=message):
            refused()


def test_importing_prlhf_does_not_import_torch():
    code = "import sys, prlhf; assert 'torch' not in sys.modules and 'numpy' not in sys.modules, prlhf.load"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", console.COMMANDS)
def test_each_command_prints_its_help(call, name):
    status, out, _ = call(console.main, name, "--help")
    assert status == 0 and "usage: " in out and "--help" in out


def test_the_console_command_names_its_commands(call):
    status, out, _ = call(console.main)
    assert status == 0 and all(f"  {name} " in out for name in console.COMMANDS)
    status, _, err = call(console.main, "tain")
    assert status == 2 and "no command 'tain' (did you mean 'train'?)" in err


@pytest.mark.parametrize("script", ["train", "evaluate", "generate"])
def test_root_scripts_are_the_commands(script):
    file = importlib.util.spec_from_file_location(f"root_{script}", ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    assert module.main is importlib.import_module(f"prlhf.{script}.__main__").main


def test_the_readme_quotes_the_plain_method():
    quoted = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n    loss =")[2].partition("```")[0]
    assert quoted and f"    loss ={quoted}" in (ROOT / "prlhf/method/plain.py").read_text(encoding="utf-8")
