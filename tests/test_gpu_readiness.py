"""What a CPU can say about a GPU: how often FlexAttention is compiled."""

import types

import pytest
import torch
from helpers import random_comparisons, tiny_config, tiny_model
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as hf_flex

from prlhf.backbone.attention import tree_block_mask
from prlhf.batch.trees import PACK_LEAST
from prlhf.method.models import Computation
from prlhf.train.process import compile_attention


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch makes of FlexAttention, which runs them operation by operation, on a CPU too."""
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    compile_ = {"compile": lambda function: torch.compile(function, backend=backend)}
    monkeypatch.setattr(hf_flex, "torch", types.SimpleNamespace(**vars(torch) | compile_))
    monkeypatch.setattr(hf_flex.WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)  # refuses gradients on a CPU
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "recompute"), [("llama", "blocks"), ("gptj", "none")])
def test_flex_attention_is_compiled_for_any_length_before_the_first_row(family, recompute, graphs):
    """Else the first length has a graph of its own, whose backward pass adds in another order, and a resumed run sees
    another length first."""
    model = tiny_model(
        tiny_config("model.layout=packed", "model.layers=1", f"model.recompute={recompute}", family=family)
    )
    model.compute = Computation(tree_block_mask)
    compile_attention(model)
    assert not any(p.grad is not None for p in model.parameters())
    before = len(graphs)
    assert before <= 3  # one length, any length; without gradients any length
    lengths = set()
    for count in (60, 2, 40):
        comparisons = random_comparisons(count)
        batch = model.collate(comparisons, [c.user for c in comparisons])
        lengths.add(batch.input_ids_RT.shape[1])
        model(batch).chosen.sum().backward()
        with torch.no_grad():
            model(batch)
            model(model.collate(comparisons, None))
    assert len(lengths) == 3 and min(lengths) == PACK_LEAST
    assert len(graphs) == before
