"""What a CPU can say about a GPU: how often FlexAttention is compiled, and what is kept of it."""

import shutil
import types

import pytest
import torch
import torch._higher_order_ops.wrap as wrap
import torch._inductor.config as inductor
from helpers import random_comparisons, tiny_config, tiny_model
from torch.nn.attention import flex_attention as torch_flex
from transformers.integrations import flex_attention as hf_flex

from prlhf.backbone.attention import tree_block_mask
from prlhf.batch.trees import PACK_LEAST
from prlhf.method.models import Computation
from prlhf.train.process import compile_attention, reproducible


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_elementwise_recomputing_runs_compiled_attention_once(monkeypatch):
    """As FlexAttention is compiled on a GPU, attention is here: it is kept, and gradients are those without recomputing."""
    operator, key, ran = wrap.inductor_compiled_code, torch._C.DispatchKey.CompositeExplicitAutograd, []
    own = operator.py_kernels[key]

    def counted(*arguments, **options):
        ran.append(torch._C._current_graph_task_id() != -1)  # in the backward pass, where it would be computed again
        return own(*arguments, **options)

    monkeypatch.setitem(operator.py_kernels, key, counted)
    operator._dispatch_cache.clear()
    attention = torch.compile(
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", lambda q, k, v, **_: attention(q, k, v))
    monkeypatch.setattr(inductor, "wrap_inductor_compiled_regions", False)  # set back when the test ends
    gradients, comparisons = [], random_comparisons(3)
    for what in ("none", "elementwise"):
        torch._dynamo.reset()
        model = tiny_model(tiny_config("model.layout=packed", f"model.recompute={what}"))
        model.compute = Computation(tree_block_mask)
        model(model.collate(comparisons, [c.user for c in comparisons])).chosen.sum().backward()
        gradients.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    assert ran == [False] * 2  # of the elementwise model's two layers; a region that is not wrapped is no operation
    for without, again in zip(*gradients, strict=True):
        assert (without - again).abs().max() < 1e-12
    operator._dispatch_cache.clear()
    torch._dynamo.reset()


def test_deterministic_kernels_fill_no_empty_tensors(monkeypatch):
    """torch fills them by default: for GPT-J some 50 GB of writes a micro-batch."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        reproducible(tiny_config(), "cuda")
        assert torch.are_deterministic_algorithms_enabled()
        for _ in range(9):  # memory that was freed with ones in it, which a filled tensor would not show
            torch.ones(4096)
            assert not torch.empty(4096).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
