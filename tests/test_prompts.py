"""New users where no reward is linear in their coordinates: soft prompts, P-DPO, softmax clusters."""

import csv
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import (
    TOKENIZER,
    USERS,
    as_plain,
    at_place,
    plain_backbone,
    random_comparisons,
    swapped,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import prlhf
from examples import new_workers
from prlhf.adapt import __main__ as adapt
from prlhf.adapt import gauss_newton
from prlhf.adapt.evidence import judgements
from prlhf.adapt.gauss_newton import Basis, UserProblem, search
from prlhf.adapt.nonlinear import known_user
from prlhf.adapt.reading import task_of
from prlhf.adapt.rows import new_rows_prior, trained_rows
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.evaluate import __main__ as evaluate
from prlhf.generate import __main__ as generate
from prlhf.method.losses import ResponseLogProbs, Rewards, needs_reference, preference_loss
from prlhf.method.plain import log_prob, reward
from prlhf.method.users import UserModel
from prlhf.score.score import score
from prlhf.score.slopes import parts_of
from prlhf.score.task import Task
from prlhf.store.final import Loaded, load_final
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent

RM, RANK, LINEAR = "method=prm", "user_model.rank=2", "user_model.aggregator=linear"
CLUSTER, SOFTMAX = ("user_model.kind=cluster", "user_model.clusters=3"), "user_model.softmax=true"
MODELS = {
    "P-DPO": (),
    "P-DPO, nll, smoothed, behind the prompt": (
        "loss.nll=0.5", "loss.label_smoothing=0.1", RANK, "user_model.place=prompt_end"
    ),
    "P-DPO, users alone": ("user_model.shared=false",),
    "P-DPO, linear": (LINEAR,),
    "P-DPO, clusters": CLUSTER,
    "P-DPO, softmax": (*CLUSTER, SOFTMAX),
    "SimPO": ("loss.kind=simpo", "loss.beta=2", RANK),
    "IPO": ("loss.kind=ipo", RANK),
    "ORPO": ("loss.kind=orpo", RANK),
    "robust": ("loss.kind=robust", "loss.label_smoothing=0.2", RANK),
    "P-RM": (RM,),
    "P-RM, margin, centred, shared softmax": (
        RM, "loss.margin=0.5", "loss.center=0.2", *CLUSTER, SOFTMAX, "user_model.shared=true"
    ),
    "P-RM, linear head, softmax": (RM, LINEAR, "user_model.tokens=1", *CLUSTER, SOFTMAX),
}  # fmt: skip


class Given:
    """A tiny model with users who differ much, a new user's comparisons, and the prior of a new user."""

    def __init__(self, *keys: str, count: int = 4):
        self.config = tiny_config(
            *keys, "optim.micro_batch_size=2", "loss.beta=1" if "beta" not in str(keys) else "seed=0"
        )
        self.model = tiny_model(self.config, noise=0.1).eval()
        self.comparisons = [c._replace(user=USERS + 1) for c in random_comparisons(count, seed=3)]
        self.loaded = Loaded(Path("run"), self.config, TOKENIZER, UserIndex(list("abcd")), self.model)
        self.prior = trained_rows(self.loaded).prior()
        root_KR = torch.linalg.cholesky(self.prior.prior_KK)  # some L with L L^T = C
        self.basis_VR = root_KR if self.prior.directions_KV is None else self.prior.directions_KV.T @ root_KR

    def task(self, comparisons=None) -> Task:
        comparisons, reference = comparisons or self.comparisons, None
        if needs_reference(self.config):
            reference = score(self.model, comparisons, None, 4)
        return Task(self.config, self.model.requires_grad_(False), comparisons, reference)

    def problem(self, indices=None) -> UserProblem:
        return UserProblem(
            "erin", indices or list(range(len(self.comparisons))), self.prior.base_V, Basis(self.basis_VR)
        )

    def outputs(self, t_R: Tensor) -> Tensor:
        """Both outputs of each comparison, (N, 2), by the plain method for a user with this t."""
        if not hasattr(self, "backbone"):
            self.backbone = plain_backbone(self.config).requires_grad_(False)
            self.backbone.load_state_dict(self.model.backbone.state_dict())
        e_UD = self.vectors(self.prior.base_V + self.basis_VR @ t_R)
        found = []
        for c in self.comparisons:
            x, y1, y2, u_t, _ = as_plain(at_place(c, self.config.user_model.place))
            if self.config.method == "prm":
                v = None if self.model.value_head is None else self.model.value_head.weight[0]
                found.append(torch.stack([reward(self.backbone, x, y, u_t, e_UD, v) for y in (y1, y2)]))
            else:
                linear = None if self.model.aggregator is None else self.model.aggregator.linear
                found.append(torch.stack([log_prob(self.backbone, x, y, u_t, e_UD, linear) for y in (y1, y2)]))
        return torch.stack(found)

    def vectors(self, row_V: Tensor) -> Tensor:
        """A row of the table as user vectors, by the user model's definition."""
        users: UserModel = self.model.user_model
        weights = row_V.softmax(dim=0) if self.config.user_model.softmax else row_V
        if self.config.user_model.kind == "cluster" and not self.config.user_model.shared:
            return torch.einsum("k,kud->ud", weights, users.V_KUD)
        if hasattr(users, "B_KUD"):
            return users.e_UD + torch.einsum("k,kud->ud", weights, users.B_KUD)
        offset_UD = row_V.view_as(users.e_UD)
        return users.e_UD + offset_UD if users.shared else offset_UD

    def losses(self, outputs_N2: Tensor, first: int = 0) -> Tensor:
        """The loss of comparisons with these outputs, the given ones from `first` on, (N,)."""
        y1_N, y2_N = outputs_N2.T
        comparisons = self.comparisons[first : first + len(y1_N)]
        if self.config.method == "prm":
            return preference_loss(self.config.loss, Rewards(y1_N, y2_N, torch.ones(len(y1_N))), None)
        lengths = [torch.tensor([len(getattr(c, side)) for c in comparisons]) for side in ("chosen", "rejected")]
        reference = None
        if needs_reference(self.config):
            plain = [as_plain(c) for c in comparisons]
            with torch.no_grad():
                both = [[log_prob(self.backbone, x, y, [], None) for y in (y1, y2)] for x, y1, y2, *_ in plain]
            reference = ResponseLogProbs(*torch.tensor(both).T, *lengths)
        return preference_loss(self.config.loss, ResponseLogProbs(y1_N, y2_N, *lengths), reference)

    def objective(self, t_R: Tensor) -> Tensor:
        """J(t) by the plain method."""
        return self.losses(self.outputs(t_R)).sum() + t_R.square().sum() / 2


@pytest.fixture(autouse=True)
def attention_with_second_derivatives():
    """The plain method's Hessians need them."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def to_the_end(monkeypatch):
    """Searches end where rounding does."""
    monkeypatch.setattr(gauss_newton, "LAST_GRADIENT", 1e-7)


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_the_search_ends_at_a_minimum_of_the_plain_methods_objective(keys, to_the_end):
    """By autograd through the plain method: the gradient is 0, the Hessian positive, and J lower than at the prior's mean."""
    given = Given(*keys)
    at = search(given.task(), {5: given.problem()})[5]
    t_R = at.t_R.clone().requires_grad_()
    value = given.objective(t_R)
    (gradient_R,) = torch.autograd.grad(value, t_R)
    assert gradient_R.norm() < 1e-6 and at.value.item() == pytest.approx(value.item(), abs=1e-9)
    assert value < given.objective(torch.zeros_like(t_R)) - 1e-3
    hessian_RR = torch.autograd.functional.hessian(given.objective, at.t_R)
    assert torch.linalg.eigvalsh(hessian_RR).min() > 0


@pytest.mark.parametrize("name", ["P-DPO", "P-RM"])
def test_the_search_finds_what_a_brute_force_optimiser_finds(name):
    """L-BFGS through the plain method, from elsewhere; as near as the search's own end promises."""
    given = Given(*MODELS[name])
    at = search(given.task(), {5: given.problem()})[5]
    t_R = (at.t_R + 0.1 * torch.randn(len(at.t_R), generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimiser = torch.optim.LBFGS([t_R], max_iter=200, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = given.objective(t_R)
        value.backward()
        return value

    optimiser.step(closure)
    assert (t_R - at.t_R).norm() < 1e-2 < 0.1 < at.t_R.norm()


def test_a_linear_heads_search_ends_at_the_optimum_and_its_covariance(to_the_end):
    """Where rewards are linear in the coordinates, all of it is convex, and Gauss-Newton's matrix is the Hessian."""
    given = Given(RM, LINEAR, "user_model.tokens=1", RANK, "loss.margin=0.5", "loss.center=0.2")
    at = search(given.task(), {5: given.problem()})[5]
    hessian_RR = torch.autograd.functional.hessian(given.objective, at.t_R)
    inverse_RR = torch.eye(2, dtype=torch.float64) - at.told() @ at.told().T
    assert (inverse_RR - torch.linalg.inv(hessian_RR)).abs().max() < 1e-9
    assert (inverse_RR - torch.eye(2)).abs().max() > 0.01
    gradient_R = torch.autograd.functional.jacobian(given.objective, at.t_R)
    assert gradient_R.abs().max() < 1e-6 and at.t_R.norm() > 0.1


@pytest.mark.parametrize("name", ["P-DPO", "P-DPO, linear", "P-DPO, softmax", "P-RM"])
def test_the_posterior_is_gauss_newtons(name, to_the_end):
    """H = I + sum of X^T C X with X and C by autograd through the plain method. J's own Hessian is near where outputs are hardly
    curved in the user's vectors: with the linear aggregator. These random models' soft prompts are curved."""
    given = Given(*MODELS[name])
    at = search(given.task(), {5: given.problem()})[5]
    identity_RR = torch.eye(len(at.t_R), dtype=torch.float64)
    outputs_N2, x_N2R = given.outputs(at.t_R), torch.autograd.functional.jacobian(given.outputs, at.t_R)
    H_RR = identity_RR.clone()
    for n, x_2R in enumerate(x_N2R):
        C_22 = torch.autograd.functional.hessian(lambda y_2, n=n: given.losses(y_2[None], n).sum(), outputs_N2[n])
        H_RR += x_2R.T @ C_22 @ x_2R
    inverse_RR = identity_RR - at.told() @ at.told().T
    assert (inverse_RR - torch.linalg.inv(H_RR)).abs().max() < 1e-9
    told = (inverse_RR - identity_RR).abs().max()
    assert told > 0.01
    if name == "P-DPO, linear":
        hessian_RR = torch.autograd.functional.hessian(given.objective, at.t_R)
        assert (inverse_RR - torch.linalg.inv(hessian_RR)).abs().max() < 0.1 * told


def test_a_pairwise_models_objective_and_its_gradient():
    """J at the generic user from `score`, one batch for all, and its slope along a line by differences of J."""
    given = Given("method=pairwise", RANK)
    task, problems = given.task(), {5: given.problem()}
    scored = score(given.model, given.comparisons, [0] * 4, 4)
    parts, zero_R = parts_of(task, range(4)), torch.zeros(2, dtype=torch.float64)
    at = gauss_newton.evaluate(task, parts, problems, {5: zero_R})[5]
    assert at.value.item() == pytest.approx(preference_loss(given.config.loss, scored, None).sum().item(), abs=1e-9)
    line_R = torch.tensor([0.6, -0.8], dtype=torch.float64)
    ahead, behind = (gauss_newton.evaluate(task, parts, problems, {5: s * line_R})[5].value for s in (1e-4, -1e-4))
    slope = (at.gradient_R @ line_R).item()
    assert slope == pytest.approx(((ahead - behind) / 2e-4).item(), abs=1e-6) and abs(slope) > 1e-3


@pytest.mark.parametrize("place", ["before_prompt", "prompt_end"])
def test_no_user_depends_on_who_else_is_in_the_file(place):
    """Two users judge the same pairs and others, in turn; each alone is found the same, whatever the batches."""
    given = Given(f"user_model.place={place}", count=5)
    shared = given.comparisons[:3]
    comparisons = [*given.comparisons, *[swapped(c) for c in shared]]
    both = {5: given.problem([0, 1, 2, 3, 4]), 6: given.problem([5, 6, 7])}
    together = search(given.task(comparisons), both)
    for user, problem in both.items():
        alone = search(given.task(comparisons), {user: problem})[user]
        assert (alone.t_R - together[user].t_R).abs().max() < 1e-9 and alone.t_R.norm() > 0.1
        assert torch.allclose(alone.told() @ alone.told().T, together[user].told() @ together[user].told().T, atol=1e-9)
    assert (together[5].t_R - together[6].t_R).norm() > 0.1


# The folder.

RUNS = {
    "LoRA": ("lora.rank=2",),
    "full weights": (LINEAR,),
    "reward model": (RM, RANK),
    "pairwise": ("method=pairwise", RANK),
    "linear head, softmax": (RM, LINEAR, "user_model.tokens=1", *CLUSTER, SOFTMAX, "model.frozen=true"),
}
LINES = [json.loads(line) for line in (ROOT / "examples/tiny/train.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def trained(folder: Path, *keys: str) -> Path:
    """A run of a few updates on examples/tiny."""
    small = (
        "model.width=32",
        "model.heads=2",
        "user_model.tokens=2",
        "optim.max_steps=6",
        "user_model.lr=0.1",
        "data.valid=null",
        "data.limit=50",
        "loss.beta=1",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(folder.parent / "cache"))
        patch.setattr("sys.argv", ["train", "--config", "tiny", "--set", *small, *keys, f"run_dir={folder}"])
        train.main()
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("lora") / "run", *RUNS["LoRA"])


def new_lines(path: Path, names: dict[str, str], rows: slice = slice(0, 5)) -> Path:
    """Some of users' training comparisons under other names."""
    lines = [
        {**line, "user": new} for old, new in names.items() for line in [x for x in LINES if x["user"] == old][rows]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("form", RUNS)
def test_known_users_stay_bit_for_bit_and_weights_are_shared(call, form, lora, tmp_path):
    run = lora if form == "LoRA" else trained(tmp_path / "run", *RUNS[form])
    new, out = new_lines(tmp_path / "new.jsonl", {"dave": "erin", "alice": "frank"}), tmp_path / "out"
    status, said, err = call(adapt.main, "--checkpoint", run, "--data", new, "--out", out)
    assert status == 0 and "2 new users" in said and "by cross-validation over" in said, err
    before, after = (load_file(folder / "users.safetensors") for folder in (run / "final", out))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        table = len(weight) < len(after[name])
        assert torch.equal(weight, after[name][: len(weight)]) and len(after[name]) == len(weight) + 2 * table
    own = {"LoRA": "adapter_model.safetensors", "full weights": "model.safetensors"}.get(form)
    there = [file for file in (run / "final").iterdir() if file.is_file()]
    shared = {file.name for file in there if os.path.samefile(file, out / file.name)}
    assert {"config.yaml", "tokenizer.json", own} - {None} <= shared
    assert shared.isdisjoint({"users.json", "users.safetensors"})

    loaded = load_final(out)
    known, posterior = len(loaded.users) - 2, loaded.posterior
    assert loaded.users.names[known:] in (("erin", "frank"), ("frank", "erin"))
    assert posterior.users_A.tolist() == [known + 1, known + 2]
    if posterior.directions_KV is not None:  # full offsets: mixtures of the trained users', and the floor
        share = float(re.search(r"floor ([\d.]+)", said)[1])
        offsets_MV = before["user_model.offsets_MUD"].flatten(1).double()
        mixed_VV = posterior.directions_KV.T @ posterior.directions_KV
        covariance_VV = offsets_MV.T @ offsets_MV / known
        assert torch.allclose(mixed_VV, (1 - share) * covariance_VV, atol=1e-9)
        floor = share * covariance_VV.trace() / len(covariance_VV)
        assert (0.0 if posterior.floor is None else posterior.floor) == pytest.approx(floor.item(), rel=1e-6)
        assert torch.equal(posterior.prior_KK, torch.eye(known, dtype=torch.float64))
        rows_2V = after["user_model.offsets_MUD"][-2:].flatten(1).double()
        mixed_2V = torch.linalg.lstsq(offsets_MV.T, rows_2V.T).solution.T @ offsets_MV
        assert share or (mixed_2V - rows_2V).norm() < 1e-5 * rows_2V.norm()
        assert rows_2V.norm() > 1e-3
    for user in posterior.users_A.tolist():  # surer than before, and not of what is impossible
        shares = torch.linalg.eigvalsh(posterior.covariance(user))
        told = posterior.prior_KK.trace() * posterior.law_of(user).scale - posterior.covariance(user).trace()
        assert shares.min() > 0 and told > 0

    status, said, err = call(evaluate.main, "--checkpoint", out, "--data", new, "--set", "evaluate.bootstrap=100")
    assert status == 0 and "integrated over their vectors" in said, err
    report = json.loads((out / "eval/report.json").read_text())
    assert report["per_user"].keys() == {"erin", "frank"} and report["calibration"]["adapted"]["comparisons"] == 10
    if "method=prm" in RUNS[form]:
        ask, line = tmp_path / "score.jsonl", json.loads(new.read_text().splitlines()[0])
        sides = [
            {**{k: line[k] for k in ("prompt", "user", "user_text")}, "response": line[side]}
            for side in ("chosen", "rejected")
        ]
        ask.write_text("".join(json.dumps(side) + "\n" for side in sides))
        assert call(generate.main, "--checkpoint", out, "--score", ask, "--out", tmp_path / "r.jsonl")[0] == 0
        scored = [json.loads(x) for x in (tmp_path / "r.jsonl").read_text().splitlines()]
        margin = json.loads((out / "eval/margins.jsonl").read_text().splitlines()[0])
        assert min(x["reward_std"] for x in scored) > 0 and sum(x["probability"] for x in scored) == pytest.approx(1)
        assert scored[0]["reward"] - scored[1]["reward"] == pytest.approx(margin["true"], abs=1e-4)
        assert scored[0]["probability"] == pytest.approx(margin["probability"], abs=1e-5)
        assert shown_deviation(call, out, new) == pytest.approx(by_differences(out, new), rel=0.02)
        assert abs(margin["probability"] - 0.5) < abs(1 / (1 + math.exp(-margin["true"])) - 0.5)


def shown_deviation(call, folder: Path, data: Path) -> float:
    """The standard deviation of erin's margins that `prlhf users` shows."""
    status, _, err = call(adapt.main, "users", folder, "--data", data)
    assert status == 0, err
    rows = {row["user"]: row for row in csv.DictReader((folder / "users/users.csv").open())}
    assert rows["dave"]["standard_deviation"] == ""
    return float(rows["erin"]["standard_deviation"])


def by_differences(folder: Path, data: Path) -> float:
    """The same from the margins of users a little beside where a new one begins, in float32."""
    model, lines = prlhf.load(str(folder)), [json.loads(line) for line in data.read_text().splitlines()]
    number, users, step = model.loaded.number("erin"), model.loaded.model.user_model, 0.02
    table = users.get_parameter(users.table).data
    base = table[0].clone() if users.first_user == 0 else torch.zeros_like(table[0])
    base = base - base.mean() if model.loaded.config.user_model.softmax else base
    slopes = []
    for k in range(len(base)):
        margins = []
        for sign in (1, -1):
            table[number - users.first_user] = base + sign * step * torch.nn.functional.one_hot(
                torch.tensor(k), len(base)
            )
            margins.append(torch.tensor(model.margins(lines, users="erin")).double())
        slopes.append((margins[0] - margins[1]) / (2 * step))
    x_NK = torch.stack(slopes, dim=1)
    return ((x_NK @ model.loaded.posterior.covariance(number)) * x_NK).sum(dim=1).mean().sqrt().item()


def test_a_new_user_is_who_their_comparisons_say(call, lora, tmp_path):
    """Opposite comparisons move a user's margins in opposite directions from the generic user's."""
    new = new_lines(tmp_path / "new.jsonl", {"dave": "same"})
    opposite = [{**line, "user": "opposite", "chosen": line["rejected"], "rejected": line["chosen"]}
                for line in map(json.loads, new.read_text().splitlines())]  # fmt: skip
    nobody = {**opposite[0], "user": None}  # tells of nobody
    with new.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*opposite, nobody])
    out = tmp_path / "out"
    status, said, err = call(adapt.main, "--checkpoint", lora, "--data", new, "--out", out)
    assert status == 0 and "2 new users; knows" in said, err
    model = prlhf.load(str(out))
    pairs = [line for line in LINES if line["user"] == "dave"][:5]
    same, generic, other = (sum(model.margins(pairs, users=name)) for name in ("same", "generic", "opposite"))
    assert same > generic + 1e-3 and other < generic - 1e-3


def test_update_goes_on_from_what_is_known(call, lora, tmp_path):
    """In two parts a user ends near where all comparisons at once lead; nobody else moves. Trained users need training's file."""
    names = {"dave": "erin"}
    files = [
        new_lines(tmp_path / f"{i}.jsonl", names, rows)
        for i, rows in enumerate((slice(6), slice(0, 6, 2), slice(1, 6, 2)))
    ]
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert call(adapt.main, "--checkpoint", lora, "--data", files[0], "--out", a)[0] == 0
    assert call(adapt.main, "--checkpoint", lora, "--data", files[1], "--out", b)[0] == 0
    status, said, err = call(adapt.main, "--checkpoint", b, "--data", files[2], "--out", c, "--update")
    assert status == 0 and "0 new users, 1 updated" in said and "as of the users adapted before" in said, err
    at_once, half, both = (load_file(x / "users.safetensors")["user_model.offsets_MUD"] for x in (a, b, c))
    assert torch.equal(half[:-1], both[:-1])
    assert (both[-1] - at_once[-1]).norm() < 0.5 * (half[-1] - at_once[-1]).norm()

    dave = new_lines(tmp_path / "dave.jsonl", {"alice": "dave"}, slice(3, 8))  # that dave has not told yet
    assert call(adapt.main, "--checkpoint", c, "--data", dave, "--out", d, "--update")[0] == 0
    then, loaded = load_file(d / "users.safetensors")["user_model.offsets_MUD"], load_final(d)
    row = loaded.number("dave") - 1
    assert (then != both).flatten(1).any(dim=1).tolist() == [r == row for r in range(len(both))]
    # His covariance is the identity, less what training told at the trained vectors, less what the new comparisons told.
    before = load_final(c)
    prior, zero_R = new_rows_prior(before, None), torch.zeros(4, dtype=torch.float64)
    training = [x for x in adapt.training_comparisons(before) if x.user == row + 1]
    trained = known_user(before, row + 1, prior, training)
    task = task_of(before, training)
    numbers = list(range(len(training)))
    problem = UserProblem("dave", numbers, both[row].flatten().double(), Basis(prior.directions_KV.T))
    curvature_TR = gauss_newton.evaluate(task, parts_of(task, numbers), {1: problem}, {1: zero_R})[1].curvature_TR
    first_KK = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + curvature_TR.T @ curvature_TR)
    assert len(training) > 5 and torch.allclose(trained.root_KK @ trained.root_KK.T, first_KK, atol=1e-9)
    both_KK = loaded.posterior.covariance(row + 1)
    assert torch.linalg.eigvalsh(first_KK - both_KK).min() > -1e-9 and 4 > first_KK.trace() > both_KK.trace() + 1e-4
    config = (c / "config.yaml").read_text()
    (c / "config.yaml").unlink()  # a link
    (c / "config.yaml").write_text(config.replace("examples/tiny/train.jsonl", "gone.jsonl"))
    status, _, err = call(adapt.main, "--checkpoint", c, "--data", dave, "--out", tmp_path / "e", "--update")
    assert status == 2 and "user 'dave' is known from training, but data.train: gone.jsonl is not there" in err
    assert not (tmp_path / "e").exists()


def test_questions_are_chosen_for_new_and_for_adapted_users(call, lora, tmp_path):
    """Information falls from row to row where all else is equal, and those who have told much are asked of what tells less."""
    new, pairs, out = new_lines(tmp_path / "new.jsonl", {"dave": "erin"}), tmp_path / "pairs.jsonl", tmp_path / "out"
    assert call(adapt.main, "--checkpoint", lora, "--data", new, "--out", out)[0] == 0
    pairs.write_text(
        "".join(json.dumps({**line, "prompt": f"{n}? {line['prompt']}"}) + "\n" for n, line in enumerate(LINES[:8]))
    )
    told = {}
    for user, expected in (("zoe", "new; as of the users adapted before"), ("erin", "adapted")):
        asked = tmp_path / f"{user}.jsonl"
        options = ("--ask", 3, "--candidates", pairs, "--user", user, "--out", asked)
        status, said, err = call(adapt.main, "--checkpoint", out, *options)
        assert status == 0 and f"{user!r}: {expected}" in said, err
        records = [json.loads(line) for line in asked.read_text().splitlines()]
        told[user] = [record["information"] for record in records]
        assert len({tuple(record["responses"]) for record in records}) == 3 and min(told[user]) > 0
        assert all(record["user"] == user and 0 < record["probability_first"] < 1 for record in records)
    assert told["erin"][0] < told["zoe"][0]
    status, said, err = call(adapt.main, "--checkpoint", lora, "--ask", 1, "--candidates", pairs, "--user", "zoe")
    assert status == 0 and "'zoe': new; the population of trained users, scale" in said, err


def test_what_cannot_be_searched_is_refused(call, lora, tmp_path, monkeypatch):
    new, out = new_lines(tmp_path / "new.jsonl", {"dave": "erin"}), tmp_path / "out"
    monkeypatch.setattr(gauss_newton, "MOST_ROUNDS", 1)
    status, _, err = call(adapt.main, "--checkpoint", lora, "--data", new, "--out", out)
    assert status == 1 and "user 'erin': the search for the most probable vectors has not ended" in err
    assert not out.exists()
    given = Given()
    loaded = Loaded(Path("run/final"), given.config, TOKENIZER, UserIndex(list("abcd")), given.model)
    with pytest.raises(UserError, match="found method=pdpo, .*; expected method=prm with aggregator=linear"):
        judgements(loaded, given.comparisons)
    with pytest.raises(UserError, match="user 'erin': the loss of their comparisons is not finite"):
        search(given.task(), {5: given.problem()._replace(base_V=torch.full((96,), torch.nan, dtype=torch.float64))})


def test_the_length_demos_new_workers_have_pairs_that_the_run_left_out(call, lora, tmp_path):
    """Of 60 comparisons the run has learnt from 50."""
    out = tmp_path / "new.jsonl"
    call(new_workers.main, "--checkpoint", lora, "--shots", 2, 4, "--draws", 2, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["user"] for line in lines[:6]] == ["short0_n2"] * 2 + ["short0_n4"] * 4 and len(lines) == 24
    for line in lines:
        chosen, rejected = (len(line[side].split()) for side in ("chosen", "rejected"))
        assert chosen < rejected if line["user"].startswith("short") else chosen > rejected
    status, _, err = call(new_workers.main, "--checkpoint", lora, "--shots", 11, "--out", tmp_path / "more.jsonl")
    assert status == 2 and "expected 11 or more" in err and not (tmp_path / "more.jsonl").exists()
