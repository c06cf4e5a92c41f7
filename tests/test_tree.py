"""The preference tree, the plain rows and one-sequence-at-a-time Hugging Face agree in loss and every gradient."""

import pytest
import torch
import transformers
from helpers import (
    TOKENIZER,
    VOCABULARY,
    assert_same,
    gradients,
    plain_backbone,
    plain_log_prob,
    random_comparisons,
    tiny_config,
    tiny_model,
)

from prlhf.backbones import random_backbone, use_sdpa
from prlhf.batching import CHOSEN, PAD, PREFIX, REJECTED, collate, tree_mask
from prlhf.losses import log_ratio_margin, sigmoid_loss
from prlhf.personalized import build_model


def loss_of(policy, reference):
    return sigmoid_loss(log_ratio_margin(policy, reference), 0.3).mean()


def layout_loss(model, comparisons, layout):
    users = torch.tensor([c.user for c in comparisons])
    reference_batch = collate(comparisons, layout, reference=True)
    with model.as_reference():
        reference = model(reference_batch, None)
    return loss_of(model(collate(comparisons, layout), users), reference)


def plain_loss(backbone, model, comparisons):
    """The loss from Hugging Face's model, one sequence at a time; e_u comes from the model's user model."""
    losses = []
    for c in comparisons:
        user_UD = model.user_model(torch.tensor([c.user]))[0]
        policy = [plain_log_prob(backbone, c.prefix, y, user_UD) for y in (c.chosen, c.rejected)]
        with torch.no_grad():
            reference = [plain_log_prob(backbone, c.reference_prefix, y, None) for y in (c.chosen, c.rejected)]
        h = (policy[0] - reference[0]) - (policy[1] - reference[1])
        losses.append(-torch.log(torch.sigmoid(0.3 * h)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("user_text", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tree_rows_and_plain_sequences_agree(family, user_text, checkpointing):
    config = tiny_config(f"model.gradient_checkpointing={checkpointing}", family=family)
    comparisons = random_comparisons(6, user_text=user_text)

    results = {}
    for layout in ("tree", "rows"):
        model = tiny_model(config).train()
        loss = layout_loss(model, comparisons, layout)
        loss.backward()
        results[layout] = (loss.item(), gradients(model))

    model, backbone = tiny_model(config), plain_backbone(config)
    loss = plain_loss(backbone, model, comparisons)
    loss.backward()
    expected = {f"backbone.{name}": g for name, g in gradients(backbone).items()} | gradients(model)

    for found_loss, found in results.values():
        assert found_loss == pytest.approx(loss.item(), abs=1e-10)
        assert_same(found, expected)
    assert all(g.abs().max() > 0 for g in expected.values())


def test_gptj_sdpa_equals_hugging_faces_attention():
    """In float32, the type Hugging Face's own GPT-J attention computes in."""
    config = tiny_config(family="gptj")
    ids = torch.randint(3, 200, (2, 11), generator=torch.Generator().manual_seed(0))
    theirs, ours = (random_backbone(config.model, VOCABULARY, 0) for _ in range(2))
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters()):
            p *= 5  # attention that is far from uniform
            q *= 5
        expected = theirs(ids).logits
        assert torch.allclose(use_sdpa(ours)(ids).logits, expected, atol=1e-5 * expected.abs().max().item())


def test_tree_mask_by_hand():
    segments = torch.tensor([[PREFIX, PREFIX, CHOSEN, REJECTED, PAD]])
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],  # the rejected response does not see the chosen one
        [0, 0, 0, 0, 1],  # padding sees itself alone
    ]
    assert tree_mask(segments)[0, 0].int().tolist() == expected


def test_a_tree_by_hand():
    (c,) = random_comparisons(1)
    c = c._replace(prefix=[1, 10, 11], chosen=[20, 21, 2], rejected=[30, 2])
    batch = collate([c])
    assert batch.input_ids_RT.tolist() == [[1, 10, 11, 20, 21, 2, 30, 2]]
    assert batch.positions_RT.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4]]
    assert batch.predicted_at_N.tolist() == [2, 3, 4, 2, 6]  # both first tokens are predicted at the prefix's end
    assert batch.targets_N.tolist() == [20, 21, 2, 30, 2]
    assert batch.response_N.tolist() == [0, 0, 0, 1, 1]


def test_changing_one_response_leaves_the_other_alone():
    model = tiny_model(tiny_config())
    first, second = random_comparisons(2)
    other = first._replace(chosen=second.chosen)
    users = torch.tensor([1])
    a, b = model(collate([first]), users), model(collate([other]), users)
    assert a.rejected.item() == pytest.approx(b.rejected.item(), abs=1e-12)
    assert a.chosen.item() != pytest.approx(b.chosen.item(), abs=1e-3)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_other_llama_like_families_take_the_tree(family):
    """In float32, as these models compute parts of themselves in it: tree against single sequences."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    config_class = getattr(transformers, f"{family}Config")
    model_config = config_class(vocab_size=VOCABULARY, num_key_value_heads=1, **shape)
    torch.manual_seed(0)
    backbone = getattr(transformers, f"{family}ForCausalLM")(model_config).eval()
    with torch.no_grad():
        for p in backbone.parameters():
            p *= 3  # attention that is far from uniform
    model = build_model(tiny_config(), TOKENIZER, 4, backbone)
    model.user_slot = 1
    comparisons = random_comparisons(4)
    found = model(collate(comparisons), torch.tensor([c.user for c in comparisons]))
    for b, c in enumerate(comparisons):
        vectors = model.user_model(torch.tensor([c.user]))[0]
        expected = plain_log_prob(backbone, c.prefix, c.rejected, vectors)
        assert found.rejected[b].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "linear"])
def test_bfloat16_weights_give_float32_log_probs_near_the_float32_models(family, aggregator):
    overrides = ("lora.rank=2", f"user_model.aggregator={aggregator}")
    models = []
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(*overrides, f"model.dtype={dtype}", family=family)
        models.append(build_model(config, TOKENIZER, 4))
        models[-1].user_slot = 1
    comparisons = random_comparisons(6)
    users = torch.tensor([c.user for c in comparisons])
    exact, rounded = (model(collate(comparisons), users) for model in models)
    assert rounded.chosen.dtype == torch.float32
    assert torch.allclose(exact.chosen, rounded.chosen, rtol=0.01, atol=0.05)
    rounded.chosen.sum().backward()
    for p in models[1].user_parameters():
        assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()
