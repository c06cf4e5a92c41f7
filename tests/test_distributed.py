"""Many processes train as one: the same losses and weights whatever their number, and nothing lost when one dies."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import made, saved

from prlhf.backbone.loading import empty_backbone, load_backbone, load_tokenizer, weight_files, word_embeddings
from prlhf.backbone.toys import byte_tokenizer, random_backbone
from prlhf.config import load as config
from prlhf.errors import OtherRankFailed, UserError
from prlhf.evaluate import __main__ as evaluate
from prlhf.parallel import ranks as distributed
from prlhf.parallel import tensors
from prlhf.parallel.ranks import process_group
from prlhf.parallel.shard import training_model
from prlhf.parallel.tensors import full, read_tensors, write_tensors
from prlhf.store import checkpoints as checkpoint
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "device=cpu", "data.train=examples/tiny/train.jsonl", "data.valid=examples/tiny/valid.jsonl", "user_model.tokens=2",
    "user_model.lr=1e-3", "optim.lr=1e-3", "optim.batch_size=13", "optim.micro_batch_size=2", "optim.max_steps=20",
    "optim.epochs=9", "train.log_every=1", "train.eval_every=9", "loss.beta=0.5",
)  # fmt: skip
LLAMA, GPTJ = "model.family=llama", "model.family=gptj"
HEAD = ("method=prm", "user_model.aggregator=linear", "user_model.tokens=1")
CASES = {
    "pdpo": (LLAMA,),
    "pdpo, clusters, LoRA, GPT-J": (GPTJ, "user_model.kind=cluster", "lora.rank=4", "model.recompute=blocks", "fsdp.sync=last", "fsdp.reshard_after_forward=false"),
    # A chat has a tail behind its users.
    "pdpo, prompt_end": (LLAMA, "user_model.place=prompt_end", "data.template=chat", "optim.max_steps=6"),
    "prm, response_end": (LLAMA, "method=prm", "user_model.place=response_end", "optim.max_steps=6"),
    "pdpo, linear, checkpointing": (LLAMA, "user_model.aggregator=linear", "model.recompute=blocks"),
    "prm": (LLAMA, "method=prm", "loss.alpha=0.7", "loss.center=0.01"),
    # Without centring the final norm's bias has no gradient but rounding, which Adam makes steps of.
    "prm, linear, rows": (GPTJ, "method=prm", "loss.center=0.01", "user_model.aggregator=linear", "user_model.tokens=1", "model.layout=rows"),
    "prm, frozen": (LLAMA, "method=prm", "user_model.aggregator=linear", "user_model.tokens=1", "model.frozen=true"),
    # Its states come from the cache that one process wrote.
    "prm, frozen, bfloat16": (GPTJ, "method=prm", "user_model.aggregator=linear", "user_model.tokens=1", "model.frozen=true", "model.dtype=bfloat16"),
    "pdpo, elementwise": (LLAMA, "lora.rank=2", "model.recompute=elementwise"),
    "vanilla": (LLAMA, "user_model.kind=uniform", "user_model.tokens=0", "fsdp.sync=last"),
    "uniform, prior": (LLAMA, "user_model.kind=uniform", "user_model.prior=0.5", "user_model.shared_prior=0.7"),
    "low rank, prior": (LLAMA, "method=prm", "user_model.rank=2", "user_model.prior=0.5", "user_model.shared_prior=0.7", "optim.max_steps=6"),
    "prm, linear, low rank, prior": (LLAMA, *HEAD, "user_model.rank=2", "user_model.prior=0.5", "model.pooling=mean"),
    "prm, linear, prior, no shared component": (LLAMA, *HEAD, "user_model.shared=false", "user_model.prior=0.5", "lora.rank=2"),
    "prm, linear, solved, LoRA": (LLAMA, *HEAD, "user_model.rank=2", "user_model.prior=auto", "user_model.init=solved", "lora.rank=2", "optim.max_steps=6"),
    "prm, exact": (LLAMA, *HEAD, "user_model.rank=2", "user_model.prior=auto", "model.frozen=true", "model.pooling=both"),
}  # fmt: skip
# For two processes behind the marker.
SLOW = [
    "pdpo, linear, checkpointing", "prm", "prm, frozen", "pdpo, elementwise", "vanilla", "uniform, prior",
    "prm, linear, low rank, prior", "prm, linear, prior, no shared component",
]  # fmt: skip


def arguments(run_dir, *overrides):
    return ["--config", "tiny.yaml", "--set", *SMALL, f"run_dir={run_dir}", *overrides]


def start(processes, *command, **options):
    """Start a script of the tests or the project on so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = [sys.executable] if processes == 1 else launcher
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **options.pop("env", {})}
    return subprocess.Popen(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def halted(process):
    """Stop a process, so that it starts no others; its children."""
    os.kill(process.pid, signal.SIGSTOP)
    while process.poll() is None and Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] not in "TZ":
        time.sleep(0.001)
    return children(process)


def finished(process, status=0):
    """What a process said, once it has ended with `status`."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == status, said
    return said


def train_all(processes, folder, cases, script=ROOT / "tests" / "train_in_turn.py"):
    """Train every case on so many processes, started once."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [arguments(folder / name, *overrides) for name, overrides in cases.items()]
    (folder / "arguments.json").write_text(json.dumps(lines))
    return finished(start(processes, script, folder / "arguments.json"))


def weights(run_dir):
    final = Path(run_dir) / "final"
    return {f"{p.name}:{k}": v for p in sorted(final.glob("*.safetensors")) for k, v in load_file(p).items()}


def records(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def assert_alike(one, other, tolerance, updates=20, but="no weights"):
    """The same final weights, `but` those with this in their name, and the same losses in each record."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert but in name or (tensor - theirs[name]).abs().max() <= tolerance if tensor.numel() else True, name
    assert len(records(one)) == len(records(other)) >= updates
    for a, b in zip(records(one), records(other)):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Gives the folder where one process has trained the cases asked for, each but once."""
    folder = tmp_path_factory.mktemp("alone")

    def trained(*names):
        missing = {name: CASES[name] for name in names if not (folder / name).exists()}
        if missing:
            train_all(1, folder, missing)
        return folder

    return trained


@pytest.mark.parametrize(
    "processes, names",
    [
        (2, [name for name in CASES if name not in SLOW]),
        pytest.param(2, SLOW, marks=pytest.mark.slow),
        pytest.param(4, list(CASES), marks=pytest.mark.slow),
        pytest.param(8, ["pdpo", "prm, linear, rows"], marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_whatever_the_number_of_processes(alone, tmp_path, processes, names):
    train_all(processes, tmp_path, {name: CASES[name] for name in names})
    for name in names:
        assert_alike(alone(*names) / name, tmp_path / name, 1e-5, updates=1 if "exact" in name else 6)


def test_processes_stop_early_together(tmp_path):
    """Where one process does, with the same accuracies; an evaluation after each third update, and a user model that
    learns fast enough to get worse."""
    keys = (
        LLAMA,
        "train.eval_every=3",
        "train.patience=2",
        "train.final=best",
        "user_model.lr=1e-2",
        "optim.group_by=pair",
    )
    for processes in (1, 2):
        train_all(processes, tmp_path / str(processes), {"early": keys})
    one, two = tmp_path / "1" / "early", tmp_path / "2" / "early"
    assert_alike(one, two, 1e-5, updates=6)
    assert records(one)[-1] == records(two)[-1] and records(one)[-1]["stopped_early"]
    for a, b in zip(records(one), records(two)):
        assert a.get("overfitting") == pytest.approx(b.get("overfitting"))


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path, processes):
    """20 updates: 9 by two processes, the rest by one or by four; within the tolerance of world sizes."""
    cases = {
        name: (*CASES[name], "train.save_every=9", "train.keep_checkpoints=3") for name in ("pdpo", "prm, linear, rows")
    }
    train_all(2, tmp_path / "run", cases)
    for name in cases:
        run = tmp_path / "run" / name
        for gone in (run / "final", run / "checkpoints" / "step_18", run / "checkpoints" / "step_20"):
            shutil.rmtree(gone)
    said = train_all(processes, tmp_path / "run", cases)
    assert said.count("resuming after update 9") == len(cases)
    for name in cases:
        assert_alike(alone(*cases) / name, tmp_path / "run" / name, 1e-5)


# train_in_turn.py, which fails where a process loads a model by itself, and notes how much each reads, of how much.
READING = f"""
import os, sys
from math import prod
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import train_in_turn
from prlhf.errors import run_command
from prlhf.backbone import loading
from prlhf.parallel import tensors

def refused(*_):
    raise AssertionError("a process loads the whole model")

here, rank = sys.argv[0], os.environ["RANK"]

def noted(values, *files):
    mine = sum(getattr(t, "_local_tensor", t).numel() for t in values.values())
    with open(here + rank, "a") as file:
        print(mine, sum(prod(t.shape) for t in values.values()), file=file)
    read_tensors(values, *files)

loading.load_weights = refused
read_tensors, tensors.read_tensors = tensors.read_tensors, noted
run_command(train_in_turn.main)
"""


def test_weights_are_read_by_shards_and_the_export_is_a_plain_folder(tmp_path):
    """A named model, full fine-tuning and LoRA: two processes, each of which reads its rows, do as one that reads all."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    described = config.load_config(None, [LLAMA]).model
    backbone, tokenizer = random_backbone(described, len(byte_tokenizer()), 3), byte_tokenizer()
    backbone.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    tokenizer.save_pretrained(tmp_path / "base")
    tied = random_backbone(described, len(byte_tokenizer()), 3)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.generation_config = GenerationConfig(do_sample=True, temperature=0.7)
    tied.save_pretrained(tmp_path / "tied", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "tied")
    short = ("model.family=null", "optim.max_steps=6")
    named = (f"model.name={tmp_path / 'base'}", *short)
    cases = {"full": named, "lora": (*named, "lora.rank=4"), "prm": (*named, *CASES["prm"][1:])}
    random_backbone(config.load_config(None, [GPTJ]).model, len(tokenizer), 3).save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    half = (f"model.name={tmp_path / 'gptj'}", *short, "model.dtype=bfloat16")
    cases |= {"half": (*half, "lora.rank=4"), "half, prm": (*half, "lora.rank=4", *CASES["prm"][1:])}
    cases["tied"] = (f"model.name={tmp_path / 'tied'}", *short)
    train_all(1, tmp_path / "1", cases)
    reading = tmp_path / "reading.py"
    reading.write_text(READING)
    train_all(2, tmp_path / "2", cases, reading)
    halves = [[tuple(map(int, line.split())) for line in open(f"{reading}{rank}")] for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == len(cases)
    for (first, whole), (second, _) in zip(*halves):  # an odd row more is one's: padding is not read
        assert first + second == whole and max(first, second) < 0.51 * whole
    for name in cases:
        # In a half type another order of a sum can turn into another rounding, of 2^-9 of a value, once weights have moved.
        tolerance = 2**-9 if name.startswith("half") else 1e-5
        assert_alike(tmp_path / "1" / name, tmp_path / "2" / name, tolerance, updates=6)
        assert records(tmp_path / "1" / name)[1]["loss"] == pytest.approx(
            records(tmp_path / "2" / name)[1]["loss"], abs=tolerance
        )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "2" / "full" / "final")
    ours = load_file(tmp_path / "1" / "full" / "final" / "model.safetensors")
    for name, parameter in exported.named_parameters():
        assert (parameter - ours[name]).abs().max() < 1e-5
    assert not torch.equal(exported.lm_head.weight, backbone.lm_head.weight)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "2" / "tied" / "final")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert (exported.generation_config.do_sample, exported.generation_config.temperature) == (True, 0.7)
    started_from = [
        json.loads((tmp_path / n / "tied" / "checkpoints" / "step_6" / "state.json").read_text())["started_from"]
        for n in "12"
    ]
    assert started_from[0] == started_from[1]  # the fingerprint of base weights, users and data


def test_models_whose_files_name_weights_otherwise_train_on_two_processes_as_on_one(tmp_path, monkeypatch, call):
    """An expert a tensor, a head of another name, a persistent buffer: read whole by every process, which says so."""
    monkeypatch.chdir(ROOT)
    cases = {}
    for family in ("gpt_neox", "glm4_moe"):
        folder = saved(made(family), tmp_path / "base" / family)
        cases[family] = (f"model.name={folder}", "model.family=null", "optim.max_steps=3", "train.eval_every=null")
        assert call(train.main, *arguments(tmp_path / "1" / family, *cases[family]))[0] == 0
    said = train_all(2, tmp_path / "2", cases)
    assert said.count("every process holds the whole model once while it loads") == 2  # once for both processes
    for family, (name, *_) in cases.items():
        # A key's bias adds the same to all logits of a softmax: its gradient is rounding alone, which AdamW makes a whole step of.
        assert_alike(tmp_path / "1" / family, tmp_path / "2" / family, 1e-5, updates=3, but="query_key_value.bias")
        base, final = (load_file(Path(f) / "model.safetensors") for f in (name[11:], tmp_path / "2" / family / "final"))
        assert base.keys() == final.keys() and any(not torch.equal(base[key], final[key]) for key in base)


@pytest.mark.slow
def test_two_processes_refuse_a_layout_that_a_model_does_not_honour_and_train_in_one_that_it_does(tmp_path):
    """Mamba 2 in trees and in rows; the comparison with its own forward pass is a collective operation."""
    from transformers import AutoModelForCausalLM, Mamba2Config

    shape = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8, "pad_token_id": 0}
    small = {"vocab_size": len(byte_tokenizer()), "hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Mamba2Config(**small, **shape)).save_pretrained(tmp_path / "mamba")
    byte_tokenizer().save_pretrained(tmp_path / "mamba")
    named = (f"model.name={tmp_path / 'mamba'}", "model.family=null", "optim.max_steps=4")
    refused = start(2, ROOT / "train.py", *arguments(tmp_path / "refused", *named))
    assert "expected 'rows'" in finished(refused, status=1)  # torchrun's own status
    for processes in (1, 2):
        train_all(processes, tmp_path / str(processes), {"rows": (*named, "model.layout=rows")})
    assert_alike(tmp_path / "1" / "rows", tmp_path / "2" / "rows", 1e-5, updates=1)


@pytest.mark.slow
def test_hybrid_sharding_four_processes_as_two_whole_models(alone, tmp_path):
    train_all(4, tmp_path, {"hybrid": (*CASES["pdpo"], "fsdp.replicas=2")})
    assert_alike(alone("pdpo") / "pdpo", tmp_path / "hybrid", 1e-5)


def test_offloading_and_mixed_precision(alone, tmp_path):
    """Weights in host memory; bfloat16 passes, whose losses are near, not equal; bfloat16 weights."""
    cases = {
        "offload": (*CASES["pdpo"], "fsdp.offload=true"),
        "bfloat16": (*CASES["pdpo"], "model.compute_dtype=bfloat16", "optim.max_steps=3"),
        "clusters": (LLAMA, "user_model.kind=cluster", "model.compute_dtype=bfloat16", "optim.max_steps=2"),
        "linear": (LLAMA, "user_model.aggregator=linear", "model.compute_dtype=bfloat16", "optim.max_steps=2"),
        "rewards": (LLAMA, "method=prm", "model.compute_dtype=bfloat16", "optim.max_steps=2"),
        "pure": (*CASES["pdpo"], "model.dtype=bfloat16", "model.pure_half=true", "optim.max_steps=2"),
        "pure, vanilla": (*CASES["vanilla"], "model.dtype=bfloat16", "model.pure_half=true", "optim.max_steps=2"),
    }
    train_all(2, tmp_path, cases)
    assert_alike(alone("pdpo") / "pdpo", tmp_path / "offload", 1e-5)
    half, single = records(tmp_path / "bfloat16")[0], records(alone("pdpo") / "pdpo")[0]
    assert half["loss"] != single["loss"] and half["loss"] == pytest.approx(single["loss"], rel=2**-6)
    for name in cases:
        half = {t.dtype for key, t in weights(tmp_path / name).items() if key.startswith("model.") and t.ndim}
        assert half == {torch.bfloat16 if name.startswith("pure") else torch.float32}, name
        assert {t.dtype for key, t in weights(tmp_path / name).items() if key.startswith("users.")} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_an_empty_backbone_is_the_real_one_without_values(family):
    model = config.load_config(None, [f"model.family={family}"]).model
    tokenizer = load_tokenizer(model)
    empty, real = empty_backbone(model, tokenizer), load_backbone(model, tokenizer, seed=0)

    def described(parameters):
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in parameters}

    assert described(empty.named_parameters()) == described(real.named_parameters())
    assert all(p.is_meta for p in empty.parameters())
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    assert all(torch.equal(buffers[name], b) for name, b in real.named_buffers())


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_an_empty_named_backbone_of_a_half_type_has_the_buffers_of_the_loaded_one(family, tmp_path):
    """Rotary frequencies above all: made in float32 whatever the weights' type."""
    described = config.load_config(None, [f"model.family={family}", "model.width=128"]).model
    random_backbone(described, len(byte_tokenizer()), 3).save_pretrained(tmp_path)
    named = config.load_config(None, [f"model.name={tmp_path}", "model.dtype=bfloat16", "lora.rank=2"]).model
    empty, real = empty_backbone(named, byte_tokenizer()), load_backbone(named, byte_tokenizer(), seed=0)
    assert {p.dtype for p in empty.parameters()} == {p.dtype for p in real.parameters()} == {torch.bfloat16}
    assert empty.config.dtype == real.config.dtype == torch.bfloat16
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys() and buffers
    for name, buffer in real.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffers[name], buffer), name


def test_a_generation_config_that_transformers_will_not_save_is_mended_when_it_is_read(tmp_path):
    """A temperature without sampling, as some published models have it: refused at the end of a run of days, else."""
    described = config.load_config(None, [LLAMA]).model
    random_backbone(described, len(byte_tokenizer()), 3).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    named = config.load_config(None, [f"model.name={tmp_path / 'base'}"]).model
    for name, model in (
        ("loaded", load_backbone(named, byte_tokenizer(), 0)),
        ("empty", empty_backbone(named, byte_tokenizer())),
    ):
        model.generation_config.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["temperature"] == 0.9


def saved_model(folder, **options):
    """A random Llama's weights in `folder`, with its tokenizer."""
    backbone = random_backbone(config.load_config(None, [LLAMA]).model, len(byte_tokenizer()), 3)
    backbone.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return backbone


def test_a_checkpoint_is_written_in_files_of_which_memory_holds_two(monkeypatch, tmp_path):
    """Beside the tensors: the writer has a file twice, and a checkpoint in one file would be there twice."""
    monkeypatch.setattr(tensors, "FILE_BYTES", 1_000_000)
    values = {f"a{i}": torch.randn(100, 1000) for i in range(20)} | {
        "large": torch.randn(1000, 1000),
        "one": torch.ones(1),
    }
    write_tensors({"one": torch.ones(1)}, tmp_path / "first")  # imports
    tracemalloc.start()
    write_tensors(values, tmp_path / "all")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    files = list((tmp_path / "all").glob("*.safetensors"))
    assert len(files) == 12  # two of 0.4 MB a file, the large one alone, and the last
    assert peak < 2 * 4_000_000 + 1_000_000 < sum(file.stat().st_size for file in files)
    read = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    read_tensors(read, tmp_path / "all")
    assert all(torch.equal(read[name], tensor) for name, tensor in values.items())


@pytest.mark.slow
def test_no_process_ever_holds_the_whole_model(tmp_path):
    """Each holds its share while it loads and after, and so all together hold the model once, whatever their number."""
    small, large = tmp_path / "small", tmp_path / "large"
    saved_model(small)
    described = config.load_config(None, [LLAMA, "model.width=512", "model.layers=12"]).model
    backbone = random_backbone(described, len(byte_tokenizer()), 3)
    backbone.save_pretrained(large)
    byte_tokenizer().save_pretrained(large)
    size = sum(p.nbytes for p in backbone.parameters())
    assert size > 150e6

    def growth(how, processes):
        out = tmp_path / str(processes)
        out.mkdir(exist_ok=True)
        finished(start(processes, ROOT / "tests" / "measure_loading.py", how, large, out, small))
        return [json.loads((out / f"{how}-{rank}.json").read_text()) for rank in range(processes)]

    assert min(growth("whole", 2)) > 0.9 * size  # what would be seen
    for processes in (2, 4):
        assert max(growth("sharded", processes)) < size / processes + 30e6


def sharded_model(folder):
    """The model in `folder` as one process of FSDP reads it, whole again."""
    named = config.load_config(None, [f"model.name={folder}", "model.compute_dtype=bfloat16", "user_model.tokens=2"])
    try:
        with process_group(named, "cpu"):
            model = training_model(named, byte_tokenizer(), 2, "cpu")
            return {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    finally:
        if torch.distributed.is_initialized():  # left by an error, with which a command ends
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parts", ["10GB", "100KB"])
def test_files_that_are_not_the_models_are_not_read(tmp_path, parts):
    """Another precision's weights beside the model's own, which one process leaves alone, are left alone by many."""
    backbone = saved_model(tmp_path, max_shard_size=parts)
    assert (tmp_path / "model.safetensors").exists() == (parts == "10GB")
    zeros = {name: torch.zeros_like(p, dtype=torch.float16) for name, p in backbone.named_parameters()}
    for name in ("model.fp16.safetensors", "consolidated.safetensors", "z.safetensors"):
        save_file(zeros, tmp_path / name)
    read = sharded_model(tmp_path)
    for name, p in backbone.named_parameters():
        assert torch.equal(read[f"backbone.{name}"], p), name
    embeddings = backbone.get_input_embeddings().weight  # their mean row is where a user's vectors begin
    assert torch.equal(weights_read_for_users(tmp_path), embeddings)


def weights_read_for_users(folder):
    named = config.load_config(None, [f"model.name={folder}"]).model
    return word_embeddings(empty_backbone(named, byte_tokenizer()), folder)


def test_a_model_without_safetensors_is_refused_with_how_to_convert_it(tmp_path):
    backbone = saved_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    named = config.load_config(None, [f"model.name={tmp_path}"]).model
    for load in (lambda: sharded_model(tmp_path), lambda: load_backbone(named, byte_tokenizer(), 0)):
        with pytest.raises(UserError, match=r"save_pretrained\(NEW_FOLDER, safe_serialization=True\)"):
            load()


def test_an_index_that_cannot_be_read_is_named(tmp_path):
    saved_model(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(UserError, match="index.json: cannot be read"):
            weight_files(tmp_path)
    index.write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    assert weight_files(tmp_path) == [tmp_path / "outside.safetensors"]


def test_a_table_without_a_gradient_is_summed_where_it_lies(monkeypatch):
    """On another device than the CPU, here meta: indices and values of what is summed must lie on the same."""
    table = torch.nn.Parameter(torch.empty(5, 3, device="meta"))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "summed", lambda values: values)
    distributed.sum_rows(table)
    assert table.grad.is_meta and table.grad.is_sparse and table.grad.shape == (5, 3)


def test_evaluation_is_not_started_in_copies(monkeypatch, tmp_path, call):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = call(evaluate.main, "--checkpoint", tmp_path)
    assert status == 2 and "evaluate.py: found 2 processes, expected one" in err


# As gloo writes them (gloo/transport/tcp/pair.cc, unbound_buffer.cc; gloo/rendezvous/context.cc).
@pytest.mark.parametrize(
    "said",
    [
        "[/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:17085",
        "[/gloo/transport/tcp/pair.cc:544] Read error [127.0.0.1]:1444: Connection reset by peer",
        "[/gloo/transport/tcp/pair.cc:322] writev [127.0.0.1]:4153: Broken pipe",
        "[/gloo/transport/tcp/pair.cc:598] Socket closed [127.0.0.1]:4153",
        "[/gloo/transport/tcp/pair.cc:578] Application timeout caused pair closure",
        "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 7200000ms for recv operation to complete",
        "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:144] no error",
    ],
)
def test_what_gloo_says_of_one_that_is_gone(monkeypatch, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    lost = pytest.raises(OtherRankFailed, match="lost another one.*the same command goes on")
    with lost, process_group(config.load_config(None, [LLAMA]), "cpu"):
        raise RuntimeError(said)


WAITING = f"""
import sys, time
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
from prlhf.config.load import load_config
from prlhf.parallel import ranks as distributed
from prlhf.errors import run_command

def main():
    distributed.PATIENCE = timedelta(seconds=2)
    with distributed.process_group(load_config(None, ["model.family=llama"]), "cpu"):
        distributed.barrier()
        if distributed.rank() == 1:
            time.sleep(30)
        distributed.barrier()

run_command(main)
"""


@pytest.mark.slow
def test_one_that_does_not_answer_is_given_up_and_said_to_be_lost(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    said = finished(start(2, tmp_path / "waiting.py"), status=1)
    assert "process 0 lost another one" in said and 'waiting.py", line' not in said


def test_what_the_network_said_is_not_lost(monkeypatch):
    """The first error on a machine that is set up wrongly comes here too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    lost = pytest.raises(OtherRankFailed, match="Duplicate GPU detected")
    with lost, process_group(config.load_config(None, [LLAMA]), "cpu"):
        raise torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected")


LONG = (LLAMA, "optim.epochs=12", "optim.max_steps=30", "train.save_every=1", "train.eval_every=null")


def reached(run):
    return max(checkpoint.steps(Path(run) / "checkpoints"), default=0)


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def children(process):
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    # Its own cache, as each test has: the user's may hold a reference that an earlier version rounded otherwise.
    finished(start(2, "train.py", *arguments(folder / "run", *LONG), env={"PRLHF_CACHE": str(folder / "cache")}))
    return folder / "run"


def assert_equal_runs(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    clock = {"comparisons_per_s", "tokens_per_s", "peak_memory_gb"}
    without_clock = [[{k: v for k, v in r.items() if k not in clock} for r in records(run)] for run in (one, other)]
    assert without_clock[0] == without_clock[1]


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_that_is_told_to_stop_saves_and_says_so(uninterrupted, tmp_path, processes):
    run = tmp_path / "run"
    command = ("train.py", *arguments(run, *LONG, "train.save_every=null"))
    process = start(processes, *command)
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(records(run)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert f"after update {reached(run)}; it is saved" in said and reached(run) >= 3
    assert process.returncode == 143 if processes == 1 else process.returncode != 0  # torchrun's own status
    finished(start(processes, *command))
    if processes == 2:
        assert_equal_runs(uninterrupted, run)
    else:
        assert_alike(uninterrupted, run, 1e-5)


def test_a_process_that_dies_ends_the_run_within_a_minute_and_loses_nothing(uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start(2, "train.py", *arguments(run, *LONG))
    wait_until(lambda: reached(run) >= 3, process)
    os.kill(children(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "lost another one" in said and "Signal 9" in said and "goes on" in said
    finished(start(2, "train.py", *arguments(run, *LONG)))
    assert_equal_runs(uninterrupted, run)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_two_processes_end_bit_for_bit_alike(tmp_path):
    """Every third before the first update, or with it; so many updates that none of the others is the end."""
    keys, run = (*LONG, "optim.epochs=99", "optim.max_steps=200"), tmp_path / "run"
    finished(start(2, "train.py", *arguments(tmp_path / "whole", *keys)))
    rng = random.Random(1)
    for kill in range(20):
        before, starting = reached(run), kill % 3 == 0
        process = start(2, "train.py", *arguments(run, *keys))
        until = time.monotonic() + rng.uniform(0.0, 10.0) if starting else math.inf
        wait_until(lambda before=before, until=until: reached(run) > before or time.monotonic() > until, process)
        if not starting:
            time.sleep(rng.uniform(0.0, 0.3))
        for pid in (*halted(process), process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        assert not (run / "final").exists(), "ended before it could be killed"
    finished(start(2, "train.py", *arguments(run, *keys)))
    assert_equal_runs(tmp_path / "whole", run)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_ends_with_a_message_and_the_last_good_checkpoint(tmp_path, processes):
    """No file may become larger than 150 kB from the second checkpoint on: what a disk without room does to a save."""
    run = tmp_path / "run"
    command = (ROOT / "tests" / "train_on_a_full_disk.py", *arguments(run, *LONG))
    said = finished(start(processes, *command), status=1)  # torchrun's own too, which prints a traceback of itself
    assert "step_2: cannot be written" in said and "are good" in said
    assert f'File "{command[0]}", line' not in said, "a traceback"
    assert set(checkpoint.steps(run / "checkpoints")) == {1} and not list(run.glob("checkpoints/.*"))
    finished(start(processes, "train.py", *arguments(run, *LONG)))
    assert len(records(run)) >= 30


@pytest.mark.slow
def test_a_checkpoint_that_one_of_two_processes_finds_damaged_is_refused_by_both(uninterrupted, tmp_path):
    """A flipped bit in the file that rank 1 checks: a message, no waiting, and the checkpoint before it goes on."""
    run = tmp_path / "run"
    finished(start(2, "train.py", *arguments(run, *LONG)))
    shutil.rmtree(run / "final")
    newest = run / "checkpoints" / f"step_{reached(run)}"
    names = sorted(name for part in newest.glob("checksums-*.json") for name in json.loads(part.read_text()))
    file = newest / names[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    process = start(2, "train.py", *arguments(run, *LONG))
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and f"{names[1]} is not what was written" in said
    assert f"go on from another: step_{reached(run) - 1}" in said
    shutil.rmtree(newest)
    finished(start(2, "train.py", *arguments(run, *LONG)))
    assert_equal_runs(run, uninterrupted)
