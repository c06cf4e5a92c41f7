"""A policy's report: log-ratios by the models' own forward passes, the KL by enumeration, texts by hand, no distance untrained."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from prlhf.backbone.toys import random_backbone
from prlhf.data.comparisons import GENERIC, Prompt
from prlhf.evaluate.held_out import encoder_of
from prlhf.generate.decode import Decoding
from prlhf.judge import __main__ as command
from prlhf.judge.policy import answer_all, asked_by, policy_report, price, prompts_of, residuals, texts_of, token_mean
from prlhf.judge.texts import Answered, described, distinct, is_refusal, repetition
from prlhf.store.final import load_final
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "model.width=32",
    "model.heads=2",
    "optim.epochs=1",
    "data.limit=16",
    "data.valid_limit=4",
    "train.eval_last=false",
)
RUNS = {
    "full": ("optim.lr=0.1", "optim.batch_size=4", "data.user_text_in_reference=false"),
    "lora": ("lora.rank=2", "optim.lr=0.1"),
    "linear": (
        "lora.rank=2",
        "optim.lr=0.1",
        "user_model.lr=0.3",
        "user_model.aggregator=linear",
        "user_model.tokens=1",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Policies of a few updates: all weights and a soft prompt; LoRA and a soft prompt; LoRA and the linear aggregator. Users are
    moved apart."""
    folder = tmp_path_factory.mktemp("runs")
    for name, keys in RUNS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("PRLHF_CACHE", str(folder / "cache"))
            overrides = [f"run_dir={folder / name}", f"data.valid={ROOT / 'examples/tiny/valid.jsonl'}", *SMALL, *keys]
            patch.setattr("sys.argv", ["train", "--config", "tiny", "--set", *overrides])
            train.main()
        path = folder / name / "final" / "users.safetensors"
        tensors, generator = load_file(path), torch.Generator().manual_seed(0)
        for key in sorted(tensors):
            if key.startswith("user_model."):
                tensors[key] += 0.5 * torch.randn(tensors[key].shape, generator=generator)
        save_file(tensors, path)
    return folder


def own_models(loaded):
    """Policy and reference as Hugging Face's class has them: the policy's weights as saved, or W + alpha / rank B A by hand."""
    base = random_backbone(loaded.config.model, len(loaded.tokenizer), loaded.config.seed).eval()
    if not loaded.config.lora.rank:
        return transformers.LlamaForCausalLM.from_pretrained(loaded.path).eval(), base
    policy = random_backbone(loaded.config.model, len(loaded.tokenizer), loaded.config.seed).eval()
    adapters = load_file(loaded.path / "adapter_model.safetensors")
    for key in adapters:
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B, scale = adapters[key.replace("lora_A", "lora_B")], loaded.config.lora.alpha / loaded.config.lora.rank
            assert B.abs().max() > 1e-3
            policy.get_submodule(path).weight.data += scale * B @ adapters[key]
    return policy, base


def own_vectors(loaded, number):
    """f(0) = e_0, f(i) = e_0 + o_i, from the file."""
    tensors = load_file(loaded.path / "users.safetensors")
    e_UD, offsets_MUD = tensors["user_model.e_UD"], tensors["user_model.offsets_MUD"]
    return e_UD + offsets_MUD[number - 1] if number else e_UD


@torch.no_grad()
def own_log_probs(model, prefix, vectors=None):
    """Log-probs (V,) of the token behind the prefix; user vectors stand before it."""
    embedded = model.get_input_embeddings()(torch.tensor(prefix))
    if vectors is not None:
        embedded = torch.cat([vectors, embedded])
    return model(inputs_embeds=embedded[None]).logits[0, -1].double().log_softmax(-1)


def own_sum(model, prefix, response, vectors=None):
    return sum(own_log_probs(model, prefix + response[:i], vectors)[t].item() for i, t in enumerate(response))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_log_ratios_are_those_of_the_models_own_forward_pass(runs, name):
    """And the report's numbers are their sums over those of the tokens, user by user. The text about a user is read by the
    reference where the config says so."""
    loaded = load_final(runs / name)
    encoder, texts = encoder_of(loaded), texts_of(loaded)
    names = [*[name for name in loaded.users.names if name in texts][:2], GENERIC]
    prompts = prompts_of(loaded, None, 3)
    assert len({p.text for p in prompts}) == 3 and len(names) == 3
    asked = asked_by(loaded, encoder, prompts, names, texts)
    sides = answer_all(loaded, asked, encoder, Decoding(6, temperature=1.0), batch_size=4)
    report = policy_report(loaded, asked, sides)
    policy, base = own_models(loaded)
    sums, tokens = defaultdict(lambda: torch.zeros(2)), defaultdict(int)
    rows = defaultdict(list)  # of each user: the log-ratio of each response, and its tokens
    for a, response, log_pi, log_sft in zip(asked, sides.policy, sides.log_pi_N, sides.log_sft_N):
        before = f"{texts[a.user]}\n" if a.user in texts else ""
        assert loaded.tokenizer.decode(a.policy) == before + a.prompt.text
        assert loaded.tokenizer.decode(a.reference) == (before if name == "lora" else "") + a.prompt.text
        y = response.ids + ([response.end] if response.finished else [])
        expected = own_sum(policy, a.policy, y, own_vectors(loaded, a.number)), own_sum(base, a.reference, y)
        assert (log_pi.item(), log_sft.item()) == pytest.approx(expected, abs=1e-3)
        sums[a.user] += torch.tensor(expected)
        tokens[a.user] += len(y)
        rows[a.user].append((expected[0] - expected[1], len(y)))
    for user, row in report["users"].items():
        found, (log_pi, log_sft) = row["after"], (sums[user] / tokens[user]).tolist()
        assert found["tokens"] == tokens[user] and abs(log_pi - log_sft) > 0.01
        assert found["log_prob_per_token"] == pytest.approx(log_pi, abs=1e-4)
        assert found["reference_log_prob_per_token"] == pytest.approx(log_sft, abs=1e-4)
        assert found["log_ratio_per_token"] == pytest.approx(log_pi - log_sft, abs=1e-4)
    first, second, generic = (row["after"]["log_ratio_per_token"] for row in report["users"].values())
    one, two, nobody = (
        [(ratio - t * sum(r for r, _ in rows[user]) / tokens[user]) / tokens[user] for ratio, t in rows[user]]
        for user in names
    )
    error = math.sqrt(3 / 2 * sum(((i + j) / 2 - k) ** 2 for i, j, k in zip(one, two, nobody)))
    assert report["price"] == {
        "known_users": 2,
        "as_themselves": pytest.approx((first + second) / 2),
        "least": min(first, second),
        "most": max(first, second),
        "generic": generic,
        "more": pytest.approx((first + second) / 2 - generic),
        "more_standard_error": pytest.approx(error, abs=1e-4),
    }


def test_each_user_is_asked_with_their_own_text(runs, call, tmp_path):
    """Prompts of a file: dave's and alice's texts are those of data.valid, bob has none anywhere. A text beside a prompt is about
    the prompt's user: alice's stands in for hers, nobody else reads it; one of no named user is read by nobody."""
    lines = [
        {"prompt": "One.\n"},
        {"prompt": "Two.\n", "user": "alice", "user_text": "I like cats."},
        {"prompt": "Three.\n", "user_text": "I am anybody."},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded, run, out = load_final(runs / "lora"), runs / "lora", tmp_path / "out"
    options = ("--prompts", tmp_path / "prompts.jsonl", "--users", "alice,bob,dave,generic", "--max-new-tokens", 2)
    status, said, err = call(command.main, "--report", run, "--out", out, *options)
    assert status == 0, err
    letters, jokes = "I like letters.", "I like jokes."
    expected = {
        "alice": [letters, "I like cats.", letters],
        "bob": [None] * 3,
        "dave": [jokes] * 3,
        GENERIC: [None] * 3,
    }
    found = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [(r["user"], r["user_text"]) for r in found] == [
        (user, text) for user in expected for text in expected[user]
    ]
    prompts = prompts_of(loaded, str(tmp_path / "prompts.jsonl"), 9)
    asked = asked_by(loaded, encoder_of(loaded), prompts, list(expected), texts_of(loaded))
    read = [loaded.tokenizer.decode(a.policy) for a in asked]
    texts = [text for user in expected for text in expected[user]]
    assert read == [(f"{text}\n" if text else "") + line["prompt"] for text, line in zip(texts, lines * 4)]
    assert json.loads((out / "report.json").read_text())["without_text"] == ["bob"]
    assert "there was none of 1 of 3 known users for some prompts or all ('bob')" in said


def test_the_mean_log_ratio_estimates_the_kl(runs):
    """One token each, where half of all tokens end the response: KL = sum_v pi(v) log pi(v) / pi_SFT(v), over all v."""
    loaded = load_final(runs / "full")
    loaded.model.backbone.generation_config.eos_token_id = list(range(0, len(loaded.tokenizer), 2))
    encoder = encoder_of(loaded)
    prompts = [Prompt(str(n), "Tell me.", None, None, "") for n in range(1500)]
    asked = asked_by(loaded, encoder, prompts, [loaded.users.names[0]], {})
    sides = answer_all(loaded, asked, encoder, Decoding(1, temperature=1.0), batch_size=300)
    ended = [response.end for response in sides.policy if response.finished]
    assert 500 < len(ended) < 1000 and len(set(ended)) > 20
    assert all(not response.ids for response in sides.policy if response.finished)
    policy, base = own_models(loaded)
    log_pi_V = own_log_probs(policy, asked[0].policy, own_vectors(loaded, 1))
    kl = (log_pi_V.exp() * (log_pi_V - own_log_probs(base, asked[0].reference))).sum().item()
    mean, error = token_mean(sides.log_pi_N - sides.log_sft_N, sides.tokens_N)
    print(f"KL {kl:.4f}, estimated {mean:.4f} +- {error:.4f}")
    assert kl > 8 * error and abs(mean - kl) < 3.5 * error


def test_an_untrained_policy_is_its_reference(runs, tmp_path):
    """Adapters of B = 0 and an aggregator h' = h: no distance, and the very same responses, since they are drawn alike."""
    for source in (runs / "linear" / "final").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    zeroed = {key: tensor * ("lora_B" not in key) for key, tensor in adapters.items()}
    save_file(zeroed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    users = load_file(tmp_path / "users.safetensors")
    users["aggregator.linear.weight"] = torch.eye(32, 64)
    users["aggregator.linear.bias"].zero_()
    save_file(users, tmp_path / "users.safetensors")
    reports = []
    for path in (tmp_path, runs / "linear"):
        loaded = load_final(path)
        encoder = encoder_of(loaded)
        asked = asked_by(loaded, encoder, prompts_of(loaded, None, 3), [*loaded.users.names, GENERIC], {})
        sides = answer_all(loaded, asked, encoder, Decoding(8, temperature=1.0), batch_size=8)
        reports.append(policy_report(loaded, asked, sides))
        assert (sides.policy == sides.reference) == (path == tmp_path)
        assert len({tuple(r.ids) for r in sides.reference}) == 3  # one for each prompt
    untrained, trained = (
        [row["after"]["log_ratio_per_token"] for row in report["users"].values()] for report in reports
    )
    assert max(map(abs, untrained)) < 1e-6 and max(map(abs, trained)) > 1e-2
    for row in reports[0]["users"].values():
        assert row["before"] == {key: row["after"][key] for key in row["before"]}


def test_the_mean_over_tokens_by_hand():
    """1 and 2 over 1 and 3 tokens: 3 / 4; residuals 1/4 and -1/4, so sqrt(2 (1/16 + 1/16)) / 4 = 1/8."""
    assert token_mean(torch.tensor([1.0, 2.0]), torch.tensor([1, 3])) == (0.75, pytest.approx(0.125))
    assert token_mean(torch.tensor([3.0]), torch.tensor([2])) == (1.5, None)


def test_the_price_has_a_paired_standard_error_over_prompts():
    """By hand over 1 and 3 tokens: 1 and 2 as themselves, residuals 1/16 and -1/16 (above), 2 and 1 as the generic user, 5/16 and
    -5/16: sqrt(2 (1/16 + 1/16)) = 1/2. None between equal users, however each one varies.
    Of 400 prompts, lengths and users' ratios drawn together: as the jackknife has it, which leaves each prompt out in turn."""

    def found(sums, tokens):
        rows = {user: {"after": {"log_ratio_per_token": token_mean(sums[user], tokens[user]).mean}} for user in sums}
        return price(rows, {user: residuals(sums[user], tokens[user]) for user in sums})

    T, up, down = torch.tensor([1, 3]), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert found({"a": up, GENERIC: down}, {"a": T, GENERIC: T})["more_standard_error"] == pytest.approx(0.5)
    same = found({"a": up, "b": up, GENERIC: up}, {"a": T, "b": T, GENERIC: T})
    assert (same["more"], same["more_standard_error"]) == (0, 0)
    assert found({"a": up[:1], GENERIC: down[:1]}, {"a": T[:1], GENERIC: T[:1]})["more_standard_error"] is None

    draw, N = torch.Generator().manual_seed(0), 400
    common = torch.randn(N, generator=draw)
    tokens = {user: torch.randint(1, 129, (N,), generator=draw) for user in ("a", "b", GENERIC)}
    sums = {user: t * (0.3 + common + 0.4 * torch.randn(N, generator=draw)) for user, t in tokens.items()}
    whole = {user: (s.double().sum(), tokens[user].double().sum()) for user, s in sums.items()}
    R = {user: (whole[user][0] - sums[user].double()) / (whole[user][1] - tokens[user]) for user in sums}
    without_N = (R["a"] + R["b"]) / 2 - R[GENERIC]
    jackknife = ((N - 1) / N * (without_N - without_N.mean()).square().sum()).sqrt().item()
    assert found(sums, tokens)["more_standard_error"] == pytest.approx(jackknife, rel=0.02)


def test_texts_by_hand():
    assert (
        distinct(["a b a", "b c"], 1) == 3 / 5 and distinct(["a b a", "a b"], 2) == 2 / 3 and distinct(["a"], 2) is None
    )
    assert repetition(["x x x x x x", "x x x x"]) == 2 / 4 and repetition(["a b c"]) is None
    assert repetition(["a b c d a b c d", "a b c d"]) == 1 / 6  # across responses nothing repeats
    refusals = ["I\u2019m sorry, but no.", " As an AI model, ...", "I cannot help.", "Sorry, I can't."]
    texts = [*refusals, "Rain is water.", "", "You said I cannot."]
    assert [is_refusal(text) for text in [*texts, "I'm sorry to interrupt."]] == [True] * 4 + [False] * 4
    found = described([Answered("I cannot say.", True), Answered(" \n", True), Answered("a b a b a b", False)])
    assert found == {
        "responses": 3,
        "words": 3.0,
        "distinct_1": 5 / 9,  # I, cannot, say., a, b
        "distinct_2": 4 / 7,  # two of the first, a b and b a of five
        "repetition": 1 / 3,  # abab, baba, abab
        "finished": 2 / 3,
        "empty": 1 / 3,
        "refusals": 1 / 3,
    }


def test_the_command_writes_what_it_found(runs, call, tmp_path):
    """Greedy answers of the reference are Hugging Face's; the same command replaces its own report; a judge takes its files."""
    out, run = tmp_path / "out", runs / "lora"
    short = ("--limit", 3, "--max-new-tokens", 5)
    status, said, err = call(command.main, "--report", run, "--out", out, "--temperature", 0, *short)
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    loaded = load_final(run)
    assert list(report["users"]) == [*loaded.users.names, GENERIC] and report["prompts"]["n"] == 3
    assert (out / "report.md").read_text() in said and "no estimate of the KL" in said
    _, base = own_models(loaded)
    lines = [json.loads(line) for line in (out / "reference.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * len(report["users"])
    assert {line["user"]: line["user_text"] for line in lines if line["user_text"]} == texts_of(loaded) != {}
    for line in (line for line in lines if line["user"] == GENERIC):
        ids = torch.tensor([loaded.tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]])
        whole = base.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert line["response"] == loaded.tokenizer.decode(whole, skip_special_tokens=True)
    status, said, err = call(
        command.main,
        out / "responses.jsonl",
        out / "reference.jsonl",
        "--judge",
        "rule:longer",
        "--out",
        tmp_path / "judged",
    )
    assert status == 0, err

    written = {path.name: path.read_bytes() for path in out.iterdir()}
    users = ("--users", f"{loaded.users.names[0]},generic")
    for options, part in [
        ((*short, *users), f"holds a report of {run / 'final'}, which differs in decoding, users; expected a new"),
        ((*short, "--temperature", 0, "--limit", 2), "which differs in prompts; expected"),
    ]:
        status, said, err = call(command.main, "--report", run, "--out", out, *options)
        assert status == 2 and part in err and len(err.splitlines()) == 1, err
    assert call(command.main, "--report", run, "--out", out, "--temperature", 0, *short)[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"} == {
        name: content for name, content in written.items() if not name.endswith(".png")
    }

    out = tmp_path / "drawn"
    status, said, err = call(command.main, "--report", run, "--out", out, *users, *short)
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    own, generic = (row["after"]["log_ratio_per_token"] for row in report["users"].values())
    more = "more" if own >= generic else "less"
    assert f"as the 1 known users themselves (mean; {own:.3f} to {own:.3f}), {generic:.3f} as the generic" in said
    error = report["price"]["more_standard_error"]
    assert (
        f"{abs(own - generic):.3f} ± {error:.3f} {more} (± its standard error over prompts" in said
        and "an estimate of KL" in said
    )
    assert report["decoding"]["temperature"] == 1 and math.isfinite(own)


def test_bad_input_is_refused_before_anything_is_written(runs, low_rank, call, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "report.json").write_text('{"judge": "rule:longer"}')
    (tmp_path / "empty.jsonl").write_text("")
    out = ("--out", tmp_path / "out")
    for arguments, part in [
        ((low_rank, *out), "a model of method prm does not generate, expected pdpo"),
        ((tmp_path / "nowhere", *out), "no such checkpoint"),
        ((runs / "lora", *out, "--users", "nobody"), "nobody"),
        ((runs / "lora", *out, "--users", "@own"), "--users @own: not for --report"),
        ((runs / "lora", *out, "--limit", 0), "--limit: found 0, expected at least 1"),
        ((runs / "lora", *out, "--temperature", -1), "--temperature: found -1, expected at least 0"),
        ((runs / "lora", *out, "--prompts", tmp_path / "empty.jsonl"), "empty, expected one JSON object a line"),
        (
            (runs / "lora", "--out", tmp_path / "other"),
            "holds something else ('notes.txt'), expected a new or empty folder",
        ),
        ((runs / "lora", "--out", tmp_path / "judged"), "holds something else ('report.json')"),
        ((runs / "lora", "--out", tmp_path / "empty.jsonl"), "found a file, expected"),
    ]:
        status, _, err = call(command.main, "--report", *arguments)
        assert status == 2 and part in err and len(err.splitlines()) == 1, err
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "judged", "other"]
