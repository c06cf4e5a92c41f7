"""Baselines that train nothing: the base of a run as a generator, beside Hugging Face's own decoding of the base model."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prlhf.backbone.loading import load_backbone, load_tokenizer
from prlhf.batch.tokens import bos_ids
from prlhf.compare import __main__ as compare
from prlhf.config.keys import ModelConfig
from prlhf.config.load import load_resolved
from prlhf.data.comparisons import Prompt
from prlhf.evaluate import __main__ as evaluate
from prlhf.generate import __main__ as generate
from prlhf.judge.baselines import find_baseline
from prlhf.store.final import load_final
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "optim.epochs=1",
    "data.limit=40",
    "data.valid_limit=12",
    "train.eval_last=false",
)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("prlhf.evaluate.figures.optional_pyplot", lambda: None)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model on disk, of so large random weights that every word that it reads matters."""
    folder = tmp_path_factory.mktemp("base") / "base"
    config = ModelConfig(family="llama", width=32, heads=2)
    tokenizer = load_tokenizer(config)
    model = load_backbone(config, tokenizer, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder, base, *keys):
    """A finished tiny run whose weights are far from the base's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(folder.parent / "cache"))
        named = (f"run_dir={folder}", f"model.name={base}", "model.family=null")
        patch.setattr(sys, "argv", ["train.py", "--config", "tiny", "--set", *named, *SMALL, *keys])
        train.main()
    torch.manual_seed(1)
    for path in (folder / "final").glob("*.safetensors"):
        weights = {name: t + 0.3 * torch.randn_like(t) for name, t in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "run", base, "lora.rank=2")


@pytest.fixture
def answered(call, tmp_path):
    """generate.py on the tiny prompts; what it wrote."""

    def answer(run, *more, out="out", users="alice,generic", prompts="examples/tiny/prompts.jsonl"):
        arguments = ("--checkpoint", run, "--prompts", prompts, "--users", users, "--max-new-tokens", 8)
        status, _, err = call(generate.main, *arguments, "--out", tmp_path / out, *more)
        assert status == 0, err
        return rows(tmp_path / out)

    return answer


def base_of(run):
    """The base model and its tokenizer, by Hugging Face's classes alone."""
    name = load_resolved(run / "final" / "config.yaml").model.name
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True).eval(), AutoTokenizer.from_pretrained(name)


def continued(run, text):
    """The greedy continuation of a text by the base model's own `generate`."""
    model, tokenizer = base_of(run)
    ids = torch.tensor([bos_ids(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("tuning", ["lora.rank=2", "lora.rank=0", "model.frozen=true"])
def test_the_base_answers_as_the_model_that_training_started_from(tuning, base, tmp_path, answered, monkeypatch):
    """Each user gets one answer, which is computed once; the trained model answers otherwise."""
    run = trained(tmp_path / "run" / "run", base, tuning)
    computed = []

    def counted(model, requests, *rest, generate=generate.generate):
        computed.extend(requests)
        return generate(model, requests, *rest)

    monkeypatch.setattr(generate, "generate", counted)
    found = answered(run, "--baseline", "base")
    assert [(r["id"], r["user"]) for r in found] == [(f"p{i}", u) for i in range(4) for u in ("alice", "generic")]
    assert [r["response"] for r in found] == [continued(run, r["prompt"]) for r in found]
    assert len(computed) == 4
    own = answered(run, out="trained")
    assert all(a["response"] != b["response"] for a, b in zip(found, own)) and len(computed) == 12


def test_the_base_reads_no_text_about_the_user(run, answered, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"id": "p0", "prompt": "Tell me about apples.\n", "user": "bob", "user_text": "I like jokes."})
    )
    (found,) = answered(run, "--baseline", "base", users="@own", prompts=prompts)
    assert found["response"] == continued(run, "Tell me about apples.\n") and found["user_text"] == "I like jokes."


def test_users_who_read_the_same_sample_their_own_answers(run, answered):
    found = answered(run, "--baseline", "base", "--temperature", 3)
    assert len({r["response"] for r in found}) == len(found) == 8


def test_the_base_of_a_reward_model_answers(base, tmp_path, answered, call):
    """Its policy does not."""
    run = trained(tmp_path / "prm" / "run", base, "method=prm", "lora.rank=2")
    found = answered(run, "--baseline", "base")
    assert [r["response"] for r in found] == [continued(run, r["prompt"]) for r in found]
    asked = (
        "--checkpoint",
        run,
        "--prompts",
        "examples/tiny/prompts.jsonl",
        "--users",
        "generic",
        "--out",
        tmp_path / "o",
    )
    assert "a model of method prm does not generate" in call(generate.main, *asked)[2]


def test_bad_input_is_refused(call, run, answered, tmp_path):
    answered(run, out="trained")
    before = (tmp_path / "trained").read_bytes()
    asked = ("--checkpoint", run, "--prompts", "examples/tiny/prompts.jsonl", "--users", "generic", "--out")
    named = ("--baseline", "base")
    cases = {
        (*asked, tmp_path / "new", "--baseline", "bases"): "no such baseline (did you mean 'base'?); expected",
        (*asked, tmp_path / "trained", *named): "was written with other settings (baseline: None -> 'base'",
        ("--checkpoint", run, "--score", "x", "--out", tmp_path / "new", *named): "--baseline: not for --score",
    }
    for arguments, part in cases.items():
        status, _, err = call(generate.main, *arguments)
        assert status == 2 and part in err, err
        assert not (tmp_path / "new").exists() and (tmp_path / "trained").read_bytes() == before


# Told of users


def training(run):
    """The run's training comparisons, in order: a seeded sample of the file, as its config says."""
    config = load_resolved(run / "final" / "config.yaml")
    lines = rows(ROOT / config.data.train)
    return [lines[i] for i in sorted(random.Random(config.seed).sample(range(len(lines)), config.data.limit))]


def as_user(known):
    return f"You answer a user. {known}\n\nAnswer as this user would like to be answered."


def test_roleplay_tells_the_text_about_the_user_and_no_more(run, answered, tmp_path):
    """The latest text of the user's in training, before a prompt as text, or in the system message; the base where there is none."""
    texts = {r["user"]: r["user_text"] for r in training(run) if r["user"] and r.get("user_text")}
    user = next(iter(texts))
    told = as_user(f"What is known about the user:\n{texts[user]}")
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hum?"},
    ]
    asked = {"text": "Tell me.\n", "talk": talk, "system": [{"role": "system", "content": "Be."}, *talk]}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": name, "prompt": prompt}) + "\n" for name, prompt in asked.items()))
    found = {
        (r["id"], r["user"]): r
        for r in answered(run, "--baseline", "roleplay", users=f"{user},generic", prompts=prompts)
    }
    rest = "user: Hi\nassistant: Ho\nuser: Hum?\nassistant:"  # as the tiny tokenizer's template has it
    expected = {
        ("text", user): f"{told}\n\nTell me.\n", ("text", "generic"): "Tell me.\n",
        ("talk", user): f"system: {told}\n{rest}", ("talk", "generic"): rest,
        ("system", user): f"system: {told}\n\nBe.\n{rest}", ("system", "generic"): f"system: Be.\n{rest}",
    }  # fmt: skip
    assert {key: r["response"] for key, r in found.items()} == {
        key: continued(run, text) for key, text in expected.items()
    }
    assert [json.dumps(r["prompt"]) for r in found.values()] == [
        json.dumps(p) for p in asked.values() for _ in range(2)
    ]


def test_roleplay_tells_what_a_judge_is_told(run, tmp_path):
    """By hand: text and statements of the known user's lines in training, of other prompts; attributes where there is no text."""
    mine = {"user": "alice", "chosen": "y", "rejected": "n"}
    lines = [
        {**mine, "prompt": "p", "reason": "of the prompt"},
        {**mine, "prompt": "q", "reason": "too long", "aspects": "style", "attributes": {"age": "30", "job": "cook"}},
        {**mine, "prompt": "r", "rejected": "y", "reason": "of no choice"},
        {**mine, "prompt": "s", "user": "stranger", "reason": "a stranger's"},
    ]
    (tmp_path / "train").write_text("".join(json.dumps(r) + "\n" for r in lines))
    asked = [(Prompt("p", "p", None, None, ""), user) for user in ("alice", "stranger")]

    def told(name, *more):
        loaded = load_final(run, (f"data.train={tmp_path / 'train'}", *more))
        return [prompt.text for prompt in find_baseline(loaded, name, 0).prompts(asked)]

    said = "What the user said about other answers:\n- too long\n- What mattered: style"
    known = "What is known about the user:\n"
    assert told("roleplay") == [as_user(f"{known}age: 30\njob: cook\n\n{said}") + "\n\np", "p"]
    assert told("roleplay", "data.attributes=[job]") == [as_user(f"{known}job: cook\n\n{said}") + "\n\np", "p"]
    (few, _) = told("fewshot:9")
    assert few.count("[Prompt]") == 1 and "[Prompt]\nq\n" in few and "too long" not in few


def test_fewshot_tells_comparisons_of_the_user_and_never_of_the_prompt(call, run, tmp_path):
    """Every one is among the user's training comparisons, other seeds draw others, and the response is that of the whole text."""
    own = [r for r in training(run) if r["user"] == "alice"]
    assert len(own) > 2
    blocks = {
        f"[Prompt]\n{r['prompt']}\n[The response that the user preferred]\n{r['chosen']}\n"
        f"[The response that the user did not prefer]\n{r['rejected']}": r
        for r in own
    }
    asked = Prompt("p", own[0]["prompt"], None, None, "")
    drawn = set()
    for seed in range(20):
        (told,) = find_baseline(load_final(run), "fewshot:2", seed).prompts([(asked, "alice")])
        before = as_user("Earlier choices of this user:\n\n{}").partition("{}")
        inside = told.text.removeprefix(before[0]).removesuffix(f"{before[2]}\n\n{asked.text}")
        examples = tuple("[Prompt]" + part.rstrip("\n") for part in inside.split("[Prompt]")[1:])
        assert len(examples) == 2
        assert all(e in blocks and blocks[e]["prompt"] != asked.text for e in examples)
        drawn.add(examples)
    assert len(drawn) > 2
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "p", "prompt": asked.text}) + "\n")
    arguments = ("--checkpoint", run, "--prompts", tmp_path / "p.jsonl", "--users", "alice", "--max-new-tokens", 8)
    status, _, err = call(generate.main, *arguments, "--out", tmp_path / "o", "--baseline", "fewshot:2", "--seed", 19)
    assert status == 0 and rows(tmp_path / "o")[0]["response"] == continued(run, told.text), err


def test_without_examples_it_is_the_base(run, answered):
    base, none = (answered(run, "--baseline", name, out=name) for name in ("base", "fewshot:0"))
    assert none == base


# As predictors


def question(c, first, second, known="", who="the"):
    """What the base is asked, by hand."""
    about = f"\n{known}\n" if known else ""
    return (
        f"user: You play a user of an AI assistant, and say which of two responses this user prefers.\n{about}\nNow the user is "
        f"asked to choose.\n\n[Prompt]\n{c['prompt']}\n[Response A]\n{first}\n[Response B]\n{second}\n\nWhich response does {who} user "
        "prefer?\nAnswer with A or B alone.\nassistant:"
    )


def letters(model, tokenizer, text):
    """ln p(A) - ln p(B) of the token behind a text, by the base model's own forward pass."""
    ids = bos_ids(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "AB")
    with torch.no_grad():
        log_p_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return (log_p_V[a[0]] - log_p_V[b[0]]).item()


@pytest.fixture
def predicted(call, tmp_path):
    """evaluate.py with a baseline; the folder that it wrote."""

    def predict(run, name, *more):
        out = tmp_path / name.replace(":", "")
        status, said, err = call(evaluate.main, "--checkpoint", run, "--baseline", name, "--out", out, *more)
        assert status == 0, err
        assert f"by prompting alone: {name}." in said
        return out

    return predict


def test_margins_are_the_letters_of_the_bases_own_forward_pass(run, predicted):
    """roleplay: as the true user, with nothing known, and as another, in both orders; with nothing known, the base's."""
    texts = {r["user"]: r["user_text"] for r in training(run) if r["user"] and r.get("user_text")}
    found = {(r["id"], r["user"]): r for r in rows(predicted(run, "roleplay") / "margins.jsonl")}
    held_out = {
        (r["id"], r["user"]): r for r in rows(ROOT / "examples/tiny/valid.jsonl") if (r["id"], r["user"]) in found
    }
    assert len(found) == len(held_out) == 12 and {r["known"] for r in found.values()} == {True, False}
    model, tokenizer = base_of(run)

    def margin(c, text):
        known = (f"What is known about the user:\n{text}", "this") if text else ()
        orders = (c["chosen"], c["rejected"]), (c["rejected"], c["chosen"])
        first, second = (letters(model, tokenizer, question(c, *order, *known)) for order in orders)
        return (first - second) / 2

    told = set()
    for key, c in held_out.items():
        row, users = found[key], {r["user"] for r in training(run)} - {None, c["user"]}
        own = (texts.get(c["user"]) if row["known"] else None) or c.get("user_text")
        assert row["true"] == pytest.approx(margin(c, own), abs=1e-4)
        assert row["generic"] == pytest.approx(margin(c, None if row["known"] else own), abs=1e-4)
        others = [margin(c, texts.get(user)) for user in users] if row["known"] else [row["true"]]
        assert min(abs(row["shuffled"] - other) for other in others) < 1e-4
        told.add(own)
    assert len(told) > 2  # several texts, and none
    assert max(abs(r["true"] - r["generic"]) for r in found.values()) > 0.01


def test_the_base_predicts_without_users_and_what_it_is_told_matters(run, predicted):
    base, few = (rows(predicted(run, name) / "margins.jsonl") for name in ("base", "fewshot:1"))
    assert all(r["true"] == r["generic"] == r["shuffled"] for r in base)
    for plain, told in zip(base, few):
        assert told["generic"] == pytest.approx(plain["generic"], abs=1e-6)
        assert (
            (abs(told["true"] - plain["true"]) > 1e-5) == told["known"] == (abs(told["shuffled"] - told["true"]) > 1e-9)
        )


def test_a_baseline_is_antisymmetric_in_the_responses(run, predicted, tmp_path):
    lines = rows(ROOT / "examples/tiny/valid.jsonl")[:8]
    margins = []
    for name, (chosen, rejected) in {"as they are": ("chosen", "rejected"), "swapped": ("rejected", "chosen")}.items():
        path = tmp_path / name
        path.write_text("".join(json.dumps({**r, "chosen": r[chosen], "rejected": r[rejected]}) + "\n" for r in lines))
        margins.append([r["true"] for r in rows(predicted(run, "fewshot:2", "--data", path) / "margins.jsonl")])
    assert margins[0] == pytest.approx([-m for m in margins[1]], abs=1e-5) and any(abs(m) > 1e-3 for m in margins[0])


def test_a_baselines_files_are_compared_with_its_runs(call, run, predicted, tmp_path):
    assert call(evaluate.main, "--checkpoint", run)[0] == 0
    before = (run / "eval" / "report.json").read_bytes()
    few = predicted(run, "fewshot:2")
    assert call(evaluate.main, "--checkpoint", run, "--baseline", "fewshot:2")[0] == 0
    assert (run / "eval_fewshot2" / "margins.jsonl").read_bytes() == (few / "margins.jsonl").read_bytes()
    assert (run / "eval" / "report.json").read_bytes() == before
    status, said, err = call(compare.main, f"fewshot={few}", f"run={run}", "--out", tmp_path / "compared")
    assert status == 0 and "fewshot" in said, err
    report = json.loads((few / "report.json").read_text())
    assert (
        report["baseline"] == "fewshot:2"
        and report["comparisons"]["known_users"] + report["comparisons"]["unknown_users"] == 12
    )
    right = [r["true"] > 0 for r in rows(few / "margins.jsonl") if r["known"]]
    assert report["accuracy"]["top"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("name", ["fewshot", "fewshot:", "fewshot:-1", "fewshot:two", "roleplay:2", "role"])
def test_there_is_no_other_baseline(call, run, tmp_path, name):
    expected = "expected one of base, roleplay, fewshot:N"
    assert expected in call(evaluate.main, "--checkpoint", run, "--baseline", name, "--out", tmp_path / "new")[2]
    asked = ("--prompts", "examples/tiny/prompts.jsonl", "--users", "generic", "--out", tmp_path / "new")
    assert expected in call(generate.main, "--checkpoint", run, *asked, "--baseline", name)[2]
    assert not (tmp_path / "new").exists()


def test_what_there_is_nothing_to_tell_is_refused(call, run, tmp_path):
    """Training comparisons that are gone; users of whom nothing is known; examples that the base cannot read in one go."""
    asked = ("--checkpoint", run, "--prompts", "examples/tiny/prompts.jsonl", "--out", tmp_path / "new")
    gone = (*asked, "--users", "alice", "--baseline", "fewshot:2", "--set", "data.train=gone.jsonl")
    cases = {
        gone: "data.train, gone.jsonl, is not there",
        (
            *asked,
            "--users",
            "generic",
            "--baseline",
            "roleplay",
        ): "found no user with a text (user_text, attributes) or a statement (reason, aspects)",
        (*asked, "--users", "generic", "--baseline", "fewshot:2"): "found no user with training comparisons to tell",
    }
    for arguments, part in cases.items():
        status, _, err = call(generate.main, *arguments)
        assert status == 2 and part in err and not (tmp_path / "new").exists(), err
