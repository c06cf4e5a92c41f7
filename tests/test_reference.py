import errno
import os

import pytest
import torch
from helpers import random_comparisons, tiny_config, tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prlhf.score import cache
from prlhf.score.reference import reference_log_probs, weights_fingerprint


@pytest.fixture
def counted(tmp_path):
    """Reference log-probs through a cache in tmp_path, and how often the model was asked for."""
    calls = []

    def compute(model, comparisons):
        def give():
            calls.append(1)
            return model

        weights = weights_fingerprint(model.backbone)
        found = reference_log_probs(give, comparisons, 4, weights, "cpu", tmp_path)
        return found, len(calls)

    return compute


def model_of(*overrides):
    return tiny_model(tiny_config(*overrides))


def test_the_cache_serves_what_it_holds_and_nothing_else(counted):
    comparisons = random_comparisons(5, user_text=True)
    first, calls = counted(model_of(), comparisons)
    again, calls_again = counted(model_of(), comparisons)
    assert calls == calls_again == 1 and torch.equal(first.chosen, again.chosen)

    others = {
        "weights": (model_of("seed=1"), comparisons),
        "a weight": (changed(model_of()), comparisons),
        "prefix": (model_of(), [comparisons[0]._replace(reference_prefix=[1, 5]), *comparisons[1:]]),
        "response": (model_of(), [comparisons[0]._replace(rejected=[9, 9]), *comparisons[1:]]),
        "order": (model_of(), comparisons[::-1]),
        "fewer": (model_of(), comparisons[:-1]),
    }
    for number, (name, (model, data)) in enumerate(others.items(), start=2):
        _, calls = counted(model, data)
        assert calls == number, name


def test_policy_side_changes_leave_the_cache_valid(counted):
    comparisons = random_comparisons(5, user_text=True)
    counted(model_of(), comparisons)
    moved = [c._replace(user=2, prefix=c.prefix + [7]) for c in comparisons]
    _, calls = counted(model_of("user_model.kind=cluster", "lora.rank=2"), moved)
    assert calls == 1


def changed(model):
    with torch.no_grad():
        model.backbone.get_output_embeddings().weight[-1, -1] += 1e-3
    return model


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other values", "empty"])
def test_a_damaged_cache_is_never_used(counted, tmp_path, damage):
    comparisons = random_comparisons(5)
    first, _ = counted(model_of(), comparisons)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-16])
    elif damage == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "other values":
        save_file({"values": load_file(path)["values"] + 1}, path)
    else:
        path.write_bytes(b"")
    again, calls = counted(model_of(), comparisons)
    assert calls == 2 and torch.equal(first.chosen, again.chosen)


def test_a_kill_while_writing_leaves_no_cache(counted, tmp_path, monkeypatch):
    def killed(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    comparisons = random_comparisons(5)
    monkeypatch.setattr(cache, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        counted(model_of(), comparisons)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("raised", [SafetensorError, OSError])
def test_a_full_disk_leaves_no_cache_and_the_training_goes_on(counted, tmp_path, monkeypatch, capsys, raised):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise raised(*[errno.ENOSPC, os.strerror(errno.ENOSPC)][raised is SafetensorError :])

    comparisons = random_comparisons(5)
    whole, _ = counted(model_of(), comparisons)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    monkeypatch.setattr(cache, "save_file", full)
    found, calls = counted(model_of(), comparisons)
    assert calls == 2 and torch.equal(found.chosen, whole.chosen)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    said = capsys.readouterr().err
    assert "cannot be written" in said and "No space left" in said
    assert counted(model_of(), comparisons)[1] == 3  # nothing was kept


def test_what_changes_the_function_and_not_the_weights_changes_the_fingerprint():
    """Two and four heads have the same weights and other log-probs."""
    prints = {weights_fingerprint(model_of(f"model.heads={heads}", "model.width=64").backbone) for heads in (2, 4)}
    assert len(prints) == 2


def test_the_fingerprint_is_the_same_with_adapters():
    assert weights_fingerprint(model_of().backbone) == weights_fingerprint(model_of("lora.rank=2").backbone)
