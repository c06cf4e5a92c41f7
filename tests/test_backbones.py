"""What is done to a backbone's blocks before training leaves its function as it is."""

import pytest
import torch
from helpers import assert_same, gradients, random_comparisons, tiny_config, tiny_model
from transformers import BitNetConfig, BitNetForCausalLM

from prlhf.backbone.attention import use_tree_attention
from prlhf.backbone.families import blocks
from prlhf.backbone.recompute import prepare_blocks


def test_an_mlp_of_another_kind_stays_as_it_is():
    """BitNet's MLP has the names of Llama's parts, and a norm before the last product."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = BitNetForCausalLM(BitNetConfig(vocab_size=20, hidden_size=32, intermediate_size=48, **small)).eval()
    ids = torch.randint(20, (2, 7))
    expected = model(ids).logits
    prepare_blocks(use_tree_attention(model), tiny_config().model, 0)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family, checkpointing", [("llama", "true"), ("gptj", "false")])
def test_compiled_blocks_compute_the_same(family, checkpointing, monkeypatch):
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
        keys = (f"model.compile={compile_too}", f"model.gradient_checkpointing={checkpointing}", "model.layers=1")
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
