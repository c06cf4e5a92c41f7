"""Questions worth asking, what was told before, who the users are to a model, and how one is forgotten."""

import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import HEAD, LINES, ROOT, randn, trained_run, users_of, weights, write_lines
from torch import Tensor

import prlhf
from prlhf import __main__ as console
from prlhf.adapt import __main__ as adapt
from prlhf.adapt.ask import expected_answer, questions
from prlhf.adapt.evidence import Evidence
from prlhf.adapt.forget import without
from prlhf.adapt.space import directions, nearest
from prlhf.adapt.variational import Gaussian
from prlhf.method.posterior import Law, Posterior
from prlhf.store.final import load_final
from prlhf.train import __main__ as train


def evidence(generic_N: Tensor, x_NK: Tensor) -> Evidence:
    """Comparisons with these margins of the generic user, and these features."""
    zero_N = torch.zeros_like(generic_N)
    return Evidence(generic_N, zero_N, x_NK, torch.zeros_like(x_NK), zero_N)


def test_information_is_the_mutual_information_of_answer_and_vector_by_enumeration():
    """A posterior in two dimensions on a grid of 401 x 401 points, and both answers, summed."""
    known = Gaussian.of(torch.tensor([0.4, -0.3]).double(), torch.tensor([[0.9, 0.3], [0.3, 0.5]]).double())
    line = torch.linspace(-6, 6, 401, dtype=torch.float64)
    grid_G2 = torch.cartesian_prod(line, line)
    away_G2 = grid_G2 - known.mean_K
    log_G = -((away_G2 @ torch.linalg.inv(known.covariance_KK)) * away_G2).sum(dim=1) / 2
    prior_G = (log_G - log_G.logsumexp(0)).exp()
    a_N, x_NK = (
        torch.tensor([0.0, 1.5, -4.0, 0.2, 0.0]).double(),
        randn(5, 2, seed=3) * torch.tensor([[1, 2, 3, 6, 0.01]]).T,
    )
    for a, x_K in zip(a_N, x_NK):
        first_G = torch.sigmoid(a + grid_G2 @ x_K)
        both_2G = torch.stack([first_G, 1 - first_G]) * prior_G
        product_2G = both_2G.sum(dim=1, keepdim=True) * prior_G
        exact = torch.where(both_2G > 0, both_2G * (both_2G / product_2G).log(), 0.0).sum().item()
        (found,) = questions(known, evidence(a[None], x_K[None]), 1)
        assert found.information == pytest.approx(exact, rel=1e-6)
        assert found.probability == pytest.approx(both_2G[0].sum().item(), abs=1e-6)
    # All but the sign of a wide margin is known: ln 2 less the integral of the entropy, pi^2 / 3, times the density at 0.
    sharp = expected_answer(torch.zeros(1).double(), torch.tensor([50.0**2]).double()).information_N.item()
    assert sharp == pytest.approx(math.log(2) - math.pi**2 / 3 / (50 * math.sqrt(2 * math.pi)), abs=1e-3)


def test_the_order_of_responses_does_not_matter_to_information():
    known, e = Gaussian.of(randn(3, seed=1), torch.eye(3).double()), evidence(randn(9, seed=2), randn(9, 3, seed=3))
    one, other = questions(known, e, 4), questions(known, evidence(-e.generic_N, -e.features_NK), 4)
    for q, r in zip(one, other):
        assert (
            q.row == r.row
            and q.information == pytest.approx(r.information)
            and q.probability == pytest.approx(1 - r.probability)
        )


def test_a_batch_is_the_best_of_all_subsets_where_that_is_known():
    """Margins of the mean 0 and small variances: w is near 1/4, and the information of a set near log det(I + X S X^T / 4) / 2."""
    known = Gaussian.of(torch.zeros(3).double(), torch.eye(3).double())
    x_NK = torch.tensor([
        [0.3, 0.3, 0.3], [1.0, 0.0, 0.0], [0.99, 0.02, 0.0], [0.0, 0.5, 0.5], [0.0, 0.95, 0.0], [0.6, 0.0, 0.6], [0.0, 0.1, 0.93]
    ]).double()  # fmt: skip

    def log_det(rows: tuple[int, ...]) -> float:
        x = x_NK[list(rows)]
        return torch.logdet(torch.eye(len(rows)).double() + x @ known.covariance_KK @ x.T / 4).item()

    found = [q.row for q in questions(known, evidence(torch.zeros(7).double(), x_NK), 3)]
    assert set(found) == set(max(itertools.combinations(range(7), 3), key=log_det))
    assert set(sorted(range(7), key=lambda n: -log_det((n,)))[:3]) != set(found)  # rows 1 and 2 say the same


def test_within_a_batch_what_is_known_grows_by_the_expected_curvature():
    """The third question's information, from the precision matrix and dense sums over each margin."""
    known, e = (
        Gaussian.of(randn(3, seed=1), torch.eye(3).double() * 2),
        evidence(randn(9, seed=2), 2 * randn(9, 3, seed=3)),
    )
    z_G = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    p_G = torch.softmax(-(z_G**2) / 2, dim=0)

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)

    precision_KK, found = torch.linalg.inv(known.covariance_KK), questions(known, e, 9)
    assert sorted(q.row for q in found) == list(range(9))
    for q in found:
        x_K = e.features_NK[q.row]
        mean, variance = e.generic_N[q.row] + x_K @ known.mean_K, x_K @ torch.linalg.inv(precision_KK) @ x_K
        at_G = torch.sigmoid(mean + variance.sqrt() * z_G)
        assert q.information == pytest.approx((entropy(p_G @ at_G) - p_G @ entropy(at_G)).item(), abs=1e-6)
        precision_KK = precision_KK + (p_G @ (at_G * (1 - at_G))) * torch.outer(x_K, x_K)


def test_nearest_users_and_the_map_of_points():
    points_MR = randn(30, 3, seed=1) * torch.tensor([1.0, 3.0, 2.0])
    near = nearest(points_MR)
    for m, found in enumerate(near):
        distances = {n: (points_MR[m] - points_MR[n]).norm().item() for n in range(30) if n != m}
        expected = sorted(distances.items(), key=lambda item: item[1])[:3]
        assert [n for n, _ in found] == [n for n, _ in expected]
        assert [d for _, d in found] == pytest.approx([d for _, d in expected])
    assert nearest(points_MR[:1]) == [[]] and len(nearest(points_MR[:3])[0]) == 2
    points_M2, share = directions(points_MR)
    squares_R, axes_RR = torch.linalg.eigh(points_MR.T @ points_MR)
    assert (points_M2.abs() - (points_MR @ axes_RR[:, [2, 1]]).abs()).abs().max() < 1e-9
    assert share == pytest.approx((squares_R[1:].sum() / squares_R.sum()).item())
    assert directions(points_MR[:, :1])[0].shape == (30, 2)


# Commands.


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def adapted(low_rank, tmp_path_factory):
    """erin said the first 4 things that dave did in training, dan one that carol did; ann is carol with opposite votes."""
    folder = tmp_path_factory.mktemp("adapted")
    new = write_lines(folder / "new.jsonl", {"dave": "erin"}, count=4)
    more = write_lines(folder / "dan.jsonl", {"carol": "dan"}, count=1)
    new.write_text(
        new.read_text() + more.read_text() + write_lines(folder / "ann.jsonl", {"carol": "ann"}, True).read_text()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(
            "sys.argv", ["adapt", "--checkpoint", str(low_rank), "--data", str(new), "--out", str(folder / "out")]
        )
        adapt.main()
    return folder / "out"


def distinct(lines: list[dict]) -> list[dict]:
    """The comparisons of different pairs."""
    pairs = {(line["prompt"], *sorted((line["chosen"], line["rejected"]))): line for line in reversed(lines)}
    return list(pairs.values())[::-1]


HELD_OUT = [json.loads(line) for line in (ROOT / "examples/tiny/valid.jsonl").read_text().splitlines()]


def lines_to(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["erin", "dave", "zoe"])  # adapted, from training, new
def test_the_questions_for_each_kind_of_user(call, adapted, tmp_path, name):
    """By perturbing z in the model: x is how the margin moves with it. Forms of the file change nothing."""
    lines = [line for line in distinct(HELD_OUT + LINES) if line["user"] not in ("dave", "erin")][:12]
    for line in lines:
        line.pop("user_text", None)
    pairs = lines_to(tmp_path / "pairs.jsonl", lines)
    ask = ("--checkpoint", adapted, "--ask", 5, "--user", name, "--out", tmp_path / "asked.jsonl")
    status, said, err = call(adapt.main, *ask, "--candidates", pairs)
    assert status == 0, err
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert len(asked) == 5 and all(row["user"] == name and "chosen" not in row for row in asked)
    order = [row["id"] for row in asked]
    assert [line.split(" | ")[1] for line in said.splitlines() if line.startswith("| ")][1:] == order

    model = prlhf.load(str(adapted))
    loaded, z = model.loaded, model.loaded.model.user_model.z_MK
    reader = "alice"  # her row is moved about
    at = loaded.number(reader) - 1

    def margins(z_K: Tensor) -> Tensor:
        with torch.no_grad():
            z[at] = z_K.float()
        return torch.tensor(model.margins(lines, users=reader)).double()

    zero_N = margins(torch.zeros(2))
    x_NK = torch.stack([margins(e_K) - zero_N for e_K in torch.eye(2)], dim=1)
    mean_K, covariance_KK = torch.zeros(2).double(), loaded.posterior.prior_KK
    if name == "zoe":
        covariance_KK = covariance_KK * loaded.posterior.law.scale
    if name != "zoe":
        mean_K = weights(adapted)["user_model.z_MK"][loaded.number(name) - 1].double()
    if name == "erin":
        covariance_KK = loaded.posterior.covariance(loaded.number(name))
    k = {"erin": loaded.posterior.sharpness_A[0].item(), "dave": 1.0, "zoe": loaded.posterior.law.sharpness}[name]
    assert name == "dave" or k != 1
    z_G = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    weights_G = torch.softmax(-(z_G**2) / 2, dim=0)
    if name == "dave":  # the best Gaussian around his vector, from his training comparisons
        own = [line for line in LINES if line["user"] == "dave"]
        start_N = margins_of(model, margins, own, torch.zeros(2))
        d_NK = torch.stack([margins_of(model, margins, own, e_K) - start_N for e_K in torch.eye(2)], dim=1)
        prior_KK = covariance_KK
        for _ in range(100):  # S^-1 = C^-1 + sum E p (1 - p) d d^T
            std_N = ((d_NK @ covariance_KK) * d_NK).sum(dim=1).sqrt()
            p_NG = torch.sigmoid((start_N + d_NK @ mean_K)[:, None] + std_N[:, None] * z_G)
            precision_KK = torch.linalg.inv(prior_KK) + (d_NK.T * ((p_NG * (1 - p_NG)) @ weights_G)) @ d_NK
            covariance_KK = (covariance_KK + torch.linalg.inv(precision_KK)) / 2
    zero_N, x_NK = k * zero_N, k * x_NK
    mean_N, variance_N = zero_N + x_NK @ mean_K, ((x_NK @ covariance_KK) * x_NK).sum(dim=1)
    p_NG = torch.sigmoid(mean_N[:, None] + variance_N.sqrt()[:, None] * z_G)
    p_N = p_NG @ weights_G
    expected = {line["id"]: p for line, p in zip(lines, p_N.tolist())}
    assert {row["id"]: row["probability_first"] for row in asked} == pytest.approx(
        {id: expected[id] for id in order}, abs=2e-3
    )

    # Users and sides mean nothing; `responses` are read.
    swapped = [
        {"id": x["id"], "prompt": x["prompt"], "responses": [x["rejected"], x["chosen"]], "user": 7} for x in lines
    ]
    lines_to(pairs, swapped)
    assert call(adapt.main, *ask, "--candidates", pairs)[0] == 2  # nothing that exists is replaced
    assert [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()] == asked
    (tmp_path / "asked.jsonl").unlink()
    assert call(adapt.main, *ask, "--candidates", pairs)[0] == 0
    again = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert [row["id"] for row in again] == order
    assert [1 - row["probability_first"] for row in again] == pytest.approx([row["probability_first"] for row in asked])


def margins_of(model, margins, lines: list[dict], z_K: Tensor) -> Tensor:
    """The margins of other comparisons at a z of the reader."""
    margins(z_K)
    return torch.tensor(model.margins(lines, users="alice")).double()


def test_what_was_told_is_remembered_as_hashes_and_counts_once(call, low_rank, adapted, tmp_path):
    told = json.loads((adapted / "told.json").read_text())
    assert {name: len(pairs) for name, pairs in told.items()} == {
        "erin": 4, "dan": 1, "ann": sum(line["user"] == "carol" for line in LINES)
    }  # fmt: skip
    assert not any(
        word in (adapted / "told.json").read_text() for line in LINES for word in (line["prompt"], line["chosen"])
    )
    out, same = tmp_path / "out", {"dave": "erin"}
    update = ("--out", out, "--update", "--checkpoint", adapted, "--data")
    for swap in (False, True):
        file = write_lines(tmp_path / "again.jsonl", same, swap)
        first = file.read_text().splitlines(keepends=True)[4:] + file.read_text().splitlines(keepends=True)[3:4]
        file.write_text("".join(first))
        status, _, err = call(adapt.main, *update, file)
        assert status == 2 and err.count("\n") == 1 and not out.exists()
        assert f"again.jsonl, line {len(first)}: user 'erin' has told of this pair before" in err
    file.write_text("".join(first[:-1]))
    assert call(adapt.main, *update, file)[0] == 0
    assert len(json.loads((out / "told.json").read_text())["erin"]) == 3 + len(first)

    # A user of training has told the training file, also after an update, and when the file is gone.
    news = [{**line, "user": "dave"} for line in distinct(HELD_OUT) if line["user"] == "bob"][:1]
    both, old = tmp_path / "both", next(line for line in LINES if line["user"] == "dave")
    status, _, err = call(
        adapt.main, "--checkpoint", low_rank, "--update", "--out", both, "--data", lines_to(file, [old])
    )
    assert status == 2 and "line 1: user 'dave' has told of this pair before" in err
    assert call(adapt.main, "--checkpoint", low_rank, "--update", "--out", both, "--data", lines_to(file, news))[0] == 0
    config = both / "config.yaml"
    text = config.read_text().replace("examples/tiny/train.jsonl", "gone.jsonl")
    config.unlink()  # it is linked
    config.write_text(text)
    for line in (old, *news):
        status, _, err = call(
            adapt.main, "--checkpoint", both, "--update", "--out", tmp_path / "no", "--data", lines_to(file, [line])
        )
        assert status == 2 and "has told of this pair before" in err
        ask = ("--checkpoint", both, "--ask", 1, "--user", "dave")
        status, _, err = call(adapt.main, *ask, "--candidates", file)
        assert status == 2 and "line 1: user 'dave' has told of this pair before; expected new candidates" in err
    assert call(adapt.main, "--checkpoint", both, "--ask", 1, "--user", "zoe", "--candidates", file)[0] == 0


def test_bad_questions_and_answers_are_refused_in_one_line(call, low_rank, adapted, tmp_path):
    good = [{key: value for key, value in line.items() if key != "user"} for line in distinct(HELD_OUT)[:3]]
    pairs, before = tmp_path / "pairs.jsonl", contents(adapted) | contents(low_rank)
    other_way = {**good[0], "chosen": good[0]["rejected"], "rejected": good[0]["chosen"] + " "}
    long = {**good[0], "prompt": "word " * 1000}
    sides = {"prompt": "x", "responses": ["a"]}
    asking = [
        ([*good, other_way], (), "pairs.jsonl, line 4: the same prompt and responses as in"),
        (good, ("--ask", 4), "--ask: found 4, but 3 candidates"),
        (good, ("--ask", 0), "--ask: found 0, expected at least 1"),
        ([good[0], long], (), "pairs.jsonl, line 2: longer than data.max_tokens="),
        ([{**good[0], "chosen": good[0]["rejected"]}], (), "line 1: both responses are the same text"),
        ([sides], (), "pairs.jsonl, line 1, responses: expected a list of two texts"),
        ([{"prompt": "x"}], (), "line 1: no field 'chosen'"),
        (good, ("--user", "generic"), "--user: found 'generic', who is nobody"),
        (good, ("--update",), "--update: not for --ask"),
        (good, ("--out", pairs), "pairs.jsonl exists, or its folder does not"),
    ]
    for lines, options, message in asking:
        lines_to(pairs, lines)
        status, _, err = call(
            adapt.main, "--checkpoint", adapted, "--ask", 2, "--user", "zoe", "--candidates", pairs, *options
        )
        assert (status, err.count("\n")) == (2, 1) and message in err, err
    lines_to(pairs, good)
    for options, message in (
        (("--ask", 1, "--candidates", pairs), "--user: not given; expected it with --ask"),
        (("--ask", 1, "--user", "zoe"), "--candidates: not given"),
        (("--data", pairs), "--out: not given; expected it, or --ask K"),
        (("--out", tmp_path / "x"), "--data: not given"),
        (("--data", pairs, "--out", tmp_path / "x", "--user", "zoe"), "--user: for --ask alone"),
    ):
        status, _, err = call(adapt.main, "--checkpoint", adapted, *options)
        assert (status, err.count("\n")) == (2, 1) and message in err, err

    a = {**good[0], "user": "zoe"}
    b = {**good[1], "user": "zoe"}
    for lines, message in (
        (
            [a, b, {**other_way, "user": "zoe"}],
            f"new.jsonl, line 3: user 'zoe' contradicts {tmp_path}/new.jsonl, line 1",
        ),
        (
            [a, a, {**other_way, "user": " zoe"}],
            f"new.jsonl, line 3: user 'zoe' contradicts {tmp_path}/new.jsonl, line 1",
        ),
    ):
        data = lines_to(tmp_path / "new.jsonl", lines)
        status, _, err = call(adapt.main, "--checkpoint", low_rank, "--data", data, "--out", tmp_path / "out")
        assert (status, err.count("\n")) == (2, 1) and message in err, err
    assert not (tmp_path / "out").exists() and not (tmp_path / "x").exists()
    # The same answers by two users are no contradiction, and one comparison is enough.
    lines_to(data, [a, {**other_way, "user": "yan"}])
    assert call(adapt.main, "--checkpoint", low_rank, "--data", data, "--out", tmp_path / "out")[0] == 0
    assert contents(adapted) | contents(low_rank) == before


def test_models_without_personal_vectors_are_refused(call, tmp_path, monkeypatch):
    pairs = lines_to(tmp_path / "pairs.jsonl", HELD_OUT[:2])
    keys = ("user_model.kind=uniform", *(key for key in HEAD if "prior" not in key), f"run_dir={tmp_path / 'run'}")
    assert call(train.main, "--config", "tiny", "--set", "data.valid=null", "optim.epochs=1", *keys)[0] == 0
    message = "found user_model.kind=uniform, which gives users no vectors of their own"
    ask = ("--checkpoint", tmp_path / "run", "--ask", 1, "--user", "zoe", "--candidates", pairs)
    for command, options in (
        (adapt.main, ask),
        (console.main, ("users", tmp_path / "run")),
        (console.main, ("users", tmp_path / "run", "--forget", "dave")),
    ):
        status, _, err = call(command, *options)
        assert (status, err.count("\n")) == (2, 1) and message in err, err


def by_hand(folder: Path, lines: list[dict], name: str, other: str | None) -> float:
    """The root mean square of the difference of two users' margins."""
    model = prlhf.load(str(folder))
    own, others = (torch.tensor(model.margins(lines, users=user)).double() for user in (name, other))
    return (own - others).square().mean().sqrt().item()


def test_the_table_of_users_of_a_reward_model_is_that_of_their_margins(call, adapted, tmp_path):
    held = [{**line, "user": user} for line in HELD_OUT for user in ("dave", "bob", "erin")]
    data, out = lines_to(tmp_path / "held.jsonl", held), tmp_path / "looked"
    status, said, err = call(console.main, "users", adapted, "--data", data, "--out", out)
    assert status == 0, err
    assert (out / "users.md").read_text() in said and (out / "map.png").exists()
    rows = {row["user"]: row for row in csv.DictReader((out / "users.csv").open())}
    names = users_of(adapted)
    assert list(rows) == names
    distances = {name: by_hand(adapted, held, name, None) for name in names}
    assert {name: float(row["distance"]) for name, row in rows.items()} == pytest.approx(distances, rel=1e-3)
    apart = {other: by_hand(adapted, held, "dave", other) for other in names if other != "dave"}
    near = sorted(apart, key=apart.__getitem__)[:3]
    assert rows["dave"]["nearest"] == ", ".join(f"{other} ({apart[other]:.2f})" for other in near)
    model, counts = (
        prlhf.load(str(adapted)),
        {"dave": sum(line["user"] == "dave" for line in LINES), "erin": 4, "dan": 1},
    )
    for name in ("dave", "erin"):
        margins = [model.margins([x for x in held if x["user"] == name], users=user) for user in (name, None)]
        own, generic = (sum(m > 0 for m in found) / len(HELD_OUT) for found in margins)
        row = rows[name]
        assert (float(row["accuracy"]), float(row["generic_user"])) == pytest.approx((own, generic))
        assert float(row["gain"]) == pytest.approx(own - generic) and row["held_out"] == str(len(HELD_OUT))
    assert {name: int(rows[name]["comparisons"]) for name in counts} == counts
    assert rows["dan"]["accuracy"] == "" and rows["dave"]["standard_deviation"] == ""

    loaded = model.loaded  # draws of erin's z: how her margins vary
    number, z = loaded.number("erin"), loaded.model.user_model.z_MK
    mean_K, root_KK = z[number - 1].detach().clone(), torch.linalg.cholesky(loaded.posterior.covariance(number))
    moved = []
    for k in range(2):  # the variance of a linear function: the sum over the root's columns
        for sign in (1, -1):
            with torch.no_grad():
                z[number - 1] = mean_K + sign * root_KK[:, k].float()
            moved.append(torch.tensor(model.margins(held, users="erin")).double())
    variance_N = ((moved[0] - moved[1]) / 2).square() + ((moved[2] - moved[3]) / 2).square()
    assert float(rows["erin"]["standard_deviation"]) == pytest.approx(variance_N.mean().sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("form", ["full", "rank", "cluster"])
def test_the_table_of_users_of_a_soft_prompt_is_that_of_their_vectors(call, form, tmp_path):
    keys = {"full": (), "rank": ("user_model.rank=2",), "cluster": ("user_model.kind=cluster", "user_model.clusters=3")}
    run = tmp_path / "run"
    small = ("model.width=32", "model.heads=2", "optim.epochs=1", "evaluate.bootstrap=100", f"run_dir={run}")
    assert call(train.main, "--config", "tiny", "--set", *small, *keys[form])[0] == 0
    status, said, err = call(adapt.main, "users", run)
    assert status == 0 and "standard deviations of word embeddings" in said, err
    rows = {row["user"]: row for row in csv.DictReader((run / "users/users.csv").open())}
    w = {name.removeprefix("user_model."): tensor.double() for name, tensor in weights(run / "final").items()}
    if form == "full":
        offsets = w["offsets_MUD"]
    elif form == "rank":
        offsets = torch.einsum("mk,kud->mud", w["z_MK"], w["B_KUD"])
    else:
        offsets = torch.einsum("mk,kud->mud", w["w_MK"][1:] - w["w_MK"][:1], w["V_KUD"])
        table = [[float(row[f"archetype_{k}"]) for k in (1, 2, 3)] for row in rows.values()]
        assert torch.allclose(torch.tensor(table).double(), w["w_MK"][1:], atol=1e-6)
    words_VD = load_final(run).model.backbone.get_input_embeddings().weight.detach().double()
    deviation = words_VD.var(dim=0, correction=0).sum().sqrt()
    expected = offsets.square().sum(dim=2).mean(dim=1).sqrt() / deviation
    assert [float(row["distance"]) for row in rows.values()] == pytest.approx(expected.tolist(), rel=1e-4)
    assert "standard_deviation" not in rows["dave"] and rows["dave"]["accuracy"] != ""


@pytest.mark.parametrize("name", ["erin", "dave"])
def test_who_is_forgotten_is_gone_and_the_others_stay_bit_for_bit(call, low_rank, adapted, tmp_path, name):
    folder = tmp_path / "folder"
    shutil.copytree(adapted, folder)
    (folder / "eval").mkdir()
    (folder / "eval/users.csv").write_text(f"user,n\n{name},3\n")
    (folder / "eval/report.md").write_text(f"{name}s are others\n")
    before, was, state = load_final(folder), users_of(folder), weights(folder)
    number = before.number(name)
    status, said, err = call(console.main, "users", folder, "--forget", f" {name}")
    assert status == 0, err
    after, left = load_final(folder), [other for other in was if other != name]
    assert users_of(folder) == left
    for other in left:
        old, new = before.number(other), after.number(other)
        assert torch.equal(weights(folder)["user_model.z_MK"][new - 1], state["user_model.z_MK"][old - 1])
        if before.posterior.row(old) is None:
            assert after.posterior.row(new) is None
        else:
            assert torch.equal(after.posterior.covariance(new), before.posterior.covariance(old))
    assert len(weights(folder)["user_model.z_MK"]) == len(left)
    assert all(torch.equal(weights(folder)[key], state[key]) for key in state if key != "user_model.z_MK")
    assert json.loads((folder / "told.json").read_text()).keys() == {"erin", "dan", "ann"} - {name}
    assert all(name.encode() not in file.read_bytes() for file in folder.iterdir() if file.suffix in (".json", ".safetensors") and "token" not in file.name)  # fmt: skip
    assert f"{folder}/eval/users.csv: has the word '{name}'" in said and "report.md" not in said
    assert ("of their comparisons" in said and "only training again" in said) == (name == "dave")
    assert number  # she was there
    status, _, err = call(console.main, "users", folder, "--forget", name)
    assert (status, err.count("\n")) == (2, 1) and f"user '{name}' is not known to this model" in err
    status, _, err = call(console.main, "users", folder, "--forget", "Alice")
    assert status == 2 and "(did you mean 'alice'?)" in err
    status, _, err = call(console.main, "users", folder, "--forget", "generic")
    assert (status, err.count("\n")) == (2, 1) and "who is nobody" in err
    assert users_of(folder) == left
    assert weights(adapted).keys() == state.keys() and users_of(adapted) == was  # whatever was linked


def test_a_posterior_of_whole_vectors_forgets_a_user():
    told = {2: randn(5, 1, seed=1), 4: randn(5, 3, seed=2), 7: randn(5, 2, seed=3)}
    before = Posterior.of(
        20 * torch.eye(5).double(), told, True, {0: Law(1, 1), 2: Law(1, 1.1), 4: Law(1, 1.2), 7: Law(1, 1.3)}
    )
    after = without(before, 4)
    assert after.sharpness_A.tolist() == [1.1, 1.3]
    assert after.users_A.tolist() == [2, 6] and torch.equal(after.prior_KK, before.prior_KK)
    for old, new in ((2, 2), (7, 6)):
        assert torch.equal(after.covariance(new), before.covariance(old))
        assert torch.allclose(after.covariance(new), 20 * torch.eye(5).double() - told[old] @ told[old].T)
    assert without(before, 3).users_A.tolist() == [2, 3, 6]  # who was not adapted moves the others up too
    assert without(None, 3) is None


def test_all_users_can_be_forgotten_and_the_last_adapted_one_leaves_no_posterior(call, tmp_path):
    run = trained_run(tmp_path / "run", "cluster")
    generic = weights(run / "final")["user_model.w_MK"][:1]
    new = lines_to(tmp_path / "new.jsonl", [{**LINES[0], "user": "erin"}])
    assert call(adapt.main, "--checkpoint", run, "--ask", 1, "--candidates", new, "--user", "erin")[0] == 0
    assert call(adapt.main, "--checkpoint", run, "--data", new, "--out", run)[0] == 0
    for name in reversed(users_of(run / "final")):
        assert call(adapt.main, "users", run, "--forget", name)[0] == 0
        assert not (run / "final/posterior.safetensors").exists() and not (run / "final/told.json").exists()
    assert torch.equal(weights(run / "final")["user_model.w_MK"], generic)
    assert len(load_final(run).users) == 0
    status, _, err = call(console.main, "users", run, "--data", new)
    assert (status, err.count("\n")) == (2, 1) and "knows no users" in err
