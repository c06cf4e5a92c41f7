"""What a CPU can say about a GPU: kernels compile for it and fit, tensors are where they must be, little blocks.

What uses torch's internals is slow-marked. Helpers in tests/gpu/ run in processes of their own, since they change torch.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

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
from prlhf.train import __main__ as train
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


# torch.use_deterministic_algorithms: these raise, or have no deterministic kernel, on a GPU (torch 2.13).
NONDETERMINISTIC = re.compile(
    r"aten\.(put_?|histc|bincount|median|kthvalue|scatter_reduce|nll_loss|_?ctc_loss|_embedding_bag|grid_sampler|"
    r"reflection_pad|upsample|max_unpool|adaptive_|avg_pool3d)[.\w]*"
)
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="a device guard for autograd needs g++")
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
HALF = ("model.dtype=bfloat16", "lora.rank=4")
AFTER_THE_LAST = ("train/row_adamw.py", "parallel/tensors.py")  # once an update: the moved rows, and the norm
SMALL = (
    "train.log_every=1", "train.save_every=1", "data.limit=12", "data.valid_limit=4", "optim.batch_size=6", "optim.micro_batch_size=3",
    "model.width=32", "model.heads=2", "optim.max_steps=3",
)  # fmt: skip
CASES = {
    "llama": (),
    "gptj, clusters": ("model.family=gptj", "user_model.kind=cluster"),
    "LoRA, packed": (*HALF, "lora.dropout=0.1", "model.recompute=blocks"),
    "reward model, mean": ("method=prm", "model.pooling=mean"),
}


def helper(name, *arguments):
    """A helper's process, ended."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "gpu" / name
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def pretended(tmp_path, *arguments):
    """What a training, an evaluation and a generation on a pretended GPU did."""
    done = helper("pretended_run.py", tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@COMPILER
@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("capability, shared", [(80, 163 * 1024), (90, 227 * 1024)])
def test_kernels_compile_and_fit_without_spills(capability, shared):
    done = helper("compiled_kernels.py", capability)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in found} == {"_fused_values", "_softmax_step", "_logits_gradient"}
    assert all(kernel["shared"] <= shared and kernel["STACK"] == 0 for kernel in found), found


@COMPILER
@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("capability, shared", [(80, 163 * 1024), (90, 227 * 1024)])
def test_flex_attention_fits_the_shared_memory(capability, shared, width):
    """Of an A100 and an H100: forward and backward. What spills, a thread's stack, is under a kilobyte."""
    done = helper("flex_kernels.py", capability, width)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [kernel["kernel"] for kernel in found] == ["forward", "backward"]
    assert all(kernel["width"] == width and kernel["shared"] <= shared for kernel in found), found
    assert all(kernel["STACK"] < 1024 for kernel in found), found


@COMPILER
@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_training_on_a_pretended_gpu_is_the_cpus(name, tmp_path, call, monkeypatch):
    """Losses equal the CPU's. No operator is nondeterministic. A micro-batch's copies block nobody, and are two at most."""
    found = pretended(tmp_path, *CASES[name])
    assert not [op for op in found["ops"] if NONDETERMINISTIC.match(op)]
    of_batches = [place for place in found["blocking"] if place.split(":")[0] not in AFTER_THE_LAST]
    assert not of_batches, found["blocking"]
    micro_batches = 4  # at most: twelve rows of two branches, three trees each
    assert 0 < sum(found["flowing"].values()) <= 2 * micro_batches
    keys = ("device=cpu", f"run_dir={tmp_path / 'cpu'}", *SMALL, *CASES[name])
    monkeypatch.chdir(Path(__file__).parent.parent)
    status, _, error = call(train.main, "--config", "configs/tiny.yaml", "--set", *keys)
    assert status == 0, error
    rows = [json.loads(line) for line in (tmp_path / "cpu/metrics.jsonl").read_text().splitlines()]
    tolerance = 2e-2 if HALF[0] in CASES[name] else 1e-4
    assert found["losses"] == pytest.approx([row["loss"] for row in rows], rel=tolerance)


@COMPILER
@TRITON
@pytest.mark.slow
def test_a_resumed_training_on_a_pretended_gpu_is_the_same(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole, resumed = pretended(tmp_path / "a"), pretended(tmp_path / "b", "--stop-at=2")
    assert whole["losses"] == resumed["losses"]


@COMPILER
@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reference", "rows", "positions", "types", "mask"])
def test_a_planted_fault_is_seen(fault, tmp_path):
    done = helper("pretended_run.py", tmp_path / "run", f"--plant={fault}", *(HALF if fault == "types" else ()))
    assert done.returncode == 1
    assert re.search("same device|same dtype|expected.*(cuda|dtype)|host memory|AssertionError", done.stderr), (
        done.stderr
    )
