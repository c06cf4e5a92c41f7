"""User vectors behind the prompt or the response (user_model.place), from the command line to the numbers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, tiny_config, tiny_model

import prlhf
from prlhf.backbone.attention import as_hugging_face_has_it
from prlhf.evaluate import __main__ as evaluate
from prlhf.generate import __main__ as generate
from prlhf.generate.decode import Decoding, Request, check_decoding
from prlhf.generate.decode import generate as respond
from prlhf.method.plain import HERE, log_prob, reward, user_vectors
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
PROMPT_END, RESPONSE_END = "user_model.place=prompt_end", "user_model.place=response_end"
CHAT = [{"role": "user", "content": "Tell me about rain."}]
RUNS = {
    "prompt_end": (PROMPT_END, "lora.rank=2"),
    "response_end": (RESPONSE_END, "method=prm", "lora.rank=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of two finished runs on chats, by place."""
    folder = tmp_path_factory.mktemp("runs")
    small = ("model.width=32", "model.heads=2", "optim.max_steps=3", "data.limit=16", "data.valid_limit=8",
             "evaluate.bootstrap=100", "data.template=chat", "user_model.lr=0.1")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(folder / "cache"))
        for name, keys in RUNS.items():
            patch.setattr(
                sys, "argv", ["train.py", "--config", "tiny", "--set", *small, *keys, f"run_dir={folder / name}"]
            )
            train.main()
    return {name: folder / name for name in RUNS}


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_chats_answers_are_scored_with_users_at_the_end_of_their_message(runs):
    """Text in: log pi(y | x, u) by Hugging Face's forward pass over a sequence written by hand, for two users."""
    model = prlhf.load(runs["prompt_end"])
    x = [*ids("user: Tell me about rain."), HERE, *ids("\nassistant:")]
    found = model.score([CHAT] * 2, ["It is wet."] * 2, users=["alice", None])
    with torch.no_grad(), as_hugging_face_has_it(backbone := model.loaded.model.backbone):
        for number, log_p in zip((model.loaded.number("alice"), 0), found):
            e_UD = user_vectors(model.loaded.model.user_model, number)
            assert log_p == pytest.approx(log_prob(backbone, x, [*ids("It is wet."), 2], [], e_UD).item(), abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


def test_rewards_read_the_user_behind_the_response(runs, call, tmp_path):
    """Text in, and a file through generate.py --score: v . h of the last vector behind a sequence written by hand."""
    model = prlhf.load(runs["response_end"])
    x, y = ids("user: Tell me about rain.\nassistant:"), [*ids("It is wet."), 2, HERE]
    found = model.score([CHAT] * 2, ["It is wet."] * 2, users=["alice", None])
    with torch.no_grad(), as_hugging_face_has_it(backbone := model.loaded.model.backbone):
        for number, r in zip((model.loaded.number("alice"), 0), found):
            e_UD = user_vectors(model.loaded.model.user_model, number)
            assert r == pytest.approx(
                reward(backbone, x, y, [], e_UD, model.loaded.model.value_head.weight[0]).item(), abs=1e-5
            )
    file, out = tmp_path / "responses.jsonl", tmp_path / "rewards.jsonl"
    lines = [{"prompt": CHAT, "response": "It is wet.", "user": user} for user in ("alice", None)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call(generate.main, "--checkpoint", runs["response_end"], "--score", file, "--out", out)[0] == 0
    written = [json.loads(line)["reward"] for line in out.read_text().splitlines()]
    assert written == pytest.approx(found, abs=1e-5) and abs(found[0] - found[1]) > 1e-4


def test_both_are_evaluated_and_keep_their_place(runs, call, tmp_path):
    for name, run in runs.items():
        assert call(evaluate.main, "--checkpoint", run, "--out", tmp_path / name)[0] == 0
        status, _, said = call(evaluate.main, "--checkpoint", run, "--set", "user_model.place=before_prompt")
        assert status == 2 and f"user_model.place: '{name}' -> 'before_prompt'" in said


@pytest.mark.parametrize("key", ["model.share_trees=true", "model.share_trees=false", "model.layout=rows"])
def test_generate_py_answers_a_chat_with_users_at_the_end_of_their_message(runs, call, tmp_path, key):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    prompts.write_text(json.dumps({"prompt": CHAT}) + "\n")
    command = ("--checkpoint", runs["prompt_end"], "--prompts", prompts, "--users", "alice,generic", "--out", out)
    assert call(generate.main, *command, "--max-new-tokens", 5, "--set", key)[0] == 0
    model = prlhf.load(runs["prompt_end"])
    x = [*ids("user: Tell me about rain."), HERE, *ids("\nassistant:")]
    for line, number in zip(map(json.loads, out.read_text().splitlines()), (model.loaded.number("alice"), 0)):
        e_UD = user_vectors(model.loaded.model.user_model, number)
        assert line["response"] == TOKENIZER.decode(
            greedy(model.loaded.model.backbone, x, e_UD, 5), skip_special_tokens=True
        )


@torch.no_grad()
def greedy(backbone, x, e_UD, count, ends=(2,)):
    """The most likely tokens one after the other, the whole sequence anew for each."""
    found = []
    for _ in range(count):
        tokens = [t for t in [*x, *found] if t != HERE]
        read_TD, at = backbone.get_input_embeddings()(torch.tensor(tokens)), x.index(HERE)
        logits = backbone(inputs_embeds=torch.cat([read_TD[:at], e_UD, read_TD[at:]])[None]).logits[0, -1]
        if (token := int(logits.argmax())) in ends:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_generation_reads_users_behind_the_prompt(family, layout):
    """Rows of unequal lengths, tails and users in one batch: the tokens of whole sequences, without cache or padding. Then users
    alone, before prompts that are all tail."""
    model = tiny_model(tiny_config(PROMPT_END, f"model.layout={layout}", family=family), noise=0.1).float().eval()
    check_decoding(model)
    requests = [
        Request([1, *ids(text)], user, f"{text} {user}", tail)
        for text, tail in (("a", 0), ("tell me about rain\n", 3), ("why?", 1))
        for user in (0, 2)
    ]
    all_tail = [Request(ids(text), user, text, len(text)) for text in ("hm", "yes") for user in (0, 2)]
    decoding = Decoding(max_new_tokens=6)
    answered = [*respond(model, requests, {2}, decoding), *respond(model, all_tail, {2}, decoding)]
    for request, response in zip([*requests, *all_tail], answered):
        cut = len(request.ids) - request.tail
        x = [*request.ids[:cut], HERE, *request.ids[cut:]]
        e_UD = user_vectors(model.user_model, request.user).detach()
        assert response.ids == greedy(model.backbone, x, e_UD, 6)
