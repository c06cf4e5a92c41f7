"""What is done to a backbone's blocks before training leaves its function as it is."""

import pytest
import torch
from helpers import assert_same, gradients, random_comparisons, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    FalconH1Config,
    GPTJConfig,
    GPTNeoXJapaneseConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP

from prlhf.backbone.attention import use_tree_attention
from prlhf.backbone.families import blocks
from prlhf.backbone.recompute import keep_less, prepare_blocks
from prlhf.errors import UserError

SMALL = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {kind.model_type: kind for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)}
BACKBONES = {
    **{name: kind(**SMALL, num_key_value_heads=1, head_dim=16) for name, kind in LLAMA_LIKE.items()},
    "llama, biases, gelu": LlamaConfig(**SMALL, mlp_bias=True, hidden_act="gelu"),
    "gptj": GPTJConfig(vocab_size=20, n_embd=32, n_layer=2, n_head=2, rotary_dim=4),
}


def replaced(model):
    """The kinds of modules whose forward is not their class's."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def results(model):
    """The logits of a batch, and every gradient of their sum of squares."""
    model.zero_grad()
    logits = model(torch.arange(14).view(2, 7)).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", BACKBONES)
def test_blocks_that_keep_less_compute_what_hugging_faces_do(name):
    """Logits bit for bit, gradients too but for the order of sums; `none` leaves every forward as it is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BACKBONES[name], attn_implementation="eager").double().eval()
    logits, expected = results(model)
    prepare_blocks(model, tiny_config("model.recompute=none").model, 0)
    assert not replaced(model)
    prepare_blocks(model, tiny_config().model, 0)
    kind = {"GPTJMLP"} if name == "gptj" else {"RMSNorm", "MLP"}
    assert {next(end for end in kind if found.endswith(end)) for found in replaced(model)} == kind
    found_logits, found = results(model)
    assert torch.equal(found_logits, logits)
    assert_same(found, expected, 1e-12)


def test_an_mlp_with_more_parts_stays_as_it_is():
    """BitNet's MLP has the names of Llama's parts, and a norm before the last product; Falcon-H1's has factors."""
    torch.manual_seed(0)
    config = BitNetConfig(**SMALL, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = model(torch.arange(14).view(2, 7)).logits
    prepare_blocks(use_tree_attention(model), tiny_config().model, 0)
    assert torch.equal(model(torch.arange(14).view(2, 7)).logits, expected)
    mlp = FalconH1MLP(FalconH1Config(hidden_size=32, intermediate_size=48))
    keep_less(mlp)
    assert not replaced(mlp)


def test_blocks_that_transformers_cannot_compute_again_are_refused():
    model = AutoModelForCausalLM.from_config(GPTNeoXJapaneseConfig(**SMALL))
    with pytest.raises(
        UserError, match="found 'every:2', but the blocks of a gpt_neox_japanese model.*expected 'cheap'"
    ):
        prepare_blocks(model, tiny_config("model.recompute=every:2").model, 0)
    prepare_blocks(model, tiny_config().model, 0)


@pytest.mark.parametrize("family, recompute", [("llama", "blocks"), ("gptj", "cheap")])
def test_compiled_blocks_compute_the_same(family, recompute, monkeypatch):
    """torch.compile's graphs, run as they were captured (aot_eager: no compiler is needed), forward and backward, for
    batches of two sizes."""
    compiled = []

    def captured(block, **options):
        compiled.append(block)
        return compile_block(block, backend="aot_eager", **options)

    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", captured)
    torch._dynamo.reset()
    results = []
    for compile_too in ("false", "true"):
        keys = (f"model.compile={compile_too}", f"model.recompute={recompute}", "model.layers=1")
        model = tiny_model(tiny_config(*keys, family=family), noise=0.05).train()
        losses = []
        for count in (2, 5):
            comparisons = random_comparisons(count)
            outputs = model(model.collate(comparisons, [c.user for c in comparisons]))
            loss = (outputs.chosen - outputs.rejected).square().mean()
            loss.backward()
            losses.append(loss.item())
        results.append((losses, gradients(model)))
    assert compiled == blocks(model.backbone)
    (losses, expected), (of_compiled, found) = results
    assert of_compiled == pytest.approx(losses, rel=1e-12)
    assert_same(found, expected)
