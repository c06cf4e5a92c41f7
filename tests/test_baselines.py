"""Baselines that train nothing: the base of a run as a generator, beside Hugging Face's own decoding of the base model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prlhf.backbone.loading import load_backbone, load_tokenizer
from prlhf.batch.tokens import bos_ids
from prlhf.config.load import load_resolved
from prlhf.generate import __main__ as generate
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "model.width=32",
    "model.heads=2",
    "optim.epochs=1",
    "data.limit=16",
    "data.valid_limit=12",
    "train.eval_last=false",
)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(folder, *keys):
    """A finished tiny run whose weights are far from the base's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(folder.parent / "cache"))
        patch.setattr(sys, "argv", ["train.py", "--config", "tiny", "--set", f"run_dir={folder}", *SMALL, *keys])
        train.main()
    torch.manual_seed(1)
    for path in (folder / "final").glob("*.safetensors"):
        weights = {name: t + 0.3 * torch.randn_like(t) for name, t in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["lora.rank=2", "lora.rank=0"])
def run(request, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "run", request.param)


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
    """The base model and its tokenizer as the config has them, by Hugging Face's classes alone."""
    config = load_resolved(run / "final" / "config.yaml")
    tokenizer = load_tokenizer(config.model, run / "final")
    return load_backbone(config.model, tokenizer, config.seed).eval(), tokenizer


def continued(run, text):
    """The greedy continuation of a text by the base model's own `generate`."""
    model, tokenizer = base_of(run)
    ids = torch.tensor([bos_ids(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_base_answers_as_the_model_that_training_started_from(run, answered, monkeypatch):
    """Each user gets one answer, which is computed once; the trained model answers otherwise."""
    computed = []

    def counted(model, requests, *rest, generate=generate.generate):
        computed.extend(requests)
        return generate(model, requests, *rest)

    monkeypatch.setattr(generate, "generate", counted)
    found = answered(run, "--baseline", "base")
    assert [(r["id"], r["user"]) for r in found] == [(f"p{i}", u) for i in range(4) for u in ("alice", "generic")]
    assert [r["response"] for r in found] == [continued(run, r["prompt"]) for r in found]
    assert len(computed) == 4
    trained = answered(run, out="trained")
    assert all(a["response"] != b["response"] for a, b in zip(found, trained)) and len(computed) == 12


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


def test_the_base_of_a_reward_model_answers(tmp_path, answered, call):
    """Its policy does not."""
    run = trained(tmp_path / "prm" / "run", "method=prm", "lora.rank=2")
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
