"""The benchmarks' own parts run, at toy size; what they compare with is not installed here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prlhf.backbones import byte_tokenizer, random_backbone
from prlhf.config import ModelConfig

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
    arms = ("--arms", "prlhf", "prlhf pdpo", "rows")
    table = run("step.py", "--model", model, "--comparisons", 2, "--rounds", 2, "--out", out, *arms)
    assert [row["arm"] for row in json.loads(out.read_text())["rows"]] == ["prlhf", "prlhf pdpo", "rows"]
    assert "| prlhf pdpo | " in table


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
