"""Seconds a training step takes, against TRL's DPOTrainer on the same comparisons.

    pip install -c constraints.txt -e '.[bench]' && make model
    python benchmarks/step.py [--shape tldr | chat] [--rounds 5] [--comparisons 4] [--lora 0] [--out FILE.json]

One step is one update: forward and backward passes over the same comparisons in the same order, clipping, AdamW. The arms
take turns within a run, and medians over the rounds are compared: on a shared machine separate runs differ by a factor of
two. First all arms that compute the same thing must agree on the loss. Each arm is a process of its own, as its users would
run it, which works while the others wait; peak memory is that of the process (on a CPU with imports, of which TRL has more).

prlhf      plain DPO (uniform user, T_u = 0); reference computed before, once
prlhf pdpo P-DPO, both branches (individual users, T_u = 10, alpha 0.5); reference as above
rows       the same P-DPO as one would write it, DPO's loss in each branch: both responses as rows of their own, the model's
           logits at all positions, their reference computed in the step
rows once  the same, but for a reference that both branches share
trl        TRL's DPOTrainer with its defaults, but for: float32, precomputed reference, dropout and checkpointing as here;
           one arm for each per-device batch size, of which the fastest counts. On a GPU Liger's kernels where installed

Beside the peak of our arms stands what `train.py --dry-run` would have said. The share of the matmul rate is that of the FLOPs an
update must spend (`shapes.useful_flops`) in the time it took, over what a large matrix product of the same type reaches here, in
the same run. Models of real shapes: benchmarks/random_model.py; the runs that want a GPU: benchmarks/gpu.sh.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from shapes import random_comparisons, training_data, useful_flops
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from prlhf import config as config_module
from prlhf.backbones import DTYPES, choose_device, load_tokenizer, load_weights
from prlhf.config import Config
from prlhf.distributed import process_group, training_model
from prlhf.dry_run import CUDA_CONTEXT, predict
from prlhf.encoding import EncodedComparison
from prlhf.errors import run_command
from prlhf.loop import accumulate_gradients, keep_freed_memory, make_optimizer
from prlhf.optim import Optimizers, clip
from prlhf.scoring import score
from prlhf.training_log import peak_memory_gb

P_DPO = ("user_model.kind=individual", "user_model.tokens=10", "loss.alpha=0.5")
PLAIN = ("user_model.kind=uniform", "user_model.tokens=0")
ARMS = {"prlhf": PLAIN, "prlhf pdpo": P_DPO, "rows": P_DPO, "rows once": P_DPO}
OURS = ("prlhf", "prlhf pdpo")  # the arms that do as train.py does
USERS = 4
NOISE = 1e-3  # what the policy's weights are moved by, so that the losses are not log 2


def config_of(name: str, args: argparse.Namespace) -> Config:
    """The config of one of our arms."""
    keys = [f"model.name={args.model}", f"optim.micro_batch_size={args.micro_batch}", f"lora.rank={args.lora}"]
    keys += [f"model.gradient_checkpointing={args.checkpointing}", f"model.dtype={args.dtype}", "optim.lr=1e-6"]
    keys += [f"optim.batch_size={args.comparisons}", f"evaluate.batch_size={args.micro_batch}"]
    return config_module.load(None, [*keys, *ARMS[name], *args.set])


def group_of(label: str, args: argparse.Namespace) -> AbstractContextManager[None]:
    """Within the context an arm may shard its model, as model.compute_dtype asks for."""
    return process_group(config_of(label, args), choose_device("auto")) if label in ARMS else nullcontext()


class Arm(ABC):
    """A way to take a training step."""

    optimizer: torch.optim.Optimizer | Optimizers
    reference_s = 0.0  # seconds the reference took, once, before the first step

    @abstractmethod
    def accumulate(self) -> float:
        """Forward and backward passes over all comparisons; returns the loss."""

    def step(self, apply: bool = True) -> float:
        """One update, or, to warm up, all of it but the change of the weights; returns the loss."""
        loss = self.accumulate()
        clip([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def moved(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Move the backbone's weights a little, in every arm alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            values = p.to_local() if isinstance(p, DTensor) else p  # of one process, which has them all
            values += (NOISE * torch.randn(p.shape, generator=generator)).to(values)


class Ours(Arm):
    """A step of this project, by the function that its training loop calls."""

    def __init__(self, name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        self.config = config_of(name, args)
        self.model = training_model(self.config, load_tokenizer(self.config.model), USERS, choose_device("auto"))
        self.comparisons = comparisons
        started = time.perf_counter()
        self.reference = score(self.model, comparisons, None, self.config.optim.micro_batch_size)
        self.reference_s = time.perf_counter() - started
        moved([p for p in self.model.backbone.parameters() if p.requires_grad])
        self.optimizer = make_optimizer(self.config, self.model, args.rounds)
        self.model.train()

    def accumulate(self) -> float:
        update = range(len(self.comparisons))
        self.optimizer.catch_up()
        return accumulate_gradients(self.config, self.model, self.comparisons, self.reference, update).loss


class Rows(Ours):
    """P-DPO without any of what this project saves."""

    def __init__(self, name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        super().__init__(name, args, comparisons)
        self.shares_reference = name == "rows once"
        config = self.config.model
        self.reference_model = load_weights(config.name, config.dtype).to(self.model.device)  # as before the first step

    def log_probs(self, backbone: torch.nn.Module, c: EncodedComparison, user: int | None) -> torch.Tensor:
        """log p(y | x, u) of both responses, (2,), from two padded rows and all their logits."""
        device = self.model.device
        rows = [torch.tensor([*c.prefix, *y], device=device) for y in (c.chosen, c.rejected)]
        ids_2T = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real_2T = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        embeddings_2TD, vectors = backbone.get_input_embeddings()(ids_2T), 0
        if user is not None:
            user_2UD = self.model.user_model(torch.tensor([user, user], device=device)).to(embeddings_2TD.dtype)
            embeddings_2TD, vectors = torch.cat([user_2UD, embeddings_2TD], dim=1), user_2UD.shape[1]
            real_2T = torch.cat([real_2T.new_ones(2, vectors), real_2T], dim=1)
        logits_2TV = backbone(inputs_embeds=embeddings_2TD, attention_mask=real_2T, use_cache=False).logits
        start = vectors + len(c.prefix)
        sums = []
        for row, y in enumerate((c.chosen, c.rejected)):
            log_p = logits_2TV[row].float().log_softmax(dim=-1)[start - 1 : start - 1 + len(y)]
            sums.append(log_p.gather(1, torch.tensor(y, device=device)[:, None]).sum())
        return torch.stack(sums)

    def accumulate(self) -> float:
        total = 0.0
        for c in self.comparisons:
            reference = None
            for user in (c.user, 0):
                if reference is None or not self.shares_reference:
                    with torch.no_grad():
                        reference = self.log_probs(self.reference_model, c, None)
                ratio = self.log_probs(self.model.backbone, c, user) - reference
                loss = -torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1])) * 0.5 / len(self.comparisons)
                loss.backward()
                total += loss.item()
        return total


class TRL(Arm):
    """A step of DPOTrainer: its collator, its training_step, and AdamW as here."""

    def __init__(self, batch_size: int, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        name = str(Path(args.model).expanduser())
        device = choose_device("auto")
        dtype = getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        peft = None
        if args.lora:
            from peft import LoraConfig

            peft = LoraConfig(r=args.lora, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer_config = DPOConfig(
            output_dir=tempfile.mkdtemp(), max_length=None, use_cpu=device == "cpu",
            bf16=dtype == torch.bfloat16, gradient_checkpointing=args.checkpointing, precompute_ref_log_probs=True,
            report_to="none", disable_tqdm=True, beta=0.1,
        )  # fmt: skip
        dummy = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        tokenizer = AutoTokenizer.from_pretrained(name)
        self.trainer = DPOTrainer(
            model, args=trainer_config, train_dataset=dummy, processing_class=tokenizer, peft_config=peft
        )
        self.trainer.model.to(device)
        if args.checkpointing:  # what Trainer.train would do
            self.trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if device == "cuda" and importlib.util.find_spec("liger_kernel"):
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self.trainer.model, {"fused_linear_cross_entropy": False})
        self.comparisons, self.device = comparisons, device
        started = time.perf_counter()
        self.batches = self.with_reference(batch_size)
        self.reference_s = time.perf_counter() - started
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        moved(parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
        self.trainer.optimizer = self.optimizer

    def with_reference(self, size: int) -> list[dict[str, torch.Tensor]]:
        """The comparisons in TRL's batches of `size`, with TRL's reference log-probs."""
        batches = []
        for start in range(0, len(self.comparisons), size):
            part = self.comparisons[start : start + size]
            rows = [{"prompt_ids": c.prefix, "chosen_ids": c.chosen, "rejected_ids": c.rejected} for c in part]
            batch = {name: t.to(self.device) for name, t in self.trainer.data_collator(rows).items()}
            reference = self.trainer.compute_ref_log_probs(self.trainer.model, batch)
            batches.append(batch | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference)))
        return batches

    def accumulate(self) -> float:
        self.trainer.current_gradient_accumulation_steps = len(self.batches)
        return sum(self.trainer.training_step(self.trainer.model, dict(batch)).item() for batch in self.batches)


def check_losses(losses: dict[str, float]) -> None:
    """All plain DPO arms have one loss, and both P-DPO arms another; else the times would compare different things."""
    plain = {name: loss for name, loss in losses.items() if name == "prlhf" or name.startswith("trl")}
    personal = {name: loss for name, loss in losses.items() if name not in plain}
    for same in (plain, personal):
        if same and max(same.values()) - min(same.values()) > 1e-3 * max(same.values()):
            raise SystemExit(f"the arms do not compute the same loss: {same}")


def made(label: str, args: argparse.Namespace, comparisons: list[EncodedComparison]) -> Arm:
    """The arm of a label: "trl, batch 2" is the trainer with that batch size."""
    name, _, size = label.partition(", batch ")
    if name in ("rows", "rows once"):
        return Rows(name, args, comparisons)
    if name != "trl":
        return Ours(name, args, comparisons)
    return TRL(int(size), args, comparisons)


class Worker:
    """An arm in a process of its own, which does something only when it is asked to."""

    MARK = "answer: "

    def __init__(self, label: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", label],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.reference_s = self.answer()["reference_s"]

    def answer(self) -> dict[str, float]:
        """What the process says next."""
        for line in self.process.stdout:
            if line.startswith(self.MARK):
                return json.loads(line[len(self.MARK) :])
        raise SystemExit("a worker died; its messages are above")

    def ask(self, what: str) -> dict[str, float]:
        """Take a "step", or a "warm-up" that leaves the weights as they are: loss, seconds, peak_gb."""
        self.process.stdin.write(what + "\n")
        return self.answer()


def work(arm: Arm) -> None:
    """A worker's loop: a line in, an answer out."""

    def answer(**numbers: float) -> None:
        print(Worker.MARK + json.dumps(numbers), flush=True)

    answer(reference_s=arm.reference_s)
    for line in sys.stdin:
        started = time.perf_counter()
        loss = arm.step(apply=line.strip() == "step")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        answer(loss=loss, seconds=time.perf_counter() - started, peak_gb=peak_memory_gb())


def arguments(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/prlhf/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", default="tldr", choices=("tldr", "chat"))
    parser.add_argument("--comparisons", type=int, default=4, help="per update")
    parser.add_argument("--micro-batch", type=int, default=1, help="trees per forward pass")
    parser.add_argument("--trl-batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 is full fine-tuning")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--arms", nargs="+", default=[*ARMS, "trl"], choices=[*ARMS, "trl"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for the prlhf arms")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="also write the table as JSON")
    return parser.parse_args()


def labels(args: argparse.Namespace) -> list[str]:
    """The arms asked for, TRL's once for each of its batch sizes."""
    trl = [f"trl, batch {size}" for size in args.trl_batch]
    return [label for arm in args.arms for label in (trl if arm == "trl" else [arm])]


def comparisons_of(args: argparse.Namespace) -> list[EncodedComparison]:
    """The comparisons of the update, random tokens of the model's vocabulary."""
    vocabulary = len(load_tokenizer(config_module.load(None, [f"model.name={args.model}"]).model))
    return random_comparisons(args.shape, args.comparisons, vocabulary, USERS, args.seed)


def main() -> None:
    args = arguments(__doc__)
    comparisons = comparisons_of(args)
    if args.worker:
        if args.worker in OURS:
            keep_freed_memory()  # as train.py does
        with group_of(args.worker, args):
            work(made(args.worker, args, comparisons))
        return

    workers = {label: Worker(label) for label in labels(args)}
    check_losses({label: worker.ask("warm-up")["loss"] for label, worker in workers.items()})
    ours = config_of("prlhf", args).model
    dtype = ours.compute_dtype or ours.dtype
    rate = matmul_rate(AutoConfig.from_pretrained(str(Path(args.model).expanduser())).hidden_size, DTYPES[dtype])
    seconds: dict[str, list[float]] = {label: [] for label in workers}
    memory: dict[str, float] = {}
    for _ in range(args.rounds):
        for label, worker in workers.items():
            found = worker.ask("step")
            seconds[label].append(found["seconds"])
            memory[label] = found["peak_gb"]
    report(args, comparisons, seconds, {label: worker.reference_s for label, worker in workers.items()}, memory, rate)
    print(f"\nmatmul rate: {rate / 1e12:.3f} TFLOP/s, {dtype}, measured in this run, while all arms waited")


def matmul_rate(width: int, dtype: torch.dtype, rounds: int = 7) -> float:
    """FLOPs a second of (8192, D) x (D, 4 D) on a GPU, of a quarter of the rows on a CPU: the median of some rounds."""
    device = choose_device("auto")
    rows = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(*size, device=device).to(dtype) for size in ((rows, width), (width, 4 * width)))
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 8 * rows * width**2 / statistics.median(times[1:])


def shares_of_rate(
    args: argparse.Namespace, comparisons: Sequence[EncodedComparison], seconds: dict[str, float], rate: float
) -> dict[str, float]:
    """What share of the matmul rate each arm's useful FLOPs are."""
    config = AutoConfig.from_pretrained(str(Path(args.model).expanduser()))
    plain, personal = (
        useful_flops(config, comparisons, vectors, branches, args.lora > 0) for vectors, branches in ((0, 1), (10, 2))
    )
    return {
        name: (plain if name == "prlhf" or name.startswith("trl") else personal) / (time_taken * rate)
        for name, time_taken in seconds.items()
    }


def predicted_gb(name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]) -> float:
    """What the dry run says that an arm's memory will be at its peak, in 1e9 bytes, counted as `peak_memory_gb` counts."""
    config, device = config_of(name, args), choose_device("auto")
    memory = predict(config, load_tokenizer(config.model), training_data(comparisons, USERS), device).memory
    return (memory.peak - (CUDA_CONTEXT if device == "cuda" else 0)) / 1e9


def report(
    args: argparse.Namespace,
    comparisons: list[EncodedComparison],
    seconds: dict[str, list[float]],
    references: dict[str, float],
    memory: dict[str, float],
    rate: float,
) -> None:
    """Print the table, and write it as JSON where that is asked for."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    trl = {name: t for name, t in medians.items() if name.startswith("trl")}
    best = min(trl, key=lambda name: trl[name]) if trl else None
    useful = sum(c.length for c in comparisons)
    shares = shares_of_rate(args, comparisons, medians, rate)
    rows = []
    for name, median in medians.items():
        rows.append(
            {
                "arm": name,
                "comparisons_per_s": len(comparisons) / median,
                "useful_tokens_per_s": useful / median,
                "slowest_over_fastest_round": max(seconds[name]) / min(seconds[name]),
                "times_trl": medians[best] / median if best else None,
                "memory_gb": memory[name],
                "predicted_gb": predicted_gb(name, args, comparisons) if name in OURS else None,
                "memory_over_trl": memory[name] / memory[best] if best else None,
                "reference_in_steps": references[name] / median,
                "share_of_matmul_rate": shares[name],
            }
        )
    print("| | comparisons/s | useful tokens/s | speed over TRL's best | peak GB | by the dry run | over TRL's "
          "| reference, in steps | share of the matmul rate |")  # fmt: skip
    print("|---" * 9 + "|")
    for r in rows:
        cells = [f"{r['comparisons_per_s']:.3f}", f"{r['useful_tokens_per_s']:.0f}"]
        cells += ["-" if r["times_trl"] is None else f"{r['times_trl']:.2f}"]
        cells += [f"{r['memory_gb']:.2f}", "-" if r["predicted_gb"] is None else f"{r['predicted_gb']:.2f}"]
        cells += ["-" if r["memory_over_trl"] is None else f"{r['memory_over_trl']:.2f}"]
        print(
            f"| {r['arm']} | "
            + " | ".join([*cells, f"{r['reference_in_steps']:.2f}"])
            + f" | {r['share_of_matmul_rate']:.2f} |"
        )
    if args.out:
        Path(args.out).write_text(
            json.dumps({"arguments": vars(args), "seconds": seconds, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_command(main)
