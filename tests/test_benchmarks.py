"""The benchmarks run at toy size; packages that they compare with need not be installed."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_runs import trained_run
from tokenizers import processors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig

from prlhf.backbone.families import blocks
from prlhf.backbone.loading import load_weights
from prlhf.backbone.lora import lora_layers
from prlhf.backbone.toys import byte_tokenizer, random_backbone
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import ModelConfig
from prlhf.store.final import load_final

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
ONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other take longer than these sizes do


def run(script, *arguments):
    found = subprocess.run(
        [sys.executable, BENCHMARKS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ONE,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def saved_model(folder, family="llama", bos=False):
    """A tiny model with a tokenizer of bytes. bos: the tokenizer begins each text with BOS."""
    tokenizer = byte_tokenizer()
    if bos:
        begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = begin
    random_backbone(ModelConfig(family=family, width=32, heads=2), len(tokenizer), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return saved_model(tmp_path / "model")


@pytest.fixture
def step(monkeypatch):
    """The module benchmarks/step.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    return step


@pytest.fixture
def arms(monkeypatch):
    """The module benchmarks/arms.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import arms

    return arms


@pytest.fixture
def in_process(step, arms, monkeypatch):
    """Arms in this process: a function from a command line to its arguments, comparisons, and a maker of arms by label."""

    def prepare(*command):
        torch.set_num_threads(1)  # as ONE
        monkeypatch.setattr(sys, "argv", ["step.py", *map(str, command)])
        args = step.arguments(None)
        comparisons = step.comparisons_of(args)
        return args, comparisons, lambda label, given=comparisons: arms.made(label, args, given)

    return prepare


def test_step_prints_a_table_and_writes_json(model, tmp_path):
    out = tmp_path / "step.json"
    arms = ["prlhf", "prlhf pdpo", "prlhf pdpo prompt_end", "rows", "rows once"]
    options = ("--comparisons", 2, "--shape", "short", "--rounds", 2, "--trl-batch", 1)
    table = run("step.py", "--model", model, *options, "--out", out, "--arms", *arms, "trl")
    if find_spec("trl") is None:
        assert "trl, batch 1 is left out" in table
    else:
        arms.append("trl, batch 1")
    written = json.loads(out.read_text())
    assert [row["arm"] for row in written["rows"]] == arms
    assert "| prlhf pdpo | " in table and "matmul rate: " in table and "transformers " in table
    assert written["matmul_rate"] > 0 and written["dtype"] == "float32" and written["device"] in table
    assert written["versions"].keys() >= {"torch", "transformers", "trl", "peft", "liger-kernel"}
    rows = {row["arm"]: row for row in written["rows"]}
    assert [len(rows[arm]["margins"]) for arm in arms[:5]] == [2, 4, 4, 4, 4]
    # share times seconds is an arm's useful work: the same for both ways to compute P-DPO, less without a user
    work = {arm: rows[arm]["share_of_matmul_rate"] * statistics.median(written["seconds"][arm]) for arm in arms}
    assert [work["rows"], work["rows once"]] == pytest.approx([work["prlhf pdpo"]] * 2)
    assert 0 < work["prlhf"] < work["prlhf pdpo prompt_end"] < work["rows"]


ALIKE = [
    ("llama", False, ()),
    ("llama", True, ()),
    ("llama", True, ("--lora", 4)),
    ("llama", False, ("--lora", 4, "--dtype", "bfloat16")),
    ("gptj", False, ("--checkpointing", "--micro-batch", 2)),
]


@pytest.mark.parametrize("family, bos, options", ALIKE)
def test_arms_that_compute_the_same_pass(step, arms, in_process, tmp_path, family, bos, options):
    command = ("--model", saved_model(tmp_path / "model", family, bos), "--shape", "short", *options)
    args, _, made = in_process(*command)
    computed = {label: made(label).computed() for label in ("prlhf", "prlhf pdpo", "rows", "rows once")}
    step.check_equal(computed, arms.computing_type(args))
    assert max(map(abs, computed["prlhf pdpo"].margins)) > 0.02  # the losses are not log 2


@pytest.mark.parametrize("options", [(), ("--lora", 4)], ids=["full", "lora"])
def test_an_arm_that_computes_another_thing_is_refused(step, arms, in_process, tmp_path, options):
    """Exchanged users, user vectors before BOS, one layer's weights 1% larger: losses near log 2 would not show them."""
    command = ("--model", saved_model(tmp_path / "model", bos=True), "--shape", "short", *options)
    args, comparisons, made = in_process(*command)
    right = {"prlhf pdpo": made("prlhf pdpo").computed()}

    def refused(arm):
        with pytest.raises(SystemExit, match="the arms do not compute the same"):
            step.check_equal({**right, "rows": arm.computed()}, "float32")

    refused(made("rows", [c._replace(user=c.user % arms.USERS + 1) for c in comparisons]))
    slot, weight = made("rows"), made("rows")
    assert slot.model.user_slot == 1
    slot.model.user_slot = 0
    refused(slot)
    trained = (p for p in blocks(weight.model.backbone)[0].mlp.parameters() if p.requires_grad)
    with torch.no_grad():
        next(trained).mul_(1.01)
    refused(weight)
    not_a_number = right["prlhf pdpo"]._replace(loss=float("nan"))
    with pytest.raises(SystemExit, match="the arms do not compute the same"):
        step.check_equal({"prlhf pdpo": not_a_number}, "float32")


class AsInPEFT(nn.Module):
    """A linear layer with adapters under PEFT's names and with their own initial values."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs)
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})  # another order than ours
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})


def test_adapters_are_those_of_the_other_arms_whatever_they_were(arms, in_process, model):
    """PEFT draws A itself, in its own order; `moved` sets A and B by the layer's path alone."""
    _, _, made = in_process("--model", model, "--shape", "short", "--lora", 4)
    ours = lora_layers(made("prlhf").model.backbone)
    layers = nn.Module()
    for path in reversed(ours):  # base_model.model.model.layers.1.mlp.down_proj and so on
        *parents, name = f"base_model.model.{path}".split(".")
        parent = layers
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name, AsInPEFT(ours[path].base.in_features, ours[path].base.out_features, 4))
    layers.requires_grad_(True)
    arms.moved({name: p for name, p in layers.named_parameters() if "lora" in name})
    for path, layer in ours.items():
        other = layers.get_submodule(f"base_model.model.{path}")
        assert torch.equal(other.lora_A["default"].weight, layer.lora_A) and layer.lora_A.std() > 0
        assert torch.equal(other.lora_B["default"].weight, layer.lora_B) and layer.lora_B.std() > 0


@pytest.mark.skipif(find_spec("trl") is None or find_spec("peft") is None, reason="no TRL here")
@pytest.mark.parametrize("options", [(), ("--lora", 4)], ids=["full", "lora"])
def test_trl_computes_what_plain_dpo_does(step, in_process, model, options):
    args, comparisons, made = in_process("--model", model, "--shape", "short", *options)
    computed = {label: made(label).computed() for label in ("prlhf", "trl, batch 1", "trl, batch 2")}
    step.check_equal(computed, "float32")
    swapped = made("trl, batch 2", [c._replace(chosen=c.rejected, rejected=c.chosen) for c in comparisons])
    with pytest.raises(SystemExit, match="the arms do not compute the same"):
        step.check_equal({**computed, "trl, batch 2": swapped.computed()}, "float32")


def test_the_share_of_the_matmul_rate_is_useful_flops_over_what_the_time_allows(model, step):
    from shapes import useful_flops

    args = argparse.Namespace(model=str(model), lora=0)
    comparisons = [EncodedComparison([5] * 9, [5] * 9, [7] * 3, [8] * 4, 1)]
    flops = useful_flops(AutoConfig.from_pretrained(model), comparisons, 0, 1, lora=False)
    found = step.shares_of_rate(args, comparisons, {"prlhf": 2.0, "trl": 8.0}, rate=float(flops))
    assert found == {"prlhf": pytest.approx(1 / 2), "trl": pytest.approx(1 / 8)}


def test_a_random_model_of_a_real_shape_loads(tmp_path):
    """The real shape except for fewer layers; the vocabulary has its real size, of which the tokenizer uses the bytes."""
    monkeypatched = {"GPT-J 6B": {"n_embd": 16, "n_head": 2, "rotary_dim": 4}}
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); import shapes\n"
        f"shapes.MODELS['GPT-J 6B'].update({monkeypatched['GPT-J 6B']})\n"
        "sys.argv = ['random_model.py', 'GPT-J 6B', '--layers', '1', '--dtype', 'float32', '--out', sys.argv[2]]\n"
        f"runpy.run_path({str(BENCHMARKS / 'random_model.py')!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code, BENCHMARKS, tmp_path / "m"], check=True, capture_output=True)
    model = load_weights(tmp_path / "m", "float32")
    assert model.config.vocab_size == 50400 and model.config.n_layer == 1


def test_useful_flops_are_those_that_torch_counts_for_one_long_row(monkeypatch):
    """Without sharing (one response, no user vectors) a plain forward and backward pass has the same matrix products."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shapes import useful_flops

    backbone = random_backbone(ModelConfig(family="llama", width=32, heads=2), 300, 0)
    comparison = EncodedComparison([5] * 40, [5] * 40, [7] * 30, [], 1)
    with FlopCounterMode(display=False) as counter:
        hidden = backbone.base_model(torch.tensor([[5] * 40 + [7] * 30])).last_hidden_state
        backbone.get_output_embeddings()(hidden[:, 39:69]).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    # torch counts attention as if nothing were masked, and with the scores computed again in the backward pass
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    found = useful_flops(backbone.config, [comparison], 0, 1, lora=False)
    attention = 3 * 4 * 2 * 32 * (70 * 71 // 2)
    # of the first layer's input no gradient is needed but for the embeddings', which torch computes too
    assert found - attention == products


def test_breakdown_prints_a_table_and_writes_json(model, tmp_path):
    out = tmp_path / "breakdown.json"
    options = ("--comparisons", 1, "--shape", "short", "--arms", "prlhf pdpo", "rows", "--out", out)
    table = run("breakdown.py", "--model", model, *options)
    assert "| | prlhf pdpo | rows |" in table and "| matrix products | " in table
    arms = json.loads(out.read_text())["arms"]
    assert all(arm["kinds"]["matrix products"] > 0 and arm["kinds"]["attention"] > 0 for arm in arms.values())
    assert arms["rows"]["margins"] == pytest.approx(arms["prlhf pdpo"]["margins"], abs=1e-3)


OPERATIONS = {
    "aten::addmm": "matrix products",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_fused_adamw_": "optimiser and clipping",
    "aten::copy_": "copies and layout",
    "aten::mul": "elementwise, reductions, the rest",
    "aten::_log_softmax": "elementwise, reductions, the rest",
    # kernels
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas": "matrix products",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x4_tn_align8>(Params)": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, float>(...)": "matrix products",
    "_fused_values": "matrix products",
    "_softmax_step": "log-probs, beside their products",
    "_logits_gradient": "log-probs, beside their products",
    "triton_tem_fused_flex_attention_0": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>(Flash_fwd_params)": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128": "attention",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
    "FusedAdamMathFunctor<float, 4>>": "optimiser and clipping",
    "Memcpy DtoD (Device -> Device)": "copies and layout",
    "Memset (Device)": "copies and layout",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>": "copies and layout",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 3>": "copies and layout",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, 1>": "copies and layout",
    "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int)": "copies and layout",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, 3>": "elementwise, reductions, the rest",
    "triton_poi_fused_add_mul_silu_1": "elementwise, reductions, the rest",
}  # fmt: skip


def test_breakdown_knows_operations_and_kernels_by_their_names(step):
    from breakdown import kind

    assert {name: kind(name) for name in OPERATIONS} == OPERATIONS


def test_logprob_prints_a_table_and_writes_json(tmp_path):
    """Includes both designs of Triton, run by its interpreter if there is no GPU (conftest)."""
    out = tmp_path / "logprob.json"
    sizes = ("--positions", 70, "--width", 40, "--vocabulary", 300, "--rounds", 1)
    assert "| prlhf chunked | " in run("logprob.py", *sizes, "--dtype", "bfloat16", "--out", out)
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    designs = [f"prlhf triton{design}" for design in ("", ", fused", ", tiles")] if find_spec("triton") else []
    for name in ("prlhf chunked", *designs):  # the inputs' gradient is rounded to bfloat16
        assert rows[name]["error"] < 1e-6 and rows[name]["gradient_error"] < 4e-3
    assert rows["full logits"]["error"] > 1e-5


def test_logprob_refuses_another_function_and_another_gradient(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import logprob

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (5, 20))
    inputs = logprob.Inputs(hidden, weight, torch.arange(5), torch.randn(5, generator=generator))
    assert logprob.full_logits(hidden.double(), weight.double(), inputs.targets_N).dtype == torch.float64

    def half_gradient(h, w, t):
        log_p = logprob.full_logits(h, w, t)
        return (log_p + log_p.detach()) / 2

    with pytest.raises(SystemExit, match="prlhf half: .* not the same function"):
        logprob.checked({"prlhf half": half_gradient}, inputs)
    assert logprob.checked({"another": half_gradient}, inputs)["another"].gradient == pytest.approx(0.5)
    with pytest.raises(SystemExit, match="another: .* not the same function"):
        logprob.checked({"another": lambda h, w, t: 2 * logprob.full_logits(h, w, t)}, inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries the script where there is no GPU")
@pytest.mark.slow
def test_gpu_script_runs_without_one(tmp_path):
    """The part `full`, with a tiny model in place of GPT-J 6B."""
    saved_model(tmp_path / "out" / "models" / "gptj", "gptj")
    small = {"PYTHON": sys.executable, "COMPARISONS": "2", "ROUNDS": "1", "STEP": "--shape short"}
    found = subprocess.run(
        ["bash", BENCHMARKS / "gpu.sh", tmp_path / "out", "full"],
        capture_output=True, text=True, check=True, env={**ONE, **small},
    )  # fmt: skip
    assert "FAILED" not in found.stdout, found.stdout
    assert "'liger-kernel': " in found.stdout and "| prlhf pdpo | " in found.stdout
    assert (tmp_path / "out" / "full.json").is_file() and (tmp_path / "out" / "full-breakdown.json").is_file()


def test_sharing_counts_positions_and_padding(tmp_path, monkeypatch, call):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sharing

    options = ("--data", ROOT / "examples/tiny/train.jsonl", "--tokenizer", "bytes", "--known", 3, "--batch-size", 8)
    found = {}
    for micro_batch in (None, 1):
        cut = () if micro_batch is None else ("--micro-batch", micro_batch)
        out = tmp_path / f"{micro_batch}.json"
        status, table, _ = call(sharing.main, *options, *cut, "--out", out)
        assert status == 0 and "| P-RM, linear head | response | true | " in table
        rows = json.loads(out.read_text())["rows"]
        found[micro_batch] = {(row["model"], row["group_by"], row["share_trees"]): row for row in rows}
    for key, row in found[None].items():
        alone = found[1][key]  # a tree a row and a row a pass: nothing to pad, nothing to share between passes
        assert alone["padding"] == 0 < row["padding"] and alone["positions"] >= row["positions"]
        assert row["of_none"] <= 1


def test_memory_prints_a_table_and_writes_json(tmp_path, monkeypatch, call):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import memory

    tiny = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    monkeypatch.setattr(memory, "MODELS", {"tiny": tiny})
    out = tmp_path / "memory.json"
    status, table, _ = call(memory.main, "--processes", 1, 2, "--comparisons", 2, "--micro-batch", 1, "--out", out)
    assert status == 0 and "| tiny, LoRA | 2 | " in table
    rows = json.loads(out.read_text())
    assert [(row["mode"], row["gpus"]) for row in rows] == [("full", 1), ("full", 2), ("LoRA", 1), ("LoRA", 2)]
    assert rows[1]["weights"] < rows[0]["weights"]


def test_users_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "users.json"
    small = ("--users", 3, 50, "--width", 32, "--comparisons", 2, "--gap", 4, "--rounds", 2, "--reads", 3)
    table = run("users.py", *small, "--new-tokens", 2, "--out", out)
    assert "| individual | 3 | " in table and "| cluster | 50 | " in table
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["users"]) for row in rows] == [
        (kind, m) for kind in ("individual", "cluster") for m in (3, 50)
    ]
    assert rows[0]["over_smallest"] == 1 and rows[1]["late_user"] == 49


def test_adapt_prints_time_and_memory(tmp_path, monkeypatch, call):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(ROOT)
    import adapt

    run = trained_run(tmp_path / "run", "low rank")
    for name, value in {"NEW": 3, "COMPARISONS": 4, "KNOWN": (50,)}.items():
        monkeypatch.setattr(adapt, name, value)
    out = tmp_path / "out"
    status, said, err = call(
        adapt.main, "--checkpoint", run, "--data", ROOT / "examples/tiny/valid.jsonl", "--out", out
    )
    assert status == 0 and "\n50 known users more: " in said and "GiB at most" in said, err
    found = load_final(out / "adapted50")
    known = len(load_final(run).users)
    assert len(found.users) == known + 53 and found.users.names[-3:] == ("new0", "new1", "new2")
    z_MK = found.model.user_model.z_MK
    assert torch.equal(z_MK[known : known + 50], z_MK[[n % known for n in range(50)]]) and z_MK[-3:].all()


@pytest.mark.slow
def test_a_step_with_a_million_users_costs_what_one_with_ten_costs(tmp_path):
    """At most 1.2 times, without the growing table; and the 987,654th user is answered as quickly as the first."""
    out = tmp_path / "users.json"
    run("users.py", "--users", 10, 1_000_000, "--out", out)
    for row in json.loads(out.read_text())["rows"]:
        assert row["over_smallest"] <= 1.2 and row["answer_late_over_first"] <= 1.2, row
        assert row["extra_mb"] < 40, row  # a table of width 64 with its moments has 768 or more


def test_positions_of_both_branches_by_hand(monkeypatch):
    """A prompt of 5, one of them its tail, responses of 2 and 3, ten vectors: 2 (10 + 5 + 5) before the prompt, 4 + 2 (10 + 1 + 5)
    behind it; an unknown user has one branch."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shapes import positions

    c = EncodedComparison([5] * 5, [5] * 5, [7] * 2, [8] * 3, 1, tail=1)
    assert positions([c]) == 40 and positions([c, c._replace(user=0, prefix=[6] * 5)]) == (40 + 20) / 2
    assert positions([c], "user_model.place=prompt_end") == 36


def test_useful_flops_with_a_shared_prompt_are_those_of_one_branch_and_what_another_adds(monkeypatch):
    """One branch costs the same either way; two that share save the prompt's own products and pairs, once."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from shapes import useful_flops

    config = random_backbone(ModelConfig(family="llama", width=32, heads=2), 300, 0).config
    c = EncodedComparison([5] * 40, [5] * 40, [7] * 30, [8] * 20, 1)
    prompt = EncodedComparison([5] * 40, [5] * 40, [], [], 1)
    one, two = (useful_flops(config, [c], 10, branches, False) for branches in (1, 2))
    assert useful_flops(config, [c], 10, 1, False, shared_prompt=True) == one and two == 2 * one
    assert useful_flops(config, [c], 10, 2, False, True) == two - useful_flops(config, [prompt], 0, 1, False)


def test_generation_arms_say_the_same(model, tmp_path):
    """Ours, the former decoder and Hugging Face's generate, of a random model: greedy in float32, with ends that some rows reach."""
    out = tmp_path / "seconds.json"
    small = ("--prompts", 2, "--users", 3, "--new-tokens", 6, "--rounds", 1, "--lora", 2, "--end-every", 5)
    table = run("generation.py", "--model", model, *small, "--set", "user_model.place=prompt_end", "--out", out)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["prlhf", "former", "hf"] and {row[5] for row in rows} == {"1.00"}
    assert 0 < int(rows[0][4]) < 36 and len({row[4] for row in rows}) == 1
    assert {name: len(found) for name, found in json.loads(out.read_text())["seconds"].items()} == dict.fromkeys(
        ["prlhf", "former", "hf"], 1
    )
