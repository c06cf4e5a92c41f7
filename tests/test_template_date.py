"""A run keeps the day on which it began: a chat template that asks for today's date is the same tomorrow."""

import datetime
import types
from pathlib import Path

import torch
import transformers.utils.chat_template_utils as hugging_face
from safetensors.torch import load_file

from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch import templates
from prlhf.batch.tokens import Encoder
from prlhf.generate import __main__ as generate
from prlhf.store import runs
from prlhf.store.final import load_final
from prlhf.train import __main__ as train
from prlhf.train import loop

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "model.width=32", "model.heads=2", "optim.epochs=1", "data.limit=12", "data.valid_limit=8", "optim.batch_size=4",
    "train.save_every=2", "train.eval_every=9", "lora.rank=2", "data.template=chat", "evaluate.bootstrap=100",
)  # fmt: skip
TEMPLATE = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"


def dated_tokenizer(*_):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def on_day(monkeypatch, day):
    """Set the clock, ours and that of Hugging Face's own strftime_now."""

    clock = types.SimpleNamespace(
        today=lambda: datetime.date.fromisoformat(day), fromisoformat=datetime.date.fromisoformat
    )

    class Now(datetime.datetime):
        @classmethod
        def now(cls):
            return datetime.datetime.fromisoformat(day)

    monkeypatch.setattr(hugging_face, "datetime", Now)
    monkeypatch.setattr(runs, "date", clock)
    monkeypatch.setattr(templates, "date", clock)


def test_a_run_with_todays_date_in_its_prompts_goes_on_tomorrow(monkeypatch, tmp_path, call):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "load_tokenizer", dated_tokenizer)
    run = tmp_path / "run"

    def command(run, *overrides):
        return "--config", "tiny.yaml", "--set", f"run_dir={run}", *SHORT, *overrides

    on_day(monkeypatch, "2026-01-31")
    assert call(train.main, *command(tmp_path / "whole"))[0] == 0
    save = loop.save_step

    def stop_after(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_step", stop_after)
        assert call(train.main, *command(run))[0] == 130
    on_day(monkeypatch, "2026-02-01")
    status, _, err = call(train.main, *command(run))
    assert status == 0 and "resuming after update 2" in err, err
    assert err.count("warning: the chat template puts no special token behind an answer") == 1
    for file in ("users.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(folder / "final" / file) for folder in (run, tmp_path / "whole"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    on_day(monkeypatch, "2026-02-02")
    assert "is finished" in call(train.main, *command(run))[1]
    other_day = call(train.main, *command(run, "data.template_date=2026-02-02"))
    assert other_day[0] == 2 and "data.template_date" in other_day[2]

    answers = ("--checkpoint", run, "--prompts", "examples/tiny/prompts.jsonl", "--users", "generic", "--limit", 2,
               "--max-new-tokens", 2, "--out", tmp_path / "r.jsonl")  # fmt: skip
    _, said, err = call(generate.main, *answers)
    assert "2 new responses" in said and err.count("puts no special token behind an answer") == 1
    on_day(monkeypatch, "2026-02-03")
    assert "0 new responses" in call(generate.main, *answers)[1]  # to the same prompt, token by token
    loaded = load_final(run)
    expected = loaded.tokenizer("31 Jan 2026: hi", add_special_tokens=False)["input_ids"]
    assert Encoder(loaded.tokenizer, loaded.config.data).read("hi", "f").ids == expected
    assert call(train.main, *command(run), "--overwrite")[0] == 0  # begins anew, today
    assert load_final(run).config.data.template_date == datetime.date(2026, 2, 3)
