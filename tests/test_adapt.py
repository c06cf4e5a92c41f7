"""New users of a trained model: their vector, how sure it is, the folder that is written, and what is refused."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, VOCABULARY, tiny_config
from test_variational import expected_loss
from tiny_runs import FORMS, HEAD, LINES, ROOT, randn, trained_run, users_of, weights, write_lines

import prlhf
from prlhf.adapt import __main__ as adapt
from prlhf.adapt.evidence import Evidence
from prlhf.adapt.users import check_adaptable
from prlhf.backbone.toys import random_backbone
from prlhf.batch.tokens import Encoder, EncodingReport
from prlhf.batch.trees import Reading
from prlhf.config.keys import LossConfig
from prlhf.data.comparisons import read_comparisons
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.evaluate import __main__ as evaluate
from prlhf.generate import __main__ as generate
from prlhf.method.build import build_model
from prlhf.method.posterior import Law, Posterior
from prlhf.store import files
from prlhf.store import final as final_module
from prlhf.store.final import Loaded, load_final, save_adapted
from prlhf.train import __main__ as train

TABLES = {"low rank": "z_MK", "cluster": "w_MK", "full": "offsets_MUD", "alone": "offsets_MUD"}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("form", FORMS)
def test_new_users_of_every_form_are_at_the_optimum_and_known_ones_stay(call, form, low_rank, tmp_path):
    run = low_rank if form == "low rank" else trained_run(tmp_path / "run", form)
    new, out = write_lines(tmp_path / "new.jsonl", {"dave": "erin", "alice": "frank"}, count=6), tmp_path / "out"
    status, said, err = call(adapt.main, "--checkpoint", run, "--data", new, "--out", out)
    assert status == 0, err
    assert "2 new users" in said and "by marginal likelihood of 2 new and 4 trained users" in said
    known = users_of(run / "final")
    assert users_of(out) == [*known, "erin", "frank"]
    before, after, table = weights(run / "final"), weights(out), f"user_model.{TABLES[form]}"
    assert before.keys() == after.keys()
    rows = {name: len(before[name]) if name == table else None for name in before}
    assert all(torch.equal(before[name], after[name][: rows[name]]) for name in before)
    assert len(after[table]) == len(before[table]) + 2
    assert os.path.samefile(run / "final/tokenizer.json", out / "tokenizer.json")

    # By autograd, from the folder alone: the objective's gradient at each new user's vector is 0.
    loaded = load_final(out)
    posterior, user_model = loaded.posterior, loaded.model.user_model
    encoder = Encoder(loaded.tokenizer, loaded.config.data, "prm")
    _, basis_KUD, users, _ = user_model.parts(torch.tensor([len(known) + 1, len(known) + 2]))
    for name, c in zip(("erin", "frank"), users.detach().flatten(1).double()):
        pairs = [
            encoder.encode(x, loaded.users, EncodingReport())
            for x in read_comparisons(new).comparisons
            if x.user == name
        ]
        sides = [
            loaded.model.states_of([Reading(0, tuple(x.prefix), tuple(getattr(x, side))) for x in pairs])
            for side in ("chosen", "rejected")
        ]
        d_NW = (sides[0] - sides[1]).double()
        x_NK = d_NW if basis_KUD is None else d_NW @ basis_KUD.detach()[:, 0].double().T
        e_0 = user_model(torch.tensor([0])).detach()[0, 0].double()
        number, zeros_NK = loaded.number(name), torch.zeros_like(x_NK)
        evidence = Evidence(d_NW @ e_0, torch.zeros(len(d_NW)).double(), x_NK, zeros_NK, torch.zeros(len(d_NW)))
        c_K, S_KK = c.clone().requires_grad_(), posterior.covariance(number).requires_grad_()
        k = posterior.sharpness_of([number]).item()
        by_mean_K, by_covariance_KK = torch.autograd.grad(
            expected_loss(LossConfig(), evidence, c_K, S_KK, k), [c_K, S_KK]
        )
        # In the prior's own units: c = -C gradient, and S^-1 = C^-1 + 2 gradient is (1 + 2 C gradient) S = C.
        C_KK = posterior.law.scale * posterior.prior_KK
        assert (C_KK @ by_mean_K + c).abs().max() < 1e-2 * C_KK.diagonal().max().sqrt() < c.abs().max()
        left_KK = S_KK.detach() + C_KK @ (by_covariance_KK + by_covariance_KK.T) @ S_KK.detach()
        assert torch.allclose(left_KK, C_KK, atol=1e-2 * C_KK.diagonal().max())
        assert (S_KK.detach() - C_KK).abs().max() > 1e-2 * C_KK.diagonal().max()


def test_an_adapted_folder_is_a_model_for_every_command(call, low_rank, tmp_path):
    new, out = write_lines(tmp_path / "new.jsonl", {"dave": "erin", "carol": "dan"}), tmp_path / "out"
    assert call(adapt.main, "--checkpoint", low_rank, "--data", new, "--out", out)[0] == 0
    status, said, err = call(evaluate.main, "--checkpoint", out, "--data", new)
    assert status == 0 and "integrated over their vectors" in said, err
    report = json.loads((out / "eval/report.json").read_text())
    assert report["calibration"]["adapted"]["comparisons"] == report["comparisons"]["known_users"] > 0
    assert report["calibration"]["adapted"]["integrated"] != report["calibration"]["adapted"]["plug_in"]
    assert report["per_user"].keys() == {"erin", "dan"}
    margins, posterior = (
        list(map(json.loads, (out / "eval/margins.jsonl").read_text().splitlines())),
        load_final(out).posterior,
    )
    k = posterior.law.sharpness
    assert k != 1 and all(0 < row["probability"] < 1 for row in margins)
    for row in margins:  # nearer to a half than the margin alone says
        assert 0 <= (math.log(row["probability"] / (1 - row["probability"])) / (k * row["true"])) < 1

    model = prlhf.load(str(out))
    assert model.users[-2:] == ("dan", "erin") or model.users[-2:] == ("erin", "dan")
    row = next(line for line in LINES if line["user"] == "dave")
    lines = [
        {"prompt": row["prompt"], "response": row["chosen"], "user": user, "id": user}
        for user in ("erin", "alice", "stranger")
    ]
    others = [row["rejected"], "Perhaps."]
    lines += [{**lines[0], "response": text, "id": text} for text in others]
    (tmp_path / "score.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        call(generate.main, "--checkpoint", out, "--score", tmp_path / "score.jsonl", "--out", tmp_path / "r.jsonl")[0]
        == 0
    )
    scored = {r["id"]: r for r in map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())}
    for user in ("alice", "stranger"):
        assert scored[user]["reward_std"] is None and scored[user]["probability"] is None
    # Over draws of erin's coordinates the reward has this standard deviation.
    loaded = model.loaded
    number, user_model = loaded.number("erin"), loaded.model.user_model
    root_KK = torch.linalg.cholesky(loaded.posterior.covariance(number))
    rewards, wins = [], []
    for draw in range(300):
        with torch.no_grad():
            user_model.z_MK[number - 1] = (
                weights(out)["user_model.z_MK"][number - 1] + (root_KK @ randn(2, seed=draw)).float()
            )
        own, *rivals = model.score([row["prompt"]] * 3, [row["chosen"], *others], users="erin")
        rewards.append(own)
        wins += [1 / (1 + math.exp(-k * (own - rival))) for rival in rivals]
    assert torch.tensor(rewards).std().item() == pytest.approx(scored["erin"]["reward_std"], rel=0.15)
    assert torch.tensor(rewards).mean().item() == pytest.approx(
        scored["erin"]["reward"], abs=0.2 * scored["erin"]["reward_std"]
    )
    assert sum(wins) / 600 == pytest.approx(scored["erin"]["probability"], abs=0.03)
    assert sum(scored[name]["probability"] for name in ("erin", *others)) == pytest.approx(1.5)


def test_opposite_votes_move_a_user_the_other_way_and_more_votes_make_sure(call, low_rank, tmp_path):
    found = {}
    for name, swap, count in (("same", False, 99), ("opposite", True, 99), ("few", False, 2)):
        new = write_lines(tmp_path / f"{name}.jsonl", {"dave": "erin"}, swap, count)
        assert call(adapt.main, "--checkpoint", low_rank, "--data", new, "--out", tmp_path / name)[0] == 0
        found[name] = load_final(tmp_path / name)
    right = {}
    pairs = [line for line in LINES if line["user"] == "dave"]
    for name in ("same", "opposite"):
        margins = prlhf.load(str(tmp_path / name)).margins(pairs, users="erin")
        right[name] = sum(m > 0 for m in margins) / len(margins)
    assert right["same"] > 0.9 and right["opposite"] < 0.4
    number = len(found["same"].users)
    few, many = (torch.linalg.eigvalsh(found[name].posterior.covariance(number)) for name in ("few", "same"))
    assert (few > many).all()


def test_update_goes_on_from_what_is_known(call, low_rank, tmp_path):
    """Comparisons in two parts give nearly the vector of all at once; trained users move by their new ones; others stay."""
    alls, first, then = (tmp_path / f"{name}.jsonl" for name in ("alls", "first", "then"))
    write_lines(alls, {"dave": "erin"})
    lines = alls.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[::2]))
    then.write_text("".join(lines[1::2]))
    a, b, c = (tmp_path / name for name in "abc")
    assert call(adapt.main, "--checkpoint", low_rank, "--data", alls, "--out", a)[0] == 0
    assert call(adapt.main, "--checkpoint", low_rank, "--data", first, "--out", b)[0] == 0
    status, said, err = call(adapt.main, "--checkpoint", b, "--data", then, "--out", c, "--update")
    assert status == 0 and "0 new users, 1 updated" in said, err
    at_once, half, both = (weights(folder)["user_model.z_MK"] for folder in (a, b, c))
    assert torch.equal(half[:-1], both[:-1])
    assert (both[-1] - at_once[-1]).norm() < 0.35 * at_once[-1].norm()
    assert (half[-1] - at_once[-1]).norm() > (both[-1] - at_once[-1]).norm()

    judged = [{line["prompt"], line["chosen"], line["rejected"]} for line in LINES if line["user"] == "dave"]
    others = [line for line in LINES if {line["prompt"], line["chosen"], line["rejected"]} not in judged]
    d, more = tmp_path / "d", tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({**line, "user": "dave"}) + "\n" for line in others[:3]))
    assert call(adapt.main, "--checkpoint", c, "--data", more, "--out", d, "--update")[0] == 0
    dave = users_of(d).index("dave")
    moved = (weights(d)["user_model.z_MK"] != both).any(dim=1)
    assert moved.tolist() == [row == dave for row in range(len(both))]
    assert load_final(d).posterior.users_A.tolist() == sorted([dave + 1, len(both)])


def folder_state(folder: Path) -> tuple[int, list[str], str]:
    """How many users the three files of a folder speak of, its other files, and the users' hash."""
    rows = len(weights(folder)["user_model.z_MK"])
    assert rows == len(users_of(folder))
    return (
        rows,
        sorted(file.name for file in folder.iterdir() if file.name != "posterior.safetensors"),
        (folder / "eval/kept").read_text(),
    )


def end_at(moment: int) -> None:
    """End this process before its so many-th call that changes the disk."""
    calls = itertools.count(1)

    def counted(function):
        def called(*arguments, **keys):
            if next(calls) == moment:
                os._exit(9)
            return function(*arguments, **keys)

        return called

    changes = (
        (os, "rename"),
        (os, "link"),
        (os, "mkdir"),
        (shutil, "rmtree"),
        (files, "_exchange"),
        (files, "_sync"),
        (final_module, "save_file"),
    )
    for module, name in changes:
        setattr(module, name, counted(getattr(module, name)))


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder_whole(low_rank, tmp_path):
    """The process is ended, with no chance to clean up, before each call that changes the disk."""
    final = tmp_path / "model/final"
    shutil.copytree(low_rank / "final", final)
    (final / "eval").mkdir()
    (final / "eval/kept").write_text("kept")
    loaded = load_final(final)
    posterior = Posterior.of(torch.eye(2), {5: torch.zeros(2, 1)}, full=False, laws={0: Law(1, 1), 5: Law(1, 1)})
    before, users = folder_state(final), UserIndex([*loaded.users.names, "erin"])
    rows = torch.cat([loaded.model.user_model.z_MK.detach(), torch.ones(1, 2)])
    seen = set()
    for moment in itertools.count(1):
        child = os.fork()
        if child == 0:
            end_at(moment)
            save_adapted(final, final, users, "z_MK", rows, posterior)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        rows_then, *rest = folder_state(final)
        assert rest == list(before[1:]) and rows_then in (before[0], before[0] + 1)
        seen.add((status, rows_then))
        if status == 0:
            break
    assert moment > 10 and {(9, before[0]), (9, before[0] + 1), (0, before[0] + 1)} == seen
    assert not list(final.parent.glob(".*"))


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(call, low_rank, tmp_path):
    known, nobody = write_lines(tmp_path / "known.jsonl", {"dave": "dave", "alice": "zoe"}), tmp_path / "nobody.jsonl"
    nobody.write_text(json.dumps({**LINES[0], "user": None}) + "\n")
    new, other = write_lines(tmp_path / "new.jsonl", {"dave": "erin"}), tmp_path / "other"
    other.mkdir()
    without = tmp_path / "without"
    shutil.copytree(low_rank, without)
    config = (without / "final/config.yaml").read_text()
    (without / "final/config.yaml").write_text(config.replace("examples/tiny/train.jsonl", "gone.jsonl"))
    out, before = tmp_path / "out", {file: file.read_bytes() for file in low_rank.rglob("*") if file.is_file()}
    refusals = [
        ((low_rank, known, out), "1 of its 2 users ('dave') are known already; expected new users, or --update"),
        ((low_rank, nobody, out), "no comparison has a user"),
        ((low_rank, new, other), "exists; expected a new folder, or the checkpoint's own"),
        ((low_rank, tmp_path / "none.jsonl", out), "none.jsonl"),
        (
            (without, known, out, "--update"),
            "user 'dave' is known from training, but data.train: gone.jsonl is not there",
        ),
    ]
    for (checkpoint, data, target, *more), message in refusals:
        status, _, err = call(adapt.main, "--checkpoint", checkpoint, "--data", data, "--out", target, *more)
        assert status == 2 and message in err and err.count("\n") == 1, err
        assert not out.exists()
    for keys, message in (
        (
            ("user_model.kind=uniform", *HEAD),
            "found user_model.kind=uniform, which gives users no vectors of their own",
        ),
        (("method=pdpo", "loss.kind=hinge"), "found loss.kind=hinge, whose most probable users lie at kinks"),
    ):
        config = tiny_config(*(key for key in keys if key not in ("user_model.prior=2", "user_model.shared_prior=1")))
        model = build_model(config, TOKENIZER, 4, random_backbone(config.model, VOCABULARY, 0))
        with pytest.raises(UserError, match=message):
            check_adaptable(Loaded(Path("run/final"), config, TOKENIZER, UserIndex(list("abcd")), model))
    assert {file: file.read_bytes() for file in low_rank.rglob("*") if file.is_file()} == before


def test_in_place_and_without_training_data(call, low_rank, tmp_path):
    run, new = tmp_path / "run", write_lines(tmp_path / "new.jsonl", {"dave": "erin"})
    shutil.copytree(low_rank, run)
    config = (run / "final/config.yaml").read_text()
    (run / "final/config.yaml").write_text(config.replace("examples/tiny/train.jsonl", "gone.jsonl"))
    status, said, err = call(adapt.main, "--checkpoint", run, "--data", new, "--out", run)
    assert status == 0 and "scale 1, sharpness 1 (no comparisons of two trained users are there" in said, err
    assert users_of(run / "final") == [*users_of(low_rank / "final"), "erin"]
    again = write_lines(tmp_path / "again.jsonl", {"alice": "frank"})
    status, said, _ = call(adapt.main, "--checkpoint", run, "--data", again, "--out", run / "final")
    assert status == 0 and "as of the users who were added last" in said
    assert len(load_final(run).posterior.users_A) == 2 and not list(run.glob(".*partial"))


def test_a_later_file_is_for_itself_and_leaves_earlier_users_as_they_are(call, low_rank, tmp_path):
    """What a file's users become does not depend on who was adapted before; earlier vectors and covariances stay bit for bit."""
    first = write_lines(tmp_path / "first.jsonl", {"alice": "gina", "carol": "hugo"}, swap=True)
    second = write_lines(tmp_path / "second.jsonl", {"dave": "erin"}, count=5)
    a, both, alone = (tmp_path / name for name in ("a", "both", "alone"))
    assert call(adapt.main, "--checkpoint", low_rank, "--data", first, "--out", a)[0] == 0
    assert call(adapt.main, "--checkpoint", a, "--data", second, "--out", both)[0] == 0
    assert call(adapt.main, "--checkpoint", low_rank, "--data", second, "--out", alone)[0] == 0
    earlier, later, fresh = (load_final(folder) for folder in (a, both, alone))
    z = {folder: weights(folder)["user_model.z_MK"] for folder in (a, both, alone)}
    assert torch.equal(z[both][-1], z[alone][-1]) and torch.equal(z[both][:-1], z[a])
    erin, there = later.number("erin"), fresh.number("erin")
    assert torch.equal(later.posterior.covariance(erin), fresh.posterior.covariance(there))
    assert later.posterior.law_of(erin) == fresh.posterior.law_of(there)
    for name in ("gina", "hugo"):
        number = earlier.number(name)
        assert torch.equal(later.posterior.covariance(number), earlier.posterior.covariance(number))
        assert later.posterior.law_of(number) == earlier.posterior.law_of(number)


def test_users_who_do_not_differ_have_no_new_ones(call, tmp_path):
    """Under so narrow a prior training finds nobody different."""
    keys = (f"run_dir={tmp_path / 'run'}", "data.valid=null", *HEAD, "user_model.rank=2", "user_model.prior=0.01")
    assert call(train.main, "--config", "tiny", "--set", *keys)[0] == 0
    assert not weights(tmp_path / "run/final")["user_model.B_KUD"].any()
    new, out = write_lines(tmp_path / "new.jsonl", {"dave": "erin"}), tmp_path / "out"
    status, _, err = call(adapt.main, "--checkpoint", tmp_path / "run", "--data", new, "--out", out)
    assert (status, err.count("\n")) == (2, 1) and "its users do not differ" in err and not out.exists()
