"""Reward models that read the mean over a response's tokens, or the mean beside the last state, against plain passes."""

import pytest
import torch
from helpers import (
    ALPHA,
    LAYOUTS,
    assert_same,
    assert_updates_are_plain,
    gradients,
    plain_backbone,
    random_comparisons,
    tiny_config,
    tiny_model,
    votes,
)

from prlhf.batch.trees import Reading, lay_out
from prlhf.data.files import fingerprint_of
from prlhf.generate.rewards import rewards
from prlhf.method.plain import p_rm, pooled, reward, user_vectors
from prlhf.score.reference import weights_fingerprint
from prlhf.score.score import score
from prlhf.score.states import fixed_states, response_states
from prlhf.score.task import Task
from prlhf.train.step import accumulate_gradients

BASES = {
    "soft prompt": ("method=prm",),
    "linear head": ("method=prm", "user_model.aggregator=linear", "user_model.tokens=1", "user_model.rank=2"),
}
FROZEN = (*BASES["linear head"], "model.frozen=true")


def some_comparisons():
    return [*votes(1, 4, 0), *random_comparisons(4, seed=5, user_text=True)[1:]]


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pooling", ["mean", "both"])
def test_an_update_of_a_pooling_model_is_that_of_plain_sequences(pooling, base, family):
    """Rewards, loss and all gradients, in all layouts: r = v . h or e_u . h with h pooled over one sequence's states."""

    def value_vector(model):
        return None if model.value_head is None else model.value_head.weight[0]

    def read(model, backbone, c, e_UD):
        return [reward(backbone, c.prefix, y, [], e_UD, value_vector(model), pooling) for y in (c.chosen, c.rejected)]

    def loss_of(model, backbone, plain):
        return p_rm(backbone, model.user_model, plain, ALPHA, value_vector(model), pooling)

    keys = (*BASES[base], f"model.pooling={pooling}")
    assert_updates_are_plain(keys, family, some_comparisons(), read, loss_of)


@pytest.mark.parametrize("pooling", ["mean", "both"])
def test_known_states_of_a_frozen_backbone_are_pooled_likewise(pooling, tmp_path, monkeypatch):
    """From the cache, whose file another pooling does not share; rewards, gradients, and single responses' rewards."""
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path))
    comparisons = some_comparisons()
    readings = [Reading(c.user, tuple(c.prefix), tuple(y)) for c in comparisons for y in (c.chosen, c.rejected)]
    for files, kind in enumerate((pooling, "last"), start=1):
        config = tiny_config(*FROZEN, f"model.pooling={kind}")
        plain = plain_backbone(config)
        for computed in (1, 0):
            model, calls = tiny_model(config, noise=0.05), []
            model.backbone.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            states = fixed_states(model, comparisons, 64, weights_fingerprint(model.backbone))
            assert len(calls) == computed
            with torch.no_grad():
                expected = [
                    reward(plain, r.prefix, r.response, [], user_vectors(model.user_model, r.user), None, kind)
                    for r in readings
                ]
                found = model.rewards(readings)
            assert (found - torch.stack(expected)).abs().max() < 1e-10
            assert (rewards(model, readings, 3) - torch.stack(expected)).abs().max() < 1e-5
            calls.clear()
            scored = score(model, comparisons, [c.user for c in comparisons], 3, states=states)
            assert (
                torch.stack([scored.chosen, scored.rejected], 1).flatten() - torch.stack(expected)
            ).abs().max() < 1e-10
            assert not calls
        assert len(list((tmp_path / "states").iterdir())) == files

    thawed_config = tiny_config(*BASES["linear head"], f"model.pooling={pooling}")
    frozen_config = tiny_config(*FROZEN, f"model.pooling={pooling}")
    frozen, thawed = tiny_model(frozen_config), tiny_model(thawed_config)
    frozen.user_model.load_state_dict(thawed.user_model.state_dict())
    for config, model in ((frozen_config, frozen), (thawed_config, thawed)):
        accumulate_gradients(Task(config, model, comparisons), range(len(comparisons)))
    assert_same(gradients(frozen.user_model), gradients(thawed.user_model))


def test_the_cache_of_last_states_has_the_name_it_always_had(tmp_path, monkeypatch):
    """The fingerprint of weights, device and responses; what others add is their pooling."""
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path))
    comparisons = random_comparisons(2)
    responses = [(0, tuple(c.prefix), tuple(y)) for c in comparisons for y in (c.chosen, c.rejected)]
    assert len(set(responses)) == 4
    names = set()
    for pooling in ("last", "mean", "both"):
        model = tiny_model(tiny_config(*FROZEN, f"model.pooling={pooling}"))
        weights = weights_fingerprint(model.backbone)
        response_states(model, comparisons, 64, weights)
        (name,) = {file.stem for file in (tmp_path / "states").iterdir()} - names
        assert (name == fingerprint_of(weights, "cpu", responses)) == (pooling == "last")
        names.add(name)
    assert len(names) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", ["mean", "both"])
def test_half_types_are_averaged_in_float32(pooling, layout):
    """A mean that a half type cannot hold; the backbone's own states are what they are in bfloat16."""
    config = tiny_config(*FROZEN, f"model.pooling={pooling}", f"model.layout={layout}")
    model = tiny_model(config)
    model.backbone.bfloat16()
    (c,) = random_comparisons(1)
    readings = [Reading(0, tuple(c.prefix), tuple(y)) for y in (c.chosen, c.rejected)]
    with torch.no_grad():
        batch = lay_out(readings, model.layout)
        states = model.states_at(batch, batch.response_at_N)
        found = model.pooled_states(batch)
    assert states.dtype == torch.bfloat16 and found.dtype == torch.float32
    of_each = states.split([len(r.response) for r in readings])
    expected = torch.stack([pooled(part.double(), len(r.response), pooling) for part, r in zip(of_each, readings)])
    assert (found - expected).abs().max() < 1e-6
    assert not torch.equal(found.bfloat16().float(), found)
    assert model.states_of(readings).dtype == torch.float32
