"""The benchmarks' own parts run, at toy size; what they compare with is not installed here."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from prlhf.backbones import byte_tokenizer, load_weights, random_backbone
from prlhf.config import ModelConfig
from prlhf.encoding import EncodedComparison

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script, *arguments):
    found = subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture
def model(tmp_path):
    folder, tokenizer = tmp_path / "model", byte_tokenizer()
    random_backbone(ModelConfig(family="llama", width=32, heads=2), len(tokenizer), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_step_prints_a_table_and_writes_json(model, tmp_path):
    out = tmp_path / "step.json"
    arms = ("--arms", "prlhf", "prlhf pdpo", "rows", "rows once")
    table = run("step.py", "--model", model, "--comparisons", 2, "--rounds", 2, "--out", out, *arms)
    written = json.loads(out.read_text())
    assert [row["arm"] for row in written["rows"]] == ["prlhf", "prlhf pdpo", "rows", "rows once"]
    assert "| prlhf pdpo | " in table and "matmul rate: " in table
    # share times seconds is an arm's useful work: the same for both ways to compute P-DPO, less without a user
    work = {
        row["arm"]: row["share_of_matmul_rate"] * statistics.median(written["seconds"][row["arm"]])
        for row in written["rows"]
    }
    assert [work["rows"], work["rows once"]] == pytest.approx([work["prlhf pdpo"]] * 2)
    assert 0 < work["prlhf"] < work["rows"]


def test_the_share_of_the_matmul_rate_is_useful_flops_over_what_the_time_allows(model, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step
    from shapes import useful_flops

    args = argparse.Namespace(model=str(model), lora=0)
    comparisons = [EncodedComparison([5] * 9, [5] * 9, [7] * 3, [8] * 4, 1)]
    flops = useful_flops(AutoConfig.from_pretrained(model), comparisons, 0, 1, lora=False)
    found = step.shares_of_rate(args, comparisons, {"prlhf": 2.0, "trl": 8.0}, rate=float(flops))
    assert found == {"prlhf": pytest.approx(1 / 2), "trl": pytest.approx(1 / 8)}


def test_a_random_model_of_a_real_shape_loads(tmp_path):
    """The shape in everything but its layers; the vocabulary, of which the tokenizer knows the bytes, is the real one."""
    monkeypatched = {"GPT-J 6B": {"n_embd": 16, "n_head": 2, "rotary_dim": 4}}
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); import shapes\n"
        f"shapes.MODELS['GPT-J 6B'].update({monkeypatched['GPT-J 6B']})\n"
        "sys.argv = ['random_model.py', 'GPT-J 6B', '--layers', '1', '--dtype', 'float32', '--out', sys.argv[2]]\n"
        f"runpy.run_path({str(BENCHMARKS / 'random_model.py')!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code, BENCHMARKS, tmp_path / "m"], check=True, capture_output=True)
    model = load_weights(tmp_path / "m", "float32")
    assert model.config.vocab_size == 50400 and model.config.n_layer == 1


def test_useful_flops_are_those_that_torch_counts_for_one_long_row(monkeypatch):
    """Without sharing (one response, no user vectors) a plain forward and backward pass has the same matrix products."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shapes import useful_flops

    backbone = random_backbone(ModelConfig(family="llama", width=32, heads=2), 300, 0)
    comparison = EncodedComparison([5] * 40, [5] * 40, [7] * 30, [], 1)
    with FlopCounterMode(display=False) as counter:
        hidden = backbone.base_model(torch.tensor([[5] * 40 + [7] * 30])).last_hidden_state
        backbone.get_output_embeddings()(hidden[:, 39:69]).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    # torch counts attention as if nothing were masked, and with the scores computed again in the backward pass
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    found = useful_flops(backbone.config, [comparison], 0, 1, lora=False)
    attention = 3 * 4 * 2 * 32 * (70 * 71 // 2)
    # of the first layer's input no gradient is needed but for the embeddings', which torch computes too
    assert found - attention == products


def test_breakdown_names_where_time_goes(model):
    assert "matrix products" in run("breakdown.py", "--model", model, "--comparisons", 1, "--arms", "prlhf")


def test_logprob_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "logprob.json"
    sizes = ("--positions", 70, "--width", 16, "--vocabulary", 300, "--rounds", 2)
    assert "| prlhf chunked | " in run("logprob.py", *sizes, "--out", out)
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["prlhf chunked"]["error"] < 1e-6


def test_users_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "users.json"
    small = ("--users", 3, 50, "--width", 32, "--comparisons", 2, "--gap", 4, "--rounds", 2, "--reads", 3)
    table = run("users.py", *small, "--new-tokens", 2, "--out", out)
    assert "| individual | 3 | " in table and "| cluster | 50 | " in table
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["users"]) for row in rows] == [
        (kind, m) for kind in ("individual", "cluster") for m in (3, 50)
    ]
    assert rows[0]["over_smallest"] == 1 and rows[1]["late_user"] == 49
