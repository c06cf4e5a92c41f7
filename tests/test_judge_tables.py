"""Several systems against one baseline, the judge of simulated users, and the commands that make the papers' tables."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_judge_server import Stub

from examples import win_rates
from prlhf.backbone.loading import load_backbone, load_tokenizer
from prlhf.config import load as config_module
from prlhf.config.keys import ModelConfig
from prlhf.data import __main__ as data_command
from prlhf.data.comparisons import Comparison
from prlhf.data.sets.simulate import simulate
from prlhf.judge import __main__ as command
from prlhf.judge import table
from prlhf.judge.judges import find_judge
from prlhf.judge.pairs import Pair
from prlhf.judge.profiles import read_profiles
from prlhf.judge.queries import Query
from prlhf.judge.report import judgement
from prlhf.judge.verdicts import Decision

ROOT = Path(__file__).resolve().parent.parent


def words(n):
    return " ".join(["w"] * n)


def responses(path, lengths):
    """A file as generate.py writes it, of {(prompt, user): number of words}."""
    path.parent.mkdir(exist_ok=True)
    records = ({"id": x, "user": u, "prompt": x, "response": words(n)} for (x, u), n in lengths.items())
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def comparisons(path, rows):
    """A file of comparisons, from (user, words of the chosen response, words of the rejected one)."""
    records = ({"prompt": "x", "chosen": words(a), "rejected": words(b), "user": u} for u, a, b in rows)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ASKED = [("x", "ann"), ("y", "ann"), ("x", "bob")]


@pytest.fixture
def systems(tmp_path):
    """Two files of one name, which tell systems apart by their folders alone, and a baseline of two words everywhere."""
    a = responses(tmp_path / "p" / "out.jsonl", dict(zip(ASKED, (1, 3, 1))))
    b = responses(tmp_path / "q" / "out.jsonl", dict(zip(ASKED, (2, 3, 3))))
    return a, b, responses(tmp_path / "base.jsonl", dict.fromkeys(ASKED, 2))


def test_each_system_is_judged_as_a_pair_of_files_is(call, systems, tmp_path):
    """Shorter wins: the first system two of three, ann 1/2 and bob 1; the second a tie and two losses, ann 1/4 and bob 0."""
    a, b, base = systems
    status, said, err = call(command.main, a, b, base, "--judge", "rule:shorter", "--out", tmp_path / "all")
    assert status == 0, err
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert (report["judge"], report["a"], report["b"]) == ("rule:shorter", [str(a), str(b)], str(base))
    rates = {file: own["win_rate"] for file, own in report["systems"].items()}
    assert rates[str(a)]["per_sample"] == pytest.approx(2 / 3) and rates[str(a)]["per_user"] == 0.75
    assert rates[str(b)]["per_sample"] == pytest.approx(1 / 6) and rates[str(b)]["per_user"] == 0.125
    row = next(line for line in said.splitlines() if line.startswith(f"| `{b}`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("16.67 (") and cells[2].startswith("12.50 (")
    assert cells[4:] == ["3", "0", "0", "1", "2", "2.7", "2"]
    for file, folder in ((a, "1_out"), (b, "2_out")):
        assert call(command.main, file, base, "--judge", "rule:shorter", "--out", tmp_path / "one" / folder)[0] == 0
        assert contents(tmp_path / "one" / folder) == contents(tmp_path / "all" / folder)
        alone = json.loads((tmp_path / "one" / folder / "report.json").read_text())
        assert report["systems"][str(file)] == alone


def test_a_half_done_judgement_goes_on_and_what_was_judged_is_kept(call, systems, tmp_path, monkeypatch):
    a, b, base = systems
    asked = (a, b, base, "--judge", "rule:shorter", "--out", tmp_path / "out")
    decided = []

    def counted(pairs, judge, decide=table.decide):
        decided.append(Path(pairs[0].where.split(",")[0]))
        if len(decided) == 2:
            raise KeyboardInterrupt
        return decide(pairs, judge)

    monkeypatch.setattr(table, "decide", counted)
    assert call(command.main, *asked)[0] not in (0, 2)
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["systems"]) == [str(a)]
    status, said, _ = call(command.main, *asked)
    assert status == 0 and decided == [a, b, b] and f"{a}: was judged already, and is kept" in said
    before = contents(tmp_path / "out")
    assert call(command.main, *asked)[0] == 0 and len(decided) == 3
    assert contents(tmp_path / "out") == before
    responses(a, dict(zip(ASKED, (3, 3, 1))))  # another answer: judged anew
    assert call(command.main, *asked)[0] == 0 and decided[3:] == [a]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["systems"][str(a)]["win_rate"]["per_sample"] == pytest.approx(1 / 3)


def test_another_state_of_the_judge_judges_anew(call, systems, tmp_path):
    a, b, base = systems
    rules = comparisons(tmp_path / "rules", [("ann", 1, 2), ("bob", 1, 2)])
    asked = (a, b, base, "--judge", f"simulated:{rules}", "--out", tmp_path / "out")
    assert call(command.main, *asked)[0] == 0
    comparisons(rules, [("ann", 2, 1), ("bob", 2, 1)])
    assert call(command.main, *asked)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["systems"][str(a)]["win_rate"]["per_sample"] == pytest.approx(1 / 3)


def test_bad_input_of_several_is_refused_and_changes_nothing(call, systems, tmp_path):
    a, b, base = systems
    other = responses(tmp_path / "other.jsonl", dict(list(zip(ASKED, (1, 2, 3)))[:2]))
    assert call(command.main, a, b, base, "--judge", "rule:shorter", "--out", tmp_path / "done")[0] == 0
    before = contents(tmp_path)
    cases = {
        (a, a, base, "rule:shorter", "out"): "found a file twice, expected each system once",
        (a, other, base, "rule:shorter", "out"): f"none only in {other}, 1 (prompt \"x\" of user 'bob') only in {base}",
        (
            a,
            b,
            base,
            "rule:longer",
            "done",
        ): f"holds {a}, {b} against {base} by rule:shorter, which differs in judge; expected",
        (b, a, base, "rule:shorter", "done"): f"holds {a}, {b} against",
        (a, base, "rule:shorter", "done"): f"holds {a}, {b} against",
        (a, b, base, "simulated:", "out"): "expected one of",
        (a, b, base, f"simulated:{tmp_path / 'nowhere'}", "out"): "no such file",
    }
    for (*files, judge, out), part in cases.items():
        status, _, err = call(command.main, *files, "--judge", judge, "--out", tmp_path / out)
        assert status == 2 and part in err and len(err.splitlines()) == 1, err
        assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.fixture
def stub(monkeypatch):
    """A server that prefers fewer words, the first of two as long, and does not know where the prompt ends as `unsure` does."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")

    def reply(stub, n, text):
        prompt, _, both = text.rpartition("[Prompt]\n")[2].partition("\n[Response A]\n")
        a, b = both.partition("\n\nWhich response")[0].split("[Response B]\n")
        return "Who knows?" if prompt.endswith(tuple(stub.unsure)) else "B" if len(b.split()) < len(a.split()) else "A"

    server = Stub(reply)
    server.unsure = {"y"}
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_judges_several_and_what_is_left_is_said(call, systems, stub, tmp_path):
    """Equal questions are one: four of the first system (two prompts in two orders), three more of the second (x of two words each
    is the same in both orders, y was asked). y is never parsed: the first wins both others; the second ties one, loses one."""
    a, b, base = systems
    asked = (a, b, base, "--judge", "openai:m", "--base-url", stub.url, "--out", tmp_path / "out")
    status, said, err = call(command.main, *asked, "--dry-run")
    assert status == 0 and said.startswith("dry run: 7 requests") and not (tmp_path / "out").exists(), err
    status, _, err = call(command.main, *asked, "--max-requests", 4)
    assert status == 2 and "--max-requests 4: spent" in err and len(stub.asked) == 4
    report, text = (json.loads((tmp_path / "out/report.json").read_text()), (tmp_path / "out/report.md").read_text())
    assert report["not_judged"] == [str(b)] and list(report["systems"]) == [str(a)]
    assert f"Not judged yet: `{b}`." in text and "could not be parsed: 1." in text
    status, said, err = call(command.main, *asked)
    assert status == 0 and len(stub.asked) == 7, err
    report, text = (json.loads((tmp_path / "out/report.json").read_text()), (tmp_path / "out/report.md").read_text())
    assert report["not_judged"] == [] and "Not judged yet" not in text and "could not be parsed: 2." in text
    found = {
        file: [cell.strip() for cell in row.strip("|").split("|")]
        for file in (a, b)
        for row in text.splitlines()
        if f"`{file}`" in row
    }
    assert found[a][1].startswith("100.00 (") and found[a][4:9] == ["2", "1", "2", "0", "0"]
    assert found[b][1].startswith("25.00 (") and found[b][4:9] == ["2", "1", "0", "1", "1"]
    assert found[a][3] == "- (-)" and found[b][3].endswith(
        "‡ (-)"
    )  # 1 against 2 words; 2, a tie, and 3, lost, against 2
    assert "‡ At equal length" in text and "†" not in text and f"m was asked at {stub.url}" in text


def test_the_table_marks_rates_at_a_length_that_no_pair_has(call, systems, tmp_path):
    a, b, base = systems
    responses(a, dict(zip(ASKED, (3, 4, 5))))  # always longer than two words
    _, said, _ = call(command.main, a, b, base, "--judge", "rule:longer", "--out", tmp_path / "out")
    marked = {file: next("†" in row for row in said.splitlines() if f"| `{file}`" in row) for file in (a, b)}
    assert (
        marked == {a: True, b: False} and said.count("† At equal length: one side's responses are longer in every") == 1
    )


# Simulated users


def queries(users, lengths):
    return [Query("x", user, None, None, words(a), words(b), "") for user in users for a, b in lengths]


def test_simulated_users_judge_as_they_chose(tmp_path):
    """The rule that prlhf.simulate drew for each worker, of whom 4, 5 and 6 prefer the shorter response."""
    rng = random.Random(0)
    records = [
        {"prompt": "x", "chosen": words(rng.randrange(1, 30)), "rejected": words(rng.randrange(30, 60))}
        for _ in range(80)
    ]
    read = [(r, Comparison("x", r["chosen"], r["rejected"], None, None, "")) for r in records]
    kept, _, _ = simulate(read, workers=10, shorter=0.3, seed=3456)
    path = tmp_path / "workers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    workers = [f"worker{i}" for i in range(1, 11)]
    judge = find_judge(f"simulated:{path}", workers)
    shorter = [worker in ("worker4", "worker5", "worker6") for worker in workers]
    found = judge.verdicts(queries(workers, [(2, 7), (7, 2), (3, 3)]))
    expected = [
        verdict for s in shorter for verdict in (("first", "second", "tie") if s else ("second", "first", "tie"))
    ]
    assert found == expected and judge.said is None


def test_who_is_not_simulated_is_judged_as_most_comparisons_are(tmp_path):
    """Two comparisons of ann's, who prefers the shorter, against one each of bob and cleo, then against three."""
    rows = [("ann", 1, 2), ("ann", 1, 2), ("bob", 2, 1), ("cleo", 2, 1)]
    even = find_judge(f"simulated:{comparisons(tmp_path / 'even', rows)}", ["ann", None, "dan", "dan"])
    assert even.verdicts(queries([None, "dan", "ann"], [(1, 2)])) == ["tie", "tie", "first"]
    assert even.said.endswith("does not know, judged as the generic user: 1 ('dan').")
    most = find_judge(f"simulated:{comparisons(tmp_path / 'most', [*rows, ('bob', 9, 1)])}", ["ann"])
    assert most.verdicts(queries([None, "dan", "ann"], [(1, 2)])) == ["second", "second", "first"]


def test_a_file_of_real_people_is_no_simulation(call, systems, tmp_path):
    a, _, base = systems
    cases = {
        (
            ("ann", 1, 2),
            ("bob", 2, 1),
            ("ann", 3, 2),
        ): ", line 3: user 'ann' chose the longer response here, and the other before",
        (("ann", 1, 2), ("ann", 2, 2)): ", line 2: found responses of equal length, expected",
        ((None, 1, 2),): ", line 1: found no user, expected",
    }
    for rows, part in cases.items():
        path = comparisons(tmp_path / "people", rows)
        status, _, err = call(command.main, a, base, "--judge", f"simulated:{path}", "--out", tmp_path / "out")
        assert status == 2 and part in err and not (tmp_path / "out").exists(), err


# The papers' tables

TINY = (
    "device=cpu", "model.name=null", "model.family=llama", "model.layers=1", "model.width=32", "model.heads=2", "model.dtype=float32",
    "model.compute_dtype=null", "model.recompute=cheap", "optim.max_steps=4", "optim.batch_size=2", "train.save_every=null",
    "optim.lr=0.3", "optim.warmup_steps=0", "user_model.lr=10",
    "evaluate.bootstrap=100",
)  # fmt: skip
PUBLISHED = """
win rate in %, per sample against vanilla DPO: individual 64.47, K=10 61.84, K=100 65.79; against the chosen responses: vanilla
42.11, 60.52, 61.84, 60.52. Per user: 60, 60, 65 and 25, 55, 70, 60.
"""  # of arXiv 2402.05133v3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a data set's table of its hand-written raw files, by the shorter response; the folder of the table, and the data's."""
    root = tmp_path_factory.mktemp("tables")

    def make(name, *more):
        data, out = root / name, root / f"table_{name}"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("PRLHF_CACHE", str(root / "cache"))
            patch.setattr("prlhf.evaluate.figures.optional_pyplot", lambda: None)
            patch.setattr(
                sys, "argv", ["data", "prepare", name, "--raw", str(ROOT / "tests/raw" / name), "--out", str(data)]
            )
            data_command.main()
            asked = [name, "--data", str(data), "--out", str(out), "--max-new-tokens", "40", *more, "--set", *TINY]
            patch.setattr(sys, "argv", ["win_rates", *asked])
            win_rates.main()
        return out, data

    return make


JUDGED = ("--arms", win_rates.VANILLA, "pdpo_cluster10", "--judge", "rule:shorter")


@pytest.fixture(scope="module")
def prism(made):
    return made("prism", *JUDGED)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(path):
    """Each response's number of words by prompt and user; of comparisons, the chosen ones'."""
    found = {(json.dumps(r["prompt"]), r["user"] or "generic"): r.get("response", r.get("chosen")) for r in rows(path)}
    return {key: len(text.split()) for key, text in found.items()}


def shorter_wins(a, b):
    """Win rates per sample and per user of the shorter response, ties one half."""
    wins = {key: 0.5 if a[key] == b[key] else float(a[key] < b[key]) for key in a}
    users = {user: [win for (_, u), win in wins.items() if u == user] for _, user in a}
    return sum(wins.values()) / len(wins), sum(sum(own) / len(own) for own in users.values()) / len(users)


def tables(out):
    """The tables of win_rates.md by opponent: cells by system."""
    found = {}
    for line in (out / "win_rates.md").read_text().splitlines():
        if line.startswith("## Against "):
            found[line.removeprefix("## Against ")] = own = {}
        elif line.startswith("| ") and not line.startswith("| |"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            own[name] = cells
    return found


def test_the_tables_numbers_are_those_of_the_responses(prism):
    out, data = prism
    files = {path.stem.removesuffix("_seed0"): answers(path) for path in (out / "responses").glob("*.jsonl")}
    asked = {(json.dumps(r["prompt"]), r["user"]) for r in rows(data / "prompts.jsonl")}
    assert asked and all(set(file) == asked for file in files.values())  # each as the user who asked
    assert files["chosen"].items() <= answers(data / "valid.jsonl").items()
    found = tables(out)
    systems = {"vanilla DPO": "vanilla_dpo", "the responses that users chose": "chosen"}
    assert list(found) == list(systems)
    for title, opponent in systems.items():
        others = [name for name in ("vanilla_dpo", "pdpo_cluster10", *win_rates.BASELINES) if name != opponent]
        assert list(found[title]) == [name.partition(":")[0] for name in others]
        for name, cells in found[title].items():
            per_sample, per_user = shorter_wins(files[name], files[opponent])
            assert cells[0].startswith(f"{100 * per_sample:.2f} (") and cells[3].startswith(f"{100 * per_user:.2f} (")
    assert len({cells[0] for cells in found["vanilla DPO"].values()}) > 1
    assert found["vanilla DPO"]["pdpo_cluster10"][2:6:3] == ["61.84", "60.00"]
    assert found["the responses that users chose"]["vanilla_dpo"][2:6:3] == ["42.11", "25.00"]
    text = (out / "win_rates.md").read_text()
    assert f"`python -m examples.win_rates prism --data {data}" in text and "- Judge: `rule:shorter`" in text


def test_the_same_command_again_does_nothing_anew(made, prism, capsys):
    before = contents(prism[0])
    capsys.readouterr()
    made("prism", *JUDGED)
    said = capsys.readouterr().out
    assert contents(prism[0]) == before and said.count("was judged already, and is kept") == 3 + 2 * len(
        win_rates.BASELINES
    )
    assert said.count(": 0 new responses") == 2 + len(win_rates.BASELINES)


def test_finished_runs_are_taken_and_not_trained(made, prism, tmp_path):
    """Both arms' runs under each other's names: the responses are each other's."""
    runs = [
        f"{a}={prism[0]}/{b}_seed0"
        for a, b in ((win_rates.VANILLA, "pdpo_cluster10"), ("pdpo_cluster10", win_rates.VANILLA))
    ]
    out = tmp_path / "taken"
    made("prism", "--out", str(out), "--checkpoint", *runs, "--arms", win_rates.VANILLA, "--judge", "rule:shorter")
    assert not list(out.glob("*/final"))
    for name, other in ((win_rates.VANILLA, "pdpo_cluster10"), ("pdpo_cluster10", win_rates.VANILLA)):
        mine, theirs = out / "responses" / f"{name}_seed0.jsonl", prism[0] / "responses" / f"{other}_seed0.jsonl"
        assert mine.read_bytes() == theirs.read_bytes() != (prism[0] / "responses" / mine.name).read_bytes()


def counted(a, b, left_out):
    """By hand: (wins + ties) / pairs in %, over all and over users, ties, and how many pairs are left out."""
    kept = [(user, a[prompt, user], b[prompt, user]) for prompt, user in a if prompt not in left_out]
    good = [(user, x <= y) for user, x, y in kept]
    users = {u: [won for user, won in good if user == u] for u, _ in good}
    shares = sum(won for _, won in good) / len(good), sum(sum(own) / len(own) for own in users.values()) / len(users)
    return *(f"{100 * share:.2f}" for share in shares), sum(x == y for _, x, y in kept), len(a) - len(kept)


def test_ties_as_wins_of_both_sides_by_hand():
    """ann wins two, ties one and loses one: 3 of 4; bob loses his one, and one of his could not be parsed: 3 of 5, (3/4 + 0) / 2."""
    pairs = [Pair("", "x", user, None, None, "a", "b", "") for user in ["ann"] * 4 + ["bob"] * 2]
    verdicts = [("first", "second")] * 2 + [("tie", "tie"), ("second", "first")]
    verdicts += [("second", "first"), ("unparsed", "first")]
    report = judgement(pairs, [Decision(*both) for both in verdicts])
    assert win_rates.ties_as_wins(report) == pytest.approx((60, 37.5))
    assert [100 * report["win_rate"][k] for k in ("per_sample", "per_user")] == pytest.approx([50, 31.25])


def test_a_server_makes_the_papers_table(made, prism, stub, tmp_path, capsys, monkeypatch):
    """A dry run tells of both opponents and makes no table; a judged one counts as the paper does too, and says what is left out,
    who judged, and how the judge was validated; another judge has another folder."""
    monkeypatch.setattr(win_rates, "BASELINES", ("base",))
    out, v = shutil.copytree(prism[0], tmp_path / "out"), tmp_path / "v"  # by rule:shorter
    arms = [f"{name}={prism[0]}/{name}_seed0" for name in (win_rates.VANILLA, "pdpo_cluster10")]
    asked = ("prism", "--out", str(out), "--checkpoint", *arms, "--arms", win_rates.VANILLA)
    judge = f"openai:org/m --base-url {stub.url} --examples 1"
    capsys.readouterr()
    made(*asked, "--judge", f"{judge} --dry-run")
    said = capsys.readouterr().out
    assert said.count("dry run: ") == 2 and "no table" in said and not stub.asked
    made(*asked, "--judge", "hf:/nowhere --show")
    said = capsys.readouterr().out
    assert said.count("Which response does this user prefer?") == 2 and "no table" in said
    assert contents(out) == contents(prism[0])
    validate = ["judge", "--validate", f"{prism[1]}/valid.jsonl", "--limit", "2", "--judge", *shlex.split(judge)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*validate, "--profiles", f"{prism[1]}/train.jsonl", "--out", str(v)])
        command.main()
    (first, *_), last = (
        rows(prism[1] / "prompts.jsonl"),
        lambda prompt: prompt if isinstance(prompt, str) else prompt[-1]["content"],
    )
    stub.unsure = {last(first["prompt"])}
    made(*asked, "--judge", f"{judge} --validation {v}")
    files = {path.stem.removesuffix("_seed0"): answers(path) for path in (out / "responses").glob("*.jsonl")}
    left_out = {prompt for prompt, _ in files["base"] if last(json.loads(prompt)) in stub.unsure}
    found = tables(out)
    for title, opponent in {"vanilla DPO": "vanilla_dpo", "the responses that users chose": "chosen"}.items():
        for name, cells in found[title].items():
            per_sample, per_user, ties, unparsed = counted(files[name], files[opponent], left_out)
            judged = len(files[name]) - unparsed
            assert [cells[i] for i in (1, 4, 7, 8)] == [per_sample, per_user, f"{ties} of {judged}", str(unparsed)]
            assert unparsed and judged
    text, sentence = (out / "win_rates.md").read_text(), json.loads((v / "validation.json").read_text())["sentence"]
    assert text.count(sentence) == text.count(f"org/m was asked at {stub.url}") == 2
    folders = [path.name for path in out.glob("judged_*")]
    assert sorted(re.sub("_[0-9a-f]{8}$", "", name) for name in folders) == [
        f"judged_{against}_seed0_{by}" for against in ("chosen", "vanilla_dpo") for by in ("openai_m", "rule_shorter")
    ]


@pytest.fixture(scope="module")
def psoups(made):

    return made("psoups", "--judge", "rule:shorter")


def test_personalized_soups_are_answered_as_each_preference(psoups):
    """Two prompts of koala_eval_50.json, which nobody asked and to which nobody chose; no numbers of the paper are at hand."""
    out, _ = psoups
    found = rows(out / "responses" / "pdpo_individual_seed0.jsonl")
    users = ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]
    assert [(r["id"], r["user"]) for r in found] == [(f"koala:{i}", user) for i in (1, 2) for user in users]
    assert (
        list(tables(out)) == ["vanilla DPO"]
        and "No win rates of the paper are at hand" in (out / "win_rates.md").read_text()
    )
    assert "paper, %" not in (out / "win_rates.md").read_text()


def test_a_language_model_reads_whom_it_plays(made, psoups, tmp_path):
    """By default the training comparisons, with each preference's sentence; other options are passed on."""
    out, data = psoups
    taken = [f"{name}={out}/{name}_seed0" for name in win_rates.PSOUPS.arms]
    config = ModelConfig(family="llama", width=32, heads=2)
    tokenizer = load_tokenizer(config)
    load_backbone(config, tokenizer, 0).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    asked = ("psoups", "--checkpoint", *taken, "--limit", "1")
    made(*asked, "--out", str(tmp_path / "out"), "--judge", f"hf:{tmp_path}/judge --examples 1")
    (folder,) = (tmp_path / "out").glob(f"judged_{win_rates.VANILLA}_seed0_hf_judge_*")
    report = json.loads((folder / "report.json").read_text())
    assert report["settings"]["profiles"] == f"{data}/train.jsonl" and report["settings"]["examples"] == 1
    shown = read_profiles(data / "train.jsonl", 1).of(Query("x", "P2A", None, None, "", "", "")).text
    assert shown == "preference: Generate a response that is concise and to the point, without being verbose."


def test_without_a_judge_there_are_responses(made, tmp_path, capsys):
    made("prism", "--out", str(tmp_path / "out"), "--arms", "pdpo_individual")
    assert (
        "expected --judge to judge them" in capsys.readouterr().out and not (tmp_path / "out" / "win_rates.md").exists()
    )
    assert (tmp_path / "out" / "responses" / "base_seed0.jsonl").exists()


def test_the_papers_win_rates():
    numbers = [float(n.rstrip(".")) for n in re.findall(r"(?<![=\d])[\d.]*\d", PUBLISHED)]
    arms = list(win_rates.PRISM.arms)
    by_sample, by_user = numbers[:7], numbers[7:]
    expected = {win_rates.VANILLA: dict(zip(arms[1:], zip(by_sample[:3], by_user[:3])))}
    expected[win_rates.CHOSEN] = dict(zip(arms, zip(by_sample[3:], by_user[3:])))
    assert win_rates.PRISM.paper == expected and len(by_user) == 7


def test_every_arm_is_what_its_name_says():
    for data_set in win_rates.DATA_SETS.values():
        assert next(iter(data_set.arms)) == win_rates.VANILLA
        for name, keys in data_set.arms.items():
            config = config_module.load_config(config_module.find_config(data_set.config), keys)
            kind, clusters = config.user_model.kind, config.user_model.clusters
            expected = "uniform" if name == win_rates.VANILLA else f"pdpo_{kind}{clusters if kind == 'cluster' else ''}"
            assert config.method == "pdpo" and (kind == expected if name == win_rates.VANILLA else name == expected)


@pytest.mark.parametrize(
    "more, part",
    [
        (
            ["--checkpoint", "pdpo_indvidual=x"],
            "no such arm (did you mean 'pdpo_individual'?), expected ARM=RUN of vanilla_dpo",
        ),
        (["--checkpoint", "vanilla_dpo=nowhere"], "nowhere: no such checkpoint"),
        (["--arms", "pdpo_individual", "--judge", "rule:shorter"], "all is judged against vanilla_dpo"),
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0"),
        (["--judge", "rule:shorter --show"], "--show: not for --judge rule:shorter"),
        (["--judge", "hf:x '"], "--judge hf:x ': No closing quotation, expected"),
        (["--judge", " "], "--judge  : not enough values"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(call, monkeypatch, prism, tmp_path, more, part):
    monkeypatch.chdir(ROOT)
    status, _, err = call(win_rates.main, "prism", "--data", prism[1], "--out", tmp_path / "out", *more, "--set", *TINY)
    assert status == 2 and part in err, err
    assert not (tmp_path / "out").exists()


def test_make_has_a_command_for_each_table():
    if not shutil.which("make"):
        pytest.skip("needs make")
    for name in win_rates.DATA_SETS:
        asked = [
            "make",
            "--no-print-directory",
            "-n",
            f"table_{name}",
            "DATA=/raw",
            "JUDGE=openai:gpt --examples 3",
            "CHECKPOINT=vanilla_dpo=runs/v",
        ]
        *_, prepare, command = subprocess.run(
            asked, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert shlex.split(prepare)[1:] == [
            "-m",
            "prlhf.data",
            "prepare",
            name,
            "--raw",
            "/raw",
            "--out",
            f"runs/data/{name}",
        ]
        expected = ["-m", "examples.win_rates", name, "--data", f"runs/data/{name}"]
        expected += ["--judge", "openai:gpt --examples 3", "--checkpoint", "vanilla_dpo=runs/v"]
        assert shlex.split(command)[1:] == expected
