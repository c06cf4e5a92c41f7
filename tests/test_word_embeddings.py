"""User vectors start as the model's own word embeddings, whatever its input embedding does to the weight."""

import math

import pytest
import torch
from helpers import random_comparisons, tiny_config
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    XGLMConfig,
)

from prlhf.backbone.loading import empty_backbone
from prlhf.backbone.toys import byte_tokenizer
from prlhf.config.load import load_config
from prlhf.forecast.allocations import Allocations, give_fake_storage
from prlhf.method.build import build_model
from prlhf.parallel.ranks import process_group
from prlhf.parallel.shard import training_model
from prlhf.parallel.tensors import full
from prlhf.solve.run import set_prior

TOKENIZER = byte_tokenizer()
D = 16
SHAPE = {"vocab_size": len(TOKENIZER), "hidden_size": D, "num_hidden_layers": 1, "intermediate_size": 24}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {  # what the input embedding multiplies its weight by
    "gemma3_text": (Gemma3TextConfig(**SHAPE, **HEADS), math.sqrt(D)),
    "gemma2": (Gemma2Config(**SHAPE, **HEADS), math.sqrt(D)),
    "gemma": (GemmaConfig(**SHAPE, **HEADS), math.sqrt(D)),
    "xglm": (XGLMConfig(vocab_size=len(TOKENIZER), d_model=D, num_layers=1, attention_heads=2, ffn_dim=24), math.sqrt(D)),
    # Granite's model multiplies what it is given, words or user vectors, so these are its weight's rows.
    "granite": (GraniteConfig(**SHAPE, num_attention_heads=2, num_key_value_heads=1, embedding_multiplier=12.0), 1),
    "llama": (LlamaConfig(**SHAPE, **HEADS), 1),
    "gptj": (GPTJConfig(vocab_size=len(TOKENIZER), n_embd=D, n_layer=1, n_head=2, rotary_dim=4), 1),
}  # fmt: skip
EACH_USER = ("user_model.kind=individual", "user_model.shared=false", "user_model.tokens=3")


def backbone_of(name, dtype=torch.float32):
    """A random model of the family, every row of whose embeddings is another."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(FAMILIES[name][0]).to(dtype).eval()


def words_of(backbone):
    """Every word's embedding as the model's own forward pass makes it from ids: what its embedding module hands on."""
    seen = []
    hook = backbone.get_input_embeddings().register_forward_hook(lambda module, ids, output: seen.append(output[0]))
    with torch.no_grad():
        backbone(torch.arange(len(TOKENIZER))[None])
    hook.remove()
    return seen[0]


def rows(values):
    return {tuple(row) for row in values.flatten(0, -2).tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_user_vectors_start_as_words_of_the_model(name, dtype):
    """Each is a row of what the embedding puts out; rows of the weight times sqrt(D), by the families' papers, are too."""
    backbone = backbone_of(name, dtype)
    model = build_model(tiny_config(*EACH_USER), TOKENIZER, 2, backbone)
    found = model.user_model.offsets_MUD.detach()
    assert found.dtype == torch.float32 and rows(found) <= rows(words_of(backbone).float())
    weight, factor = backbone.get_input_embeddings().weight.detach().float(), FAMILIES[name][1]
    near = (found.flatten(0, 1)[:, None] - factor * weight).abs().amax(dim=-1).min(dim=-1).values
    assert near.max() < (1e-6 if dtype == torch.float32 else 2**-8) * factor * weight.abs().max()


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_where_nothing_is_scaled_the_values_are_as_ever(name):
    """Rows of the weight at the numbers that the seed draws, and noise of the weight's standard deviation."""
    backbone = backbone_of(name)
    weight = backbone.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(weight), (3, 1), generator=generator).squeeze(-1)
    uniform = ("user_model.kind=uniform", "user_model.tokens=3")
    model = build_model(tiny_config(*uniform, "seed=0"), TOKENIZER, 0, backbone)
    assert torch.equal(model.user_model.e_UD, weight[drawn])
    model = build_model(tiny_config(*uniform, "seed=0", "user_model.init=random"), TOKENIZER, 0, backbone)
    assert torch.equal(model.user_model.e_UD, torch.randn(3, D, generator=generator.manual_seed(0)) * weight.std())


@pytest.mark.parametrize("name", ["gemma3_text", "xglm", "granite"])
def test_noise_and_prior_are_in_units_of_the_words(name):
    """Noise, and the prior's scale, take the standard deviation of what the embedding puts out."""
    backbone = backbone_of(name)
    spread = words_of(backbone).double().std().item()
    config = tiny_config("user_model.init=random", "user_model.kind=uniform", "user_model.tokens=2000")
    found = build_model(config, TOKENIZER, 0, backbone).user_model.e_UD
    assert found.std().item() == pytest.approx(spread, rel=0.02)  # 32,000 draws: to within 4 / sqrt(64000)
    config = tiny_config("user_model.prior=1")
    model = build_model(config, TOKENIZER, 4, backbone)
    set_prior(config, model, random_comparisons(3), "")
    assert model.prior.scale_W.item() == pytest.approx(1 / spread, rel=1e-5)


def test_a_linear_reward_head_starts_from_rows_of_the_weight():
    """r = e_u . h: a tied LM head multiplies hidden states by rows of the weight, which Gemma's does not scale."""
    backbone = backbone_of("gemma3_text")
    head = ("method=prm", "user_model.aggregator=linear", "user_model.kind=uniform", "user_model.tokens=1")
    e_UD = build_model(tiny_config(*head), TOKENIZER, 0, backbone).user_model.e_UD.detach()
    word = next(i for i, row in enumerate(backbone.get_input_embeddings().weight) if torch.equal(row, e_UD[0]))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        h, logits = backbone.model(ids).last_hidden_state, backbone(ids).logits
    assert torch.allclose(h @ e_UD[0], logits[..., word], atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_a_sharded_model_starts_from_the_same_words(name, stored, tmp_path):
    """It reads the weight alone from the file, in the file's type, and makes words of it as the model's embedding does."""
    backbone = backbone_of(name, stored)
    backbone.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    keys = (*EACH_USER, f"model.name={tmp_path}")
    expected = training_model(load_config(None, keys), TOKENIZER, 2, "cpu").user_model.offsets_MUD
    config = load_config(None, [*keys, "model.compute_dtype=bfloat16"])
    with process_group(config, "cpu"):
        found = full(training_model(config, TOKENIZER, 2, "cpu").user_model.offsets_MUD.detach())
    assert torch.equal(found, expected)
    assert rows(found) <= rows(words_of(backbone.float()))


def test_the_dry_run_builds_a_model_that_scales(tmp_path):
    backbone_of("gemma3_text").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = load_config(None, [*EACH_USER, f"model.name={tmp_path}"])
    backbone = empty_backbone(config.model, TOKENIZER)
    with Allocations().fake():
        give_fake_storage(backbone)
        assert build_model(config, TOKENIZER, 2, backbone).user_model.offsets_MUD.shape == (2, 3, D)
