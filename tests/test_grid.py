"""A table of the paper as one command: what it runs, what it skips the second time, and what it writes."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import ablation, grid, polis, table1
from prlhf.config import load as config_module
from prlhf.evaluate import __main__ as evaluate

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "device=cpu", "model.name=null", "model.family=llama", "model.layers=1", "model.width=32", "model.heads=2",
    "model.dtype=float32", "model.compute_dtype=null", "model.recompute=cheap", "lora.rank=2", "optim.lr=3e-2",
    "optim.warmup_steps=0", "optim.epochs=1", "optim.batch_size=16", "optim.micro_batch_size=16", "user_model.lr=0.3", "data.limit=32",
    "evaluate.bootstrap=100",
)  # fmt: skip
ARMS = ("vanilla_rm", "prm_individual_a0.5")
PUBLISHED = """
vanilla RM 60.27 / 61.10+-3.44 / 59.20; P-RM individual alpha 1: 58.59 / 58.76+-2.91 / 57.10; individual alpha .5: 61.72 /
62.09+-3.51 / 60.65; cluster 5 alpha 1: 58.79 / 59.72+-3.76 / 59.94; cluster 5 alpha .5: 59.66 / 60.19+-2.95 / 59.90.
Vanilla DPO 60.48 / 60.57+-3.14 / 60.99; P-DPO individual 1: 60.07 / 60.13+-3.75 / 60.53; individual .5: 61.33 /
61.61+-3.49 / 61.97; cluster 1: 59.24 / 60.20+-4.69 / 59.58; cluster .5: 60.98 / 61.46+-4.77 / 61.27.
"""  # from the paper's first version, in the order of its rows


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("prlhf.evaluate.figures.optional_pyplot", lambda: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of comparisons as table1 and polis read them."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(ROOT / "examples/tiny/train.jsonl", folder)
    lines = [json.loads(line) for line in (ROOT / "examples/tiny/train.jsonl").read_text().splitlines()]
    everyone = [
        {**line, "id": f"{user}-{line['id']}", "user": user} for user in ("alice", "bob", None) for line in lines
    ]
    for name in ("valid", *polis.HELD_OUT):  # enough of them that arms differ after two updates
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in everyone))
    return folder


def arguments(data, out, *more):
    return ["--data", data, "--out", out, "--arms", *ARMS, "--seeds", "0", "1", "--set", *TINY, *more]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished grid of two arms and two seeds. A test that damages it completes it again."""
    out = tmp_path_factory.mktemp("grid") / "table1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(out.parent / "cache"))
        patch.setattr("prlhf.evaluate.figures.optional_pyplot", lambda: None)
        torch.set_num_threads(1)  # as the tests have it: other numbers of threads round otherwise
        patch.setattr(sys, "argv", ["table1", *map(str, arguments(data, out))])
        table1.main()
    return out


def files(folder):
    """Every file a run or an evaluation left, and when it was written."""
    return {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock" and p.parent != folder
    }


def rows(folder):
    """The rows of table1.md by title: those of the table, and those of the differences."""
    lines = [line for line in (folder / "table1.md").read_text().splitlines() if line.startswith("| ")]
    tables = []
    for title, *cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines):
        if "paper" in cells:
            tables.append({})
        else:
            tables[-1][title] = cells
    return tables


def accuracies(folder):
    """Accuracy-top, Accuracy-average, its standard deviation and Accuracy-generic in %, from margins.jsonl alone."""
    records = [json.loads(line) for line in (folder / "margins.jsonl").read_text().splitlines()]
    known = [r for r in records if r["known"]]
    users = [[r["true"] > 0 for r in known if r["user"] == user] for user in sorted({r["user"] for r in known})]
    own = [np.mean(right) for right in users]
    generic = np.mean([r["generic"] > 0 for r in records if not r["known"]])
    return 100 * np.array([np.mean([r["true"] > 0 for r in known]), np.mean(own), np.std(own), generic])


def test_the_tables_numbers_are_those_of_the_evaluations(finished):
    table, gains = rows(finished)
    assert list(table) == [table1.PAPER[arm].title for arm in ARMS]
    found = {}
    for arm in ARMS:
        seeds = np.array([accuracies(finished / f"{arm}_seed{seed}" / "eval") for seed in (0, 1)])
        reports = [json.loads((finished / f"{arm}_seed{s}" / "eval" / "report.json").read_text()) for s in (0, 1)]
        of_reports = [[r["accuracy"][k] for k in ("top", "average_mean", "average_std", "generic")] for r in reports]
        assert 100 * np.array(of_reports) == pytest.approx(seeds)
        found[arm] = seeds.mean(0)
        top, mean, std, generic = (f"{m:.2f} ({s:.2f})" for m, s in zip(seeds.mean(0), seeds.std(0, ddof=1)))
        assert table[table1.PAPER[arm].title][::2] == [top, f"{mean} ± {std}", generic]
    (title, cells), *others = gains.items()
    assert title == table1.PAPER[ARMS[1]].title and not others
    difference = (found[ARMS[1]] - found[ARMS[0]])[[0, 1, 3]]
    assert difference[:2].all()
    report = json.loads((finished / "table1.json").read_text())["families"]["reward models"]
    for value, cell, measure in zip(difference, cells[::2], ("top", "average_mean", "generic")):
        low, high = (100 * end for end in report["differences"][ARMS[1]][measure]["interval"])
        assert cell == f"{value:+.2f} ({low:.2f} to {high:.2f})" and low <= value + 1e-9 and value - 1e-9 <= high


def test_the_table_says_how_it_came_about(finished, data):
    text = (finished / "table1.md").read_text()
    assert f"`python -m examples.table1 --data {data} --out {finished} --arms vanilla_rm" in text
    assert "- Seeds: 0, 1\n" in text and "Means over 2 seeds" in text
    valid = [json.loads(line) for line in (data / "valid.jsonl").read_text().splitlines()]
    known = sum(record["user"] is not None for record in valid)
    assert f"{known} held-out comparisons of known users, {len(valid) - known} of unknown ones.\n" in text
    assert "the paper's (tldr_prm.yaml): device" in text and "; model.width: 64 -> 32" in text
    assert "run_dir" not in text and "kind" not in text


def test_a_finished_grid_is_left_as_it_is(call, finished, data):
    before, text = files(finished), (finished / "table1.md").read_text()
    assert len(before) > 40
    status, said, err = call(table1.main, *arguments(data, finished))
    assert status == 0, err
    assert files(finished) == before and (finished / "table1.md").read_text() == text and text in said


def test_an_interrupted_grid_is_completed(call, finished, data, tmp_path):
    before, text = files(finished), (finished / "table1.md").read_text()
    untrained, cut_short, other_file = (
        finished / name for name in (f"{ARMS[1]}_seed1", f"{ARMS[1]}_seed0", f"{ARMS[0]}_seed0")
    )
    weights = (untrained / "final" / "users.safetensors").read_bytes()
    assert not (untrained / "checkpoints").exists()  # a finished run needs none
    for name in ("final", "eval"):
        shutil.rmtree(untrained / name)
    whole = (cut_short / "eval" / "report.json").read_text()
    (cut_short / "eval" / "report.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "other.jsonl").write_text("".join((data / "train.jsonl").open().readlines()[:8]))
    assert call(evaluate.main, "--checkpoint", other_file, "--data", tmp_path / "other.jsonl")[0] == 0
    assert call(table1.main, *arguments(data, finished))[0] == 0
    assert (untrained / "final" / "users.safetensors").read_bytes() == weights
    assert (cut_short / "eval" / "report.json").read_text() == whole
    after = files(finished)
    changed = {path.relative_to(finished).parts[:2] for path in before if after[path] != before[path]}
    assert {run for run, _ in changed} == {untrained.name, cut_short.name, other_file.name}
    assert {part for run, part in changed if run != untrained.name} == {"eval"}
    assert after.keys() == before.keys() and (finished / "table1.md").read_text() == text


def test_part_of_the_table(call, tmp_path, data):
    """P-DPO named before its vanilla arm, which still is the baseline; then an arm alone."""
    arms, common = ("pdpo_cluster5_a1", "vanilla_dpo"), ("--data", data, "--out", tmp_path, "--seeds", "0")
    status, _, err = call(table1.main, *common, "--arms", *arms, "--set", *TINY)
    assert status == 0, err
    table, gains = rows(tmp_path)
    assert list(table) == [table1.PAPER["vanilla_dpo"].title, table1.PAPER["pdpo_cluster5_a1"].title]
    assert gains[table1.PAPER["pdpo_cluster5_a1"].title][1::2] == ["-1.24", "-0.37", "-1.41"]
    assert "over them" not in (tmp_path / "table1.md").read_text()  # one seed has no standard deviation
    assert call(table1.main, *common, "--arms", arms[0], "--set", *TINY)[0] == 0
    (table,) = rows(tmp_path)
    assert list(table) == [table1.PAPER["pdpo_cluster5_a1"].title]


def test_the_papers_numbers(finished):
    found = re.findall(r"([\d.]+) / ([\d.]+)\+-([\d.]+) / ([\d.]+)", PUBLISHED.replace("\n", " "))
    arms = [name for family in table1.FAMILIES.values() for name in family]
    assert list(table1.PAPER) == arms and len(found) == len(arms) == 10
    paper = {arm: tuple(float(number.rstrip(".")) for number in numbers) for arm, numbers in zip(arms, found)}
    assert {arm: published[1:] for arm, published in table1.PAPER.items()} == paper
    table, gains = rows(finished)
    assert table["vanilla RM"][1::2] == ["60.27", "61.10 ± 3.44", "59.20"]
    assert gains["P-RM, individual, alpha = 0.5"][1::2] == ["+1.45", "+0.99", "+1.45"]


def test_every_arm_is_what_its_row_says():
    for family in table1.FAMILIES.values():
        for name, arm in family.items():
            config = config_module.load_config(config_module.find_config(arm.config), arm.keys)
            assert config.method == ("prm" if "rm" in name else "pdpo")
            if name.startswith("vanilla"):
                assert config.user_model.kind == "uniform"
                continue
            title = table1.PAPER[name].title
            assert f"{config.user_model.kind}, " in title and title.endswith(f"alpha = {config.loss.alpha:g}")
            assert config.user_model.kind != "cluster" or f"K = {config.user_model.clusters}," in title


@pytest.mark.parametrize(
    "more, parts",
    [
        (["--arms", "prm_indvidual_a1"], ["no such arm (did you mean 'prm_individual_a1'?)", "vanilla_dpo"]),
        (["--set", "seed=3"], ["--set seed=3: the runs of this grid differ in it"]),
        (["--set", "loss.alpha=.7"], ["--set loss.alpha=.7: the runs of this grid differ in it"]),
        (["--arms", "prm_individual_a1", "vanilla_dpo", "--set", "loss.nll=1"], ["loss.nll"]),
        (["--arms", "vanilla_dpo", "prm_individual_a1", "--set", "loss.nll=1"], ["loss.nll"]),
        (["--seeds", "0", "one"], ["seed", "found 'one', expected int"]),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(call, tmp_path, data, more, parts):
    status, _, err = call(table1.main, "--data", data, "--out", tmp_path / "out", *more)
    assert status == 2 and all(part in err for part in parts), err
    assert not (tmp_path / "out").exists()


def test_the_other_grids_find_their_runs(monkeypatch, call, tmp_path, data):
    """examples/polis.py and examples/ablation.py: the folders of their runs, and the arguments of training and evaluation."""
    calls = []

    def recorded(main, *given):
        calls.append((main.__module__, given))
        if main is evaluate.main:
            out, source = Path(given[given.index("--out") + 1]), "examples/tiny/valid.jsonl"
            if "--data" in given:
                source = given[given.index("--data") + 1]
            controls = {name: {"accuracy": 0.25} for name in ("generic_user", "shuffled_users")}
            out.mkdir(parents=True)
            (out / "report.json").write_text(
                json.dumps({"data": source, "accuracy": {"top": 0.5}, "controls": controls})
            )

    monkeypatch.setattr(grid, "call", recorded)
    common = ("--out", tmp_path, "--seeds", "0", "1")
    assert call(polis.main, *common, "--data", data, "--arms", "vanilla", "cluster5", "--set", "optim.lr=1")[0] == 0
    trained = [given for module, given in calls if module == "prlhf.train.__main__"]
    assert [f"run_dir={tmp_path}/{arm}_seed{s}" in given for (s, arm), given in zip(
        [(0, "vanilla"), (0, "cluster5"), (1, "vanilla"), (1, "cluster5")], trained)] == [True] * 4  # fmt: skip
    last = trained[-1]
    expected = {
        "polis_prm.yaml",
        f"data.train={data}/train.jsonl",
        "data.valid=null",
        "seed=1",
        "optim.lr=1",
        "user_model.clusters=5",
    }
    assert expected < set(last)
    evaluated = [given for module, given in calls if module == "prlhf.evaluate.__main__"]
    run, held_out = f"{tmp_path}/cluster5_seed1", f"{data}/unseen_users_test.jsonl"
    assert len(evaluated) == 12
    asked = ("--data", held_out, "--set", "data.new_users=true")  # of users whom no run knows
    assert evaluated[-1] == ("--checkpoint", run, *asked, "--out", f"{run}/eval/unseen_users_test")
    compared = [given for module, given in calls if module == "prlhf.evaluate.compare"]
    seeds = ",".join(f"{tmp_path}/vanilla_seed{s}/eval/valid_seen_statements" for s in (0, 1))
    assert compared[0][0] == f"vanilla={seeds}" and compared[0][-1] == f"{tmp_path}/comparison_valid_seen_statements"

    calls.clear()
    keys = ("--set", "data.valid=examples/tiny/valid.jsonl")
    status, said, _ = call(ablation.main, *common, *keys)
    assert status == 0 and "| cluster, K = 2 | 50.0 ± 0.0 | 25.0 ± 0.0 | 25.0 ± 0.0 |" in said
    assert len(calls) == 2 * 2 * len(ablation.LINEAR)
    folders = {path.parent.parent.name for path in tmp_path.glob("*/eval/report.json")}
    assert {"vanilla(uniform)_seed1", "individual_alpha0.5_notshared_seed0", "cluster_K10_seed1"} < folders
    calls.clear()
    assert call(ablation.main, *common, *keys)[0] == 0 and {module for module, _ in calls} == {"prlhf.train.__main__"}
