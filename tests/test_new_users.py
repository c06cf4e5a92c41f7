"""examples.new_users: the protocols' divisions by hand, each baseline by hand, brute force or another command, the interval."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from examples.new_users import __main__ as command
from examples.new_users import lore, protocols, report
from examples.new_users.baselines import from_the_start, user_blind, vote_share
from examples.new_users.context import InContext, read, with_context
from examples.new_users.protocols import Division, Draw
from examples.new_users.setting import Adapted, Setting, Turn, nearest, set_up
from prlhf.adapt.evidence import Judgements
from prlhf.batch.trees import Reading
from prlhf.config.keys import DataConfig, LossConfig
from prlhf.data.comparisons import Comparison, read_comparisons
from prlhf.errors import UserError
from prlhf.evaluate.stats.metrics import correct
from prlhf.method.users import LowRankUsers
from prlhf.score.score import score
from prlhf.solve.linear import LinearProblem
from prlhf.store.final import load_final
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "tests" / "raw"
LINES = [json.loads(line) for line in (ROOT / "examples/tiny/train.jsonl").read_text().splitlines()]


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def compared(prompt: str, chosen: str, rejected: str) -> Comparison:
    return Comparison(prompt, chosen, rejected, user=None, user_text=None, id="x")


def ids(division: Division, rows) -> list[str]:
    return [division.new[row].id for row in rows]


# Protocols.


def test_pal_by_hand():
    """Training comparisons of two "sup" policies without "ppo": anna 5, bert 3, cleo 3. Others with two for validation: zoe."""
    found = protocols.pal(RAW / "tldr", known=2, least=2, runs=2)
    # Both prefer longer; batch3:6 is a tie, batch3:4 has a ppo policy.
    assert [r["id"] for r in found.train] == [
        f"batch{i}" for i in ("3:1", "3:2", "3:3", "12:1", "12:2", "12:3", "12:4")
    ]
    assert all(len(r["chosen"]) > len(r["rejected"]) for r in found.train)
    # zoe prefers shorter, also where she really chose the longer one (batch3:9).
    assert [c.id for c in found.new] == ["batch3:9", "batch12:8", "batch12:9"]
    assert {c.user for c in found.new} == {"zoe"} and all(len(c.chosen) < len(c.rejected) for c in found.new)
    # numpy's RandomState(42).permutation(3) is 0 1 2, of seed 43 it is 1 2 0; scikit-learn trains on the last of it.
    assert [draw.learn for (draw,) in found.draws] == [[2, 1, 0], [0, 2, 1]]
    assert found.draws[0][0].at(1) == ([2], [1, 0]) and found.draws[1][0].at(2) == ([0, 2], [1])
    with pytest.raises(UserError, match="for 0 new users; expected some of each"):
        protocols.pal(RAW / "tldr", known=2, least=3)


def test_pal_draws_what_scikit_learn_draws():
    """train_test_split(range(10), test_size=3, random_state=42) is the example of many tutorials: 0 7 2 9 4 3 6 and 8 1 5."""
    order = np.random.RandomState(42).permutation(10)[::-1]
    draw = Draw("x", order.tolist(), [])
    assert set(draw.at(7)[0]) == {0, 7, 2, 9, 4, 3, 6} and set(draw.at(7)[1]) == {8, 1, 5}


def test_lore_tldr_by_hand():
    """Workers of both splits are anna, bert and cleo; random.Random(0) shuffles them to anna, cleo, bert. One is known."""
    found = protocols.lore_tldr(RAW / "tldr", left_out=0, runs=3)
    assert {r["id"] for r in found.train} == {"batch3:1", "batch3:2", "batch12:2", "batch12:4"}  # a tie in text is none
    of_bert = {"batch3:3", "batch3:4", "batch12:1", "batch12:3"}  # the ppo policy too
    for draws in found.draws:
        cleo, bert = draws
        assert (cleo.user, bert.user) == ("cleo", "bert")
        assert set(ids(found, cleo.learn)) == {"batch3:5", "batch3:7", "batch12:7"}
        assert ids(found, cleo.predict) == ["batch12:6"] and ids(found, bert.predict) == ["batch12:5"]
        assert set(ids(found, bert.learn)) == of_bert
        assert cleo.at(2) == (cleo.learn[:2], cleo.predict)
    assert len({tuple(draws[1].learn) for draws in found.draws}) > 1
    assert found.shots == (0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50)
    # cleo has the fewest training comparisons, three.
    assert [draw.user for draw in protocols.lore_tldr(RAW / "tldr", left_out=1).draws[0]] == ["bert"]
    assert len(protocols.lore_tldr(RAW / "tldr", left_out=1).draws) == 20


def test_lore_tldr_takes_at_most_150_and_50(tmp_path):
    raw = json.loads((RAW / "tldr/batch3.json").read_text().splitlines()[0])

    def line(worker: str, split: str, i: int) -> dict:
        return {**raw, "worker": worker, "split": split, "summaries": [{"text": f" {i}", "policy": "ppo"}, {"text": " no", "policy": "ref"}]}  # fmt: skip

    workers = ["a", "b", "c", "d"]
    write(tmp_path / "batch3.json", [line(w, s, i) for w in workers for s, n in (("train", 160), ("valid1", 60)) for i in range(n)])  # fmt: skip
    random.Random(0).shuffle(workers)
    found = protocols.lore_tldr(tmp_path, left_out=0)
    assert [sum(r["user"] == worker for r in found.train) for worker in workers] == [150, 150, 0, 0]
    assert [(d.user, len(set(d.learn)), len(d.predict)) for d in found.draws[0]] == [(w, 50, 60) for w in workers[2:]]


def test_lore_prism_by_hand():
    """LoRe's own calls: np.random.seed(123), shuffle of the users, then of each one's dialogues, in that order.

    They give user2 user4 user5 | user0 user3, c4 c7 c6 of user2, c9 c10 c12 of user4 and c0 c3 c2 c1 of user0.
    """
    found = protocols.lore_prism(RAW / "prism", known=0.6, least=3)
    assert [r["id"] for r in found.train] == ["c4:0:1", "c9:0:1"]
    assert [c.id for c in found.new] == ["c0:0:1", "c0:0:2", "c0:1:1", "c3:0:1", "c2:0:1", "c1:0:1", "c1:2:1"]
    assert found.draws == [[Draw("user0", [0, 1, 2, 3], [4, 5, 6])]]
    assert all(c.user_text is None for c in found.new) and "user_text" not in found.train[0]


def test_polis_learns_in_the_order_of_the_file_and_predicts_the_other(tmp_path):
    def line(user, i):
        return {"prompt": "p", "chosen": f"a{i}", "rejected": f"b{i}", "user": user, "id": str(i)}

    write(tmp_path / "unseen_users_adapt.jsonl", [line("v", 0), line("w", 1), line("v", 2), line("alone", 3)])
    write(tmp_path / "unseen_users_test.jsonl", [line("w", 4), line("v", 5)])
    found = protocols.polis(tmp_path)
    assert found.draws == [[Draw("v", [0, 2], [5]), Draw("w", [1], [4])]] and not found.train


# Baselines on responses of one dimension.


def one_dimension(heights, pairs, **loaded) -> Setting:
    """Comparisons of new users between responses of these heights; generic rewards are 0, B is 1."""
    states = torch.tensor(heights, dtype=torch.float64)[:, None]
    said = [(user, *pair) for user, some in pairs.items() for pair in some]
    users_N, y1_N, y2_N = torch.tensor(said, dtype=torch.long).view(-1, 3).T
    one_N = torch.ones(len(said), dtype=torch.float64)
    problem = LinearProblem(LossConfig(), states, one_N[:1], y1_N, y2_N, users_N, one_N, one_N, max(pairs, default=0))
    rows = {user: [n for n, (other, *_) in enumerate(said) if other == user] for user in pairs}
    new = Judgements(problem, torch.zeros(1).double(), torch.ones(1, 1).double(), rows)
    return Setting(SimpleNamespace(**loaded), new, new, {user: new.of(user) for user in pairs}, {}, {}, [], [])


def test_the_nearest_trained_user_is_the_most_likely_one():
    users = LowRankUsers(torch.zeros(1, 1), torch.ones(1, 1, 1), torch.tensor([[-2.0], [0.5], [3.0]]))
    loaded = {"model": SimpleNamespace(user_model=users), "users": range(3)}
    # Three comparisons: +1, -1, -1 (twice the lower response is chosen); then one to predict, +2.
    setting = one_dimension([0.0, 1.0, 2.0], {7: [(1, 0), (0, 1), (0, 1), (2, 0)]}, **loaded)

    def likelihood(z, differences):
        return math.prod(1 / (1 + math.exp(-z * d)) for d in differences)

    row = nearest(setting)
    for learn, differences in (([0], [1]), ([0, 1], [1, -1]), ([0, 1, 2], [1, -1, -1]), ([1, 2], [-1, -1])):
        best = max((-2.0, 0.5, 3.0), key=lambda z: likelihood(z, differences))
        (margin_N,) = row([Turn(7, learn, [3])])
        assert margin_N.tolist() == [2 * best], learn
    assert {max((-2.0, 0.5, 3.0), key=lambda z: likelihood(z, d)) for d in ([1], [1, -1], [-1, -1])} == {3.0, 0.5, -2.0}
    assert row([Turn(7, [], [3])])[0].tolist() == [0.0]


def test_vote_share_by_hand(tmp_path):
    """A won 2 of 2, B 1 of 3, C 0 of 1: shares 3/4, 2/5, 1/3; who is not in training has 1/2."""
    votes = [("A", "B"), ("A", "B"), ("B", "C")]
    path = write(tmp_path / "train.jsonl", [{"prompt": "p", "chosen": a, "rejected": b, "user": "u"} for a, b in votes])
    pairs = [("A", "D"), ("D", "B"), ("C", "B"), ("D", "E")]
    setting = one_dimension([0.0], {}, config=SimpleNamespace(data=DataConfig(train=str(path))))
    setting = setting._replace(raw={1: [compared("p", a, b) for a, b in pairs]})
    (margin_N,) = vote_share(setting)([Turn(1, [], [0, 1, 2, 3])])
    assert np.allclose(margin_N, [3 / 4 - 1 / 2, 1 / 2 - 2 / 5, 1 / 3 - 2 / 5, 0])
    assert correct(margin_N.numpy()).tolist() == [1, 1, 0, 0.5]


@pytest.mark.parametrize(("K", "N", "seed"), [(2, 5, 0), (2, 1, 1), (3, 6, 2), (3, 2, 3), (3, 12, 4)])
def test_lores_weights_are_the_best_on_a_grid_of_the_simplex(K, N, seed):
    x_NK = 3 * torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = 400
    grid = [
        w
        for w in torch.cartesian_prod(*[torch.arange(steps + 1)] * (K - 1)).view(-1, K - 1).tolist()
        if sum(w) <= steps
    ]
    grid_GK = torch.tensor([[*w, steps - sum(w)] for w in grid], dtype=torch.float64) / steps
    losses_G = -logsigmoid(x_NK @ grid_GK.T).mean(dim=0)
    w_K = lore.weights(x_NK)
    assert w_K.min() >= 0 and abs(w_K.sum() - 1) < 1e-12
    loss = -logsigmoid(x_NK @ w_K).mean()
    assert loss <= losses_G.min() + 1e-6 and losses_G.max() > loss + 0.1
    assert (w_K - grid_GK[losses_G.argmin()]).abs().max() < 0.02


def test_lores_training_goes_down_its_objective(monkeypatch):
    """Adam's first step is lr times the gradient's sign. The gradient is that of the sum of users' mean losses, in loops."""
    generator = torch.Generator().manual_seed(5)
    K, states_SW = 2, 40 * torch.randn(6, 3, generator=generator).double()
    pairs = {4: [(0, 1), (2, 3), (0, 5)], 9: [(1, 0)]}
    monkeypatch.setattr(lore, "STEPS", 0)
    start = lore.train(states_SW, pairs, K, seed=3)
    V_KW = (100 * start.V_KW).requires_grad_()
    logits_MK = torch.randn(2, K, generator=torch.Generator().manual_seed(3)).double()
    assert torch.allclose(start.mean_K, logits_MK.softmax(dim=1).mean(dim=0))
    loss = torch.zeros(()).double()
    for m, said in enumerate(pairs.values()):
        w_K = logits_MK[m].exp() / logits_MK[m].exp().sum()
        for y1, y2 in said:
            margin = sum(w_K[k] * (V_KW[k] @ (states_SW[y1] - states_SW[y2])) for k in range(K)) / 100
            loss = loss + torch.log1p(torch.exp(-margin)) / len(said)
    loss.backward()
    monkeypatch.setattr(lore, "STEPS", 1)
    moved_KW = 100 * lore.train(states_SW, pairs, K, seed=3).V_KW - V_KW.detach()
    assert (
        torch.allclose(moved_KW, -0.5 * V_KW.grad.sign(), atol=1e-4)
        and len(set(moved_KW.sign().flatten().tolist())) == 2
    )


def test_lore_tells_two_camps_apart():
    """One camp likes the first dimension, the other dislikes it: a new user of either is known after three comparisons."""
    states_SW = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    pairs = {}
    for user in range(10):
        drawn = [random.Random(100 * user + n).sample(range(20), 2) for n in range(40)]
        ordered = [sorted(pair, key=lambda y: states_SW[y, 0], reverse=user % 2 == 0) for pair in drawn]
        pairs[user] = [tuple(pair) for pair in ordered]
    basis = lore.train(states_SW, {u: pairs[u] for u in range(8)}, 2, seed=0)
    assert (basis.mean_K - 0.5).abs().max() < 0.2
    for user in (8, 9):
        x_NK = torch.stack([(states_SW[y1] - states_SW[y2]).double() @ basis.V_KW.T for y1, y2 in pairs[user]])
        w_K = lore.weights(x_NK[:3])
        assert correct((x_NK[3:] @ w_K).numpy()).mean() > 0.9
        assert correct((x_NK[3:] @ w_K.flip(0)).numpy()).mean() < 0.1 and w_K.max() > 0.8


# With a model: against the project's other commands.

HEAD = (
    "model.width=32", "model.heads=2", "method=prm", "user_model.aggregator=linear", "user_model.tokens=1", "model.pooling=both",
    "model.frozen=true", "user_model.prior=2", "user_model.shared_prior=1", "data.valid=null",
    "data.max_tokens=512", "data.max_prompt_tokens=512",
)  # fmt: skip


def trained(folder: Path, *keys: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(folder.parent / "cache"))
        patch.setattr("sys.argv", ["train", "--config", "tiny", "--set", f"run_dir={folder}", *HEAD, *keys])
        train.main()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "rank2", "user_model.rank=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two new voters, who say what dave and alice of the training file say, alice's the other way round."""
    path = tmp_path_factory.mktemp("polis")
    of = {name: [line for line in LINES if line["user"] == name] for name in ("dave", "alice")}
    erin = [{**line, "user": "erin", "id": f"e{i}"} for i, line in enumerate(of["dave"])]
    frank = [{**c, "user": "frank", "id": f"f{i}", "chosen": c["rejected"], "rejected": c["chosen"]} for i, c in enumerate(of["alice"])]  # fmt: skip
    write(path / "unseen_users_adapt.jsonl", erin[:6] + frank[:6])
    write(path / "unseen_users_test.jsonl", erin[6:] + frank[6:])
    return path


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def setting(run, folder):
    return set_up(load_final(run), protocols.polis(folder))


def predicted_by(run: Path, file: Path, users: bool) -> dict[str, list[float]]:
    """The margins of a run's own model on a file, by user, in the file's order; users: read as themselves."""
    loaded = load_final(run)
    found: dict[str, list[float]] = {}
    from prlhf.adapt.__main__ import encoded

    data = encoded(loaded, read_comparisons(file))
    numbers = [c.user if users else 0 for c in data.comparisons]
    rewards = score(loaded.model, data.comparisons, numbers, 16)
    for name, margin in zip(data.names, (rewards.chosen - rewards.rejected).tolist()):
        found.setdefault(name, []).append(margin)
    return found


def test_the_user_blind_row_is_a_vanilla_run_and_the_ceiling_a_run_on_both_files(setting, folder, tmp_path):
    number = {setting.raw[user][0].user: user for user in setting.raw}
    turns = setting.turns(0, 3)
    assert [turn.learn for turn in turns] == [[0, 1, 2]] * 2
    vanilla = trained(tmp_path / "vanilla", "user_model.kind=uniform")
    expected = predicted_by(vanilla, folder / "unseen_users_test.jsonl", users=False)
    for turn, margin_N in zip(turns, user_blind(setting)(turns)):
        name = next(name for name, user in number.items() if user == turn.user)
        assert np.allclose(margin_N, expected[name], atol=1e-4), name
    adapt = [json.loads(line) for line in (folder / "unseen_users_adapt.jsonl").read_text().splitlines()]
    both = write(tmp_path / "both.jsonl", LINES + adapt[:3] + adapt[6:9])
    again = trained(tmp_path / "again", "user_model.rank=2", f"data.train={both}")
    expected = predicted_by(again, folder / "unseen_users_test.jsonl", users=True)
    row = from_the_start(setting)
    for turn, margin_N, cached_N in zip(turns, row(turns), row(turns)):
        name = next(name for name, user in number.items() if user == turn.user)
        assert np.allclose(margin_N, expected[name], atol=1e-3), name
        assert torch.allclose(margin_N, cached_N, atol=1e-12)


def test_without_comparisons_all_rows_of_the_checkpoint_are_the_generic_user(setting, run, folder):
    expected = predicted_by(run, folder / "unseen_users_test.jsonl", users=False)
    turns = setting.turns(0, 0)
    adapted = Adapted(setting)
    for row in (adapted.own, adapted.another, nearest(setting), from_the_start(setting), InContext(setting).by_head()):
        for turn, margin_N in zip(turns, row(turns)):
            assert np.allclose(margin_N, expected[setting.raw[turn.user][0].user], atol=1e-5)


def test_another_users_comparisons_are_the_next_ones(setting):
    adapted, turns = Adapted(setting), setting.turns(0, 4)
    swapped = [turn._replace(user=other.user, learn=other.learn) for turn, other in zip(turns, turns[::-1])]
    told = adapted.margins(turns, swapped).plug_in
    assert all(torch.equal(a, b) for a, b in zip(adapted.another(turns), told))
    assert not any(torch.equal(a, b) for a, b in zip(adapted.another(turns), adapted.own(turns)))


def test_in_context_by_hand(setting):
    """The text; the states are those of the same tokens read without sharing; log p is the language model's, token by token."""
    told = [compared("Q?", " yes", " no"), compared("R?", "a", "b")]
    shown = with_context(told, compared("S?", "c", "d"))
    assert shown.prompt == "Q? yes\nNot: no\n\nR? a\nNot: b\n\nS?" and (shown.chosen, shown.rejected) == ("c", "d")
    model = setting.loaded.model
    readings = [
        Reading(0, tuple(5 + i % 50 for i in range(p)), tuple(y))
        for p in (7, 300)
        for y in ((40, 41, 2), (42, 2), (43,))
    ]
    found = read(model, readings)
    assert torch.allclose(found.states_MW, model.states_of(readings), atol=1e-5)
    for reading, log_p in zip(readings, found.log_p_M):
        text = torch.tensor([[*reading.prefix, *reading.response]])
        with torch.no_grad():
            logs = model.backbone(text).logits[0].log_softmax(dim=-1)
        start = len(reading.prefix)
        expected = sum(logs[start + i - 1, token] for i, token in enumerate(reading.response))
        assert abs(log_p - expected) < 1e-3
    turns = setting.turns(0, 2)
    reader = InContext(setting)
    for by_head in (True, False):
        again = reader.margins(turns, by_head)
        assert not any(
            torch.allclose(a, b, atol=1e-3) for a, b in zip(again, reader.margins(setting.turns(0, 0), by_head))
        )
    with pytest.raises(UserError, match="found messages, expected text"):
        with_context(told, replace(told[0], prompt=({"role": "user", "content": "Q?"},)))


def test_the_command_prints_the_table_and_writes_it(call, run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "KS", (2, 3))
    monkeypatch.setattr(lore, "STEPS", 5)
    again = trained(tmp_path / "seed1", "user_model.rank=2", "seed=1")
    arguments = ("polis", "--data", folder, "--checkpoint", run, again, "--in-context", 1, "--out", tmp_path / "out")
    status, said, err = call(command.main, *arguments)
    assert status == 0, err
    assert said.count("2 new users") == 2 and (tmp_path / "out/table.md").read_text().strip() in said
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("|")]
    assert rows[2:8] == [
        "generic user",
        "adapted",
        "another user's N",
        "nearest trained user",
        "user-blind",
        "vote share",
    ]
    assert "LoRe, K = 3" in rows and "LoRe, best K at each N" in rows and "in context, likelihood" in rows
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["shots"] == [0, 1, 2, 5, 10, 20, 50]
    per_user = result["accuracy"]
    assert per_user["in context, likelihood"][0] == [None, None] and None not in per_user["in context, likelihood"][1]
    assert per_user["adapted"][0] == per_user["generic user"][0]
    best = [max(sum(per_user[f"LoRe, K = {K}"][n]) for K in (2, 3)) for n in range(7)]
    assert np.allclose([sum(row) for row in per_user["LoRe, best K at each N"]], best)


def test_what_is_refused(call, run, folder, tmp_path):
    known = write(tmp_path / "unseen_users_adapt.jsonl", LINES[:4]), write(tmp_path / "unseen_users_test.jsonl", LINES)
    status, _, err = call(command.main, "polis", "--data", known[0].parent, "--checkpoint", run)
    assert status == 2 and "were trained on; expected a checkpoint of the protocol's train.jsonl" in err
    for arguments, message in (
        (("polis", "--checkpoint", run), "polis: found no --data"),
        (("pal", "--data", folder), "pal: found no --raw"),
        (("polis", "--data", folder), "polis: found no --checkpoint; expected one"),
        (
            ("polis", "--data", folder, "--checkpoint", run, "--in-context", 3),
            "--in-context 3: expected some of 0, 1, 2",
        ),
    ):
        status, _, err = call(command.main, *arguments)
        assert status == 2 and message in err, err


def test_a_protocol_writes_its_training_file_once_and_measures_what_was_trained_on_it(call, tmp_path, monkeypatch):
    monkeypatch.setitem(protocols.PROTOCOLS, "lore-tldr", lambda path: protocols.lore_tldr(path, left_out=0, runs=2))
    arguments = ("lore-tldr", "--raw", RAW / "tldr", "--out", tmp_path / "out")
    status, said, err = call(command.main, *arguments)
    assert status == 0 and "4 comparisons of 1 users; 2 new users, 2 draws" in said, err
    assert f"data.train={tmp_path}/out/train.jsonl" in said
    assert {c.user for c in read_comparisons(tmp_path / "out/train.jsonl").comparisons} == {"anna"}
    status, _, err = call(command.main, *arguments)
    assert status == 2 and "exists; expected another --out" in err
    monkeypatch.setattr(command, "KS", (2,))
    monkeypatch.setattr(lore, "STEPS", 5)
    run = trained(tmp_path / "run", "user_model.rank=2", f"data.train={tmp_path}/out/train.jsonl")
    status, said, err = call(command.main, *arguments, "--checkpoint", run)
    assert status == 0 and "2 new users" in said, err
    adapted = json.loads((tmp_path / "out/result.json").read_text())["accuracy"]["adapted"]
    assert np.shape(adapted) == (11, 2) and set(np.unique(adapted[0])) <= {
        0.0,
        0.5,
        1.0,
    }  # one comparison each to predict


# The table.


def test_the_interval_is_that_of_all_resamples():
    """Of gains 0, 0, 0, 1 the resampled mean is Binomial(4, 1/4) / 4: P(0) = 0.32, P(<= 2/4) = 0.95, P(<= 3/4) = 0.996."""
    found = report.difference(np.array([0.5, 0.5, 0.5, 1.0]), np.array([0.5, 0.5, 0.5, 0.0]))
    assert found == (0.25, 0.0, 0.75)


def test_cells_and_the_spread_over_seeds_by_hand():
    generic = np.array([[[0.5, 0.7]], [[0.5, 0.7]]])  # two seeds, one N, two users
    better = np.array([[[0.9, 0.7]], [[0.7, 0.9]]])  # means 0.8 and 0.8 of users; of seeds too
    other = np.array([[[0.6, 0.6]], [[0.8, 0.8]]])
    result = report.Result((5,), {"generic user": generic, "LoRe, K = 2": better, "LoRe, K = 3": other})
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.table(result.with_best("LoRe, K")).splitlines()
    ]
    assert cells[0] == ["N", "5", "sd over seeds"]
    assert cells[2] == ["generic user", "60.0", "0.0"]
    assert cells[3] == ["LoRe, K = 2", "80.0 (+10.0 to +30.0)", "0.0"]  # gains of the users 0.3 and 0.1
    assert cells[4] == ["LoRe, K = 3", "70.0 (+0.0 to +20.0)", "14.1"]  # 0.6 and 0.8: 0.1 sqrt 2
    assert cells[5][:2] == [report.BEST, cells[3][1]]
    seldom = np.full((2, 1, 2), np.nan)
    result = report.Result(
        (5,), {"generic user": generic, "adapted": better, "vote share": other, "in context": seldom}
    )
    less = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.less_table(result).splitlines()]
    assert less[2:] == [["vote share", "+10.0 (+10.0 to +10.0)"], ["in context", ""]]  # 0.8 less 0.7 of both users
