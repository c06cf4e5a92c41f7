import json

import pytest
import torch
from helpers import plain_backbone, random_comparisons, tiny_config, tiny_model
from safetensors.torch import load_file

from prlhf.backbone.families import lora_targets
from prlhf.backbone.lora import LoRALinear, adapters_merged, adapters_off, add_lora, load_lora, lora_layers, save_lora
from prlhf.errors import UserError


def adapted(family="llama", *overrides):
    config = tiny_config("lora.rank=3", "lora.alpha=6", *overrides, family=family)
    return config, tiny_model(config, noise=0.05)


def test_a_layer_is_w_x_plus_scaled_b_a_x():
    config = tiny_config("lora.rank=2", "lora.alpha=8").lora
    base = torch.nn.Linear(5, 4).double()
    layer = LoRALinear(base, config)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.stack([base.weight @ v + base.bias + 4.0 * (layer.lora_B @ (layer.lora_A @ v)) for v in x])
    assert torch.allclose(layer(x), expected, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_merging_the_adapters_gives_the_same_model(family):
    _, model = adapted(family)
    merged = plain_backbone(tiny_config(family=family))
    with torch.no_grad():
        for path, layer in lora_layers(model.backbone).items():
            merged.get_submodule(path).weight += 2.0 * layer.lora_B @ layer.lora_A
    ids = torch.randint(3, 200, (2, 9))
    assert torch.allclose(model.backbone(ids).logits, merged(ids).logits, atol=1e-10)


def test_merged_within_the_context_alone_and_never_in_a_half_type():
    """One product with W + 4 B A, by hand; the base's own within `adapters_off`; in bfloat16 the two products of before."""
    layer = LoRALinear(torch.nn.Linear(5, 4).double(), tiny_config("lora.rank=2", "lora.alpha=8").lora).eval()
    with torch.no_grad():
        layer.lora_B.normal_()
        x, apart = torch.randn(3, 5, dtype=torch.float64), layer.base.weight + 4.0 * layer.lora_B @ layer.lora_A
        with adapters_merged(layer):
            assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.merged, layer.base.bias))
            assert torch.allclose(layer.merged, apart, atol=1e-14)
            with adapters_off(layer):
                assert torch.equal(layer(x), layer.base(x))
        assert layer.merged is None
        layer.base.bfloat16()
        expected = layer(x.bfloat16())
        with adapters_merged(layer):
            assert layer.merged is None and torch.equal(layer(x.bfloat16()), expected)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_adapters_off_is_the_base_model_and_all_block_layers_are_adapted(family):
    _, model = adapted(family)
    plain = plain_backbone(tiny_config(family=family))
    ids = torch.randint(3, 200, (2, 9))
    expected = plain(ids).logits
    assert not torch.allclose(model.backbone(ids).logits, expected, atol=1e-3)
    with adapters_off(model.backbone):
        assert torch.allclose(model.backbone(ids).logits, expected, atol=1e-12)
    linear = [p for p, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"]
    assert sorted(lora_layers(model.backbone)) == sorted(linear)


def test_the_reference_is_the_base_without_dropout_or_gradient_and_training_mode_comes_back():
    _, model = adapted("llama", "lora.dropout=0.5")
    model.train()
    comparisons = random_comparisons(3)
    batch = model.collate(comparisons, None)
    with model.as_reference():
        one, two = model(batch), model(batch)
    assert torch.equal(one.chosen, two.chosen) and not one.chosen.requires_grad
    assert model.training and model(model.collate(comparisons, [0, 1, 2])).chosen.requires_grad


def test_only_adapters_and_user_model_train():
    _, model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n or n.startswith("user_model.")}


def test_files_have_pefts_names_and_come_back(tmp_path):
    config, model = adapted()
    save_lora(model.backbone, config.lora, "some/base", tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in state
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["peft_type"]) == (3, 6.0, "LORA")
    other = tiny_model(config)
    load_lora(other.backbone, tmp_path)
    ids = torch.randint(3, 200, (1, 7))
    assert torch.equal(other.backbone(ids).logits, model.backbone(ids).logits)


def test_a_target_that_does_not_exist_is_named():
    config = tiny_config("lora.rank=2")
    with pytest.raises(UserError, match=r"no linear layer 'q_porj'.*did you mean 'q_proj'"):
        add_lora(plain_backbone(config), config.lora, ("q_porj",), 0)


def test_the_head_takes_no_adapter():
    """Log-probs multiply by its matrix; an adapter around it would be passed by, or be an AttributeError."""
    config = tiny_config("lora.rank=2")
    with pytest.raises(
        UserError, match=r"no linear layer 'lm_head' .* takes an adapter.*\(not the head, which takes none\)"
    ):
        add_lora(plain_backbone(config), config.lora, ("q_proj", "lm_head"), 0)


def test_named_targets_alone_are_adapted():
    backbone = plain_backbone(tiny_config())
    config = tiny_config("lora.rank=2", "lora.targets=[q_proj, v_proj]").lora
    paths = add_lora(backbone, config, lora_targets(backbone, config.targets), 0)
    assert {p.rsplit(".", 1)[1] for p in paths} == {"q_proj", "v_proj"} and len(paths) == 4


def test_a_half_type_layer_is_near_float64_and_its_gradients_are_in_float32():
    """y = W x + b + 4 B A x with rows, W and both products in bfloat16: each rounded to 2^-8 of its size at most."""
    torch.manual_seed(0)
    config = tiny_config("lora.rank=2", "lora.alpha=8").lora
    base = torch.nn.Linear(64, 48)
    layer = LoRALinear(base.to(torch.bfloat16), config)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(10, 64).to(torch.bfloat16)
    upstream = torch.randn(10, 48).to(torch.bfloat16)
    y = layer(x)
    y.backward(upstream)
    A, B, X, G = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, x, upstream))
    exact = X @ base.weight.double().T + base.bias.double() + 4 * (X @ A.T) @ B.T
    exact.backward(G.detach())
    assert y.dtype == torch.bfloat16 and (y.double() - exact).norm() < 2**-7 * exact.norm()
    for found, right in ((layer.lora_A, A), (layer.lora_B, B)):
        assert found.grad.dtype == torch.float32
        assert (found.grad.double() - right.grad).norm() < 2**-6 * right.grad.norm()
