"""Seconds a training step takes, against TRL's DPOTrainer on the same comparisons.

    pip install -c constraints.txt -e '.[bench]' && make model
    python benchmarks/step.py [--shape tldr | chat] [--rounds 5] [--comparisons 4] [--lora 0] [--out FILE.json]

One step is one update: forward and backward passes over the same comparisons in the same order, clipping, AdamW. The arms
take turns within a run, and medians over the rounds are compared: on a shared machine separate runs differ by a factor of
two. First all arms that compute the same thing must agree on it: on the update's loss and on the reward margin of each
comparison in each branch (`check_equal`). Each arm is a process of its own, as its users would run it, which works while the
others wait; peak memory is that of the process (on a CPU with imports, of which TRL has more). On a GPU an arm gives back
what it does not hold when its turn ends, and takes a step that is not timed when it begins; where the arms do not even then
find room beside each other, --one-at-a-time starts each when the one before has ended.

prlhf      plain DPO (uniform user, T_u = 0); reference computed before, once
prlhf pdpo P-DPO, both branches (individual users, T_u = 10, alpha 0.5); reference as above
rows       the same P-DPO as one would write it, DPO's loss in each branch: both responses as rows of their own, the model's
           logits at all positions, their reference computed in the step
rows once  the same, but for a reference that both branches share
trl        TRL's DPOTrainer with its defaults, but for: precision as here (a model in float32 that computes in bfloat16 where
           model.compute_dtype says so), precomputed reference, dropout and checkpointing as here; one arm for each
           per-device batch size, of which the fastest counts. On a GPU Liger's kernels where installed

The first two do as train.py does, on a GPU with deterministic kernels (--set deterministic=false turns these off).

Beside the peak of our arms stands what `train.py --dry-run` would have said. The share of the matmul rate is that of the FLOPs an
update must spend (`shapes.useful_flops`) in the time it took, over what a large matrix product of the same type reaches here, in
the same run. Models of real shapes: benchmarks/random_model.py; the runs that want a GPU: benchmarks/gpu.sh.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from shapes import SHAPES, random_comparisons, training_data, useful_flops
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from prlhf import config as config_module
from prlhf.backbones import DTYPES, choose_device, load_tokenizer, load_weights
from prlhf.config import Config
from prlhf.distributed import named_parameters, process_group, training_model
from prlhf.dry_run import CUDA_CONTEXT, predict
from prlhf.encoding import EncodedComparison
from prlhf.errors import run_command
from prlhf.loop import (
    accumulate_gradients,
    keep_freed_memory,
    make_optimizer,
    part_loss,
    reproducible,
    update_parts,
)
from prlhf.lora import PEFT_PREFIX
from prlhf.optim import Optimizers, clip
from prlhf.scoring import score
from prlhf.training_log import peak_memory_gb

P_DPO = ("user_model.kind=individual", "user_model.tokens=10", "loss.alpha=0.5")
PLAIN = ("user_model.kind=uniform", "user_model.tokens=0")
ARMS = {"prlhf": PLAIN, "prlhf pdpo": P_DPO, "rows": P_DPO, "rows once": P_DPO}
OURS = ("prlhf", "prlhf pdpo")  # the arms that do as train.py does
USERS = 4
NOISE = 0.5  # by how much of its input a layer's output is moved, so that the policy's margins are not 0
# How far arms may be apart, over the largest reward margin. float32: a margin of about 1 is beta times the difference of sums
# of some hundred to some thousand, each held to 1e-7 of itself, so 1e-5 to 1e-4 of it is rounding (measured: 1e-5 to 6e-5),
# and 1 % of one layer's weights is 2e-3. bfloat16: hidden states rounded to 2^-9 at each block are 1 to 2 % of a logit.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel")


def config_of(name: str, args: argparse.Namespace) -> Config:
    """The config of one of our arms."""
    keys = [f"model.name={args.model}", f"optim.micro_batch_size={args.micro_batch}", f"lora.rank={args.lora}"]
    keys += [f"model.gradient_checkpointing={args.checkpointing}", f"model.dtype={args.dtype}", "optim.lr=1e-6"]
    keys += [f"optim.batch_size={args.comparisons}", f"evaluate.batch_size={args.micro_batch}"]
    return config_module.load(None, [*keys, *ARMS[name], *args.set])


def computing_type(args: argparse.Namespace) -> str:
    """What matrix products are computed in, by all arms."""
    model = config_of("prlhf", args).model
    return model.compute_dtype or model.dtype


@contextlib.contextmanager
def surroundings(label: str, args: argparse.Namespace) -> Iterator[None]:
    """Within the context an arm may shard its model, as model.compute_dtype asks for; ours compute as reproducibly as in
    train.py."""
    device = choose_device("auto")
    with contextlib.ExitStack() as stack:
        if label in OURS:
            reproducible(config_of(label, args), device)
            stack.callback(torch.use_deterministic_algorithms, False)
        if label in ARMS:
            stack.enter_context(process_group(config_of(label, args), device))
        yield


class Computed(NamedTuple):
    """What an arm computes, apart from how fast: the update's loss, and each comparison's reward margin beta h, with both
    branches of P-DPO the generic one's before the user's."""

    loss: float
    margins: list[float]


class Arm(ABC):
    """A way to take a training step."""

    optimizer: torch.optim.Optimizer | Optimizers
    reference_s = 0.0  # seconds the reference took, once, before the first step

    @abstractmethod
    def accumulate(self) -> float:
        """Forward and backward passes over all comparisons; returns the loss."""

    @abstractmethod
    def margins(self) -> list[float]:
        """The reward margins of `Computed`, by the functions that `accumulate` calls."""

    def computed(self) -> Computed:
        """What it computes, with its weights left as they are."""
        with torch.no_grad():
            margins = self.margins()
        return Computed(self.step(apply=False), margins)

    def step(self, apply: bool = True) -> float:
        """One update, or, to warm up, all of it but the change of the weights; returns the loss."""
        loss = self.accumulate()
        clip([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def path_of(name: str) -> str:
    """A parameter's path in the backbone, whether ours or PEFT's model names it."""
    return name.removeprefix("backbone.").removeprefix(PEFT_PREFIX).removesuffix(".default.weight")


@torch.no_grad()
def moved(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Give the trained weights values that are not the reference's, and the same ones in every arm.

    Noise of NOISE / sqrt(inputs), whatever the width, is added to weights that all arms start with. Adapters, which each
    implementation draws for itself, become such noise, both A and B. What is drawn depends on the weight's path alone, not
    on the order; tied weights are there under one name.
    """
    for name, p in parameters.items():
        if not p.requires_grad:
            continue
        path, values = path_of(name), p.to_local() if isinstance(p, DTensor) else p  # one process has them all
        generator = torch.Generator(values.device).manual_seed(zlib.crc32(path.encode()))
        noise = NOISE / values.shape[-1] ** 0.5 * torch.randn(values.shape, generator=generator, device=values.device)
        if path.endswith((".lora_A", ".lora_B")):
            values.copy_(noise)
        else:
            values += noise.to(values)


class Ours(Arm):
    """A step of this project, by the function that its training loop calls."""

    def __init__(self, name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        self.config = config_of(name, args)
        self.model = training_model(self.config, load_tokenizer(self.config.model), USERS, choose_device("auto"))
        self.comparisons = comparisons
        started = time.perf_counter()
        self.reference = score(self.model, comparisons, None, self.config.optim.micro_batch_size)
        self.reference_s = time.perf_counter() - started
        moved(named_parameters(self.model))
        self.optimizer = make_optimizer(self.config, self.model, 2 * args.rounds)  # on a GPU there are steps not timed
        if self.model.device.type == "cpu" and name in OURS:  # as train.py does
            self.optimizer.keep_gradients()
        self.model.train()

    def accumulate(self) -> float:
        update = range(len(self.comparisons))
        self.optimizer.catch_up()
        return accumulate_gradients(self.config, self.model, self.comparisons, self.reference, update).loss

    def margins(self) -> list[float]:
        update, found = range(len(self.comparisons)), {}
        for items in update_parts(self.config, self.model, self.comparisons, update):
            _, margins_B = part_loss(self.config, self.model, self.comparisons, self.reference, items, len(update))
            found |= {(item.branch, item.index): margin for item, margin in zip(items, margins_B.tolist())}
        return [found[key] for key in sorted(found)]


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
            bos_2SD, rest_2TD = embeddings_2TD.tensor_split([self.model.user_slot], dim=1)
            embeddings_2TD, vectors = torch.cat([bos_2SD, user_2UD, rest_2TD], dim=1), user_2UD.shape[1]
            real_2T = torch.cat([real_2T.new_ones(2, vectors), real_2T], dim=1)
        logits_2TV = backbone(inputs_embeds=embeddings_2TD, attention_mask=real_2T, use_cache=False).logits
        start = vectors + len(c.prefix)
        sums = []
        for row, y in enumerate((c.chosen, c.rejected)):
            log_p = logits_2TV[row].float().log_softmax(dim=-1)[start - 1 : start - 1 + len(y)]
            sums.append(log_p.gather(1, torch.tensor(y, device=device)[:, None]).sum())
        return torch.stack(sums)

    def branch_margins(self) -> Iterator[torch.Tensor]:
        """beta h of each comparison, (), in its user's branch and in the generic one by turns."""
        for c in self.comparisons:
            reference = None
            for user in (c.user, 0):
                if reference is None or not self.shares_reference:
                    with torch.no_grad():
                        reference = self.log_probs(self.reference_model, c, None)
                ratio = self.log_probs(self.model.backbone, c, user) - reference
                yield 0.1 * (ratio[0] - ratio[1])

    def accumulate(self) -> float:
        total = 0.0
        for margin in self.branch_margins():
            loss = -torch.nn.functional.logsigmoid(margin) * 0.5 / len(self.comparisons)
            loss.backward()
            total += loss.item()
        return total

    def margins(self) -> list[float]:
        found = [margin.item() for margin in self.branch_margins()]
        return found[1::2] + found[::2]


class TRL(Arm):
    """A step of DPOTrainer: its collator, its training_step, and AdamW as here."""

    def __init__(self, batch_size: int, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        name = str(Path(args.model).expanduser())
        device = choose_device("auto")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[args.dtype])
        peft = None
        if args.lora:
            from peft import LoraConfig

            alpha = config_of("prlhf", args).lora.alpha
            peft = LoraConfig(r=args.lora, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer_config = DPOConfig(
            output_dir=tempfile.mkdtemp(), max_length=None, use_cpu=device == "cpu",
            bf16=computing_type(args) == "bfloat16", gradient_checkpointing=args.checkpointing, precompute_ref_log_probs=True,
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
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)  # bf16: autocast, and float32 logits
        self.comparisons, self.device = comparisons, device
        started = time.perf_counter()
        self.batches = self.with_reference(batch_size)
        self.reference_s = time.perf_counter() - started
        moved(dict(self.trainer.model.named_parameters()))
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)
        self.trainer.optimizer = self.optimizer

    def collated(self, comparisons: Sequence[EncodedComparison]) -> dict[str, torch.Tensor]:
        """TRL's batch of some comparisons, without its reference."""
        rows = [{"prompt_ids": c.prefix, "chosen_ids": c.chosen, "rejected_ids": c.rejected} for c in comparisons]
        return {name: t.to(self.device) for name, t in self.trainer.data_collator(rows).items()}

    def with_reference(self, size: int) -> list[dict[str, torch.Tensor]]:
        """The comparisons in TRL's batches of `size`, with TRL's reference log-probs."""
        batches = []
        for start in range(0, len(self.comparisons), size):
            batch = self.collated(self.comparisons[start : start + size])
            reference = self.trainer.compute_ref_log_probs(self.model, batch)
            batches.append(batch | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference)))
        return batches

    def accumulate(self) -> float:
        self.trainer.current_gradient_accumulation_steps = len(self.batches)
        return sum(self.trainer.training_step(self.model, dict(batch)).item() for batch in self.batches)

    def margins(self) -> list[float]:
        """From the trainer's loss of each comparison alone, log(1 + exp(-margin))."""
        names, found = ("ref_chosen_logps", "ref_rejected_logps"), []
        references = zip(*(torch.cat([batch[name] for batch in self.batches]).split(1) for name in names))
        for c, reference in zip(self.comparisons, references):
            batch = self.collated([c]) | dict(zip(names, reference))
            loss = self.trainer.compute_loss(self.model, batch).double()
            found.append(-torch.expm1(loss).log().item())
        return found


def check_equal(computed: dict[str, Computed], dtype: str) -> None:
    """All plain DPO arms compute the same, and all P-DPO arms; else the times would compare different things.

    SystemExit where the update's loss or any reward margin of one arm is further from another's than TOLERANCE of the
    largest margin, or is not finite. The margins are what tells arms apart: a loss is near log 2 whatever the weights are.
    """
    plain = {label: found for label, found in computed.items() if is_plain(label)}
    personal = {label: found for label, found in computed.items() if label not in plain}
    for group in (plain, personal):
        if not group:
            continue
        found = torch.tensor([[loss, *margins] for loss, margins in group.values()], dtype=torch.float64)
        allowed = TOLERANCE[dtype] * found[0, 1:].abs().max()
        apart = (found - found[0]).abs().max()
        if not apart <= allowed:  # neither is it where one is not a number
            raise SystemExit(f"the arms do not compute the same: {apart:.1e} apart, expected {allowed:.1e}: {group}")


def is_plain(label: str) -> bool:
    """Whether an arm is plain DPO, not P-DPO."""
    return label == "prlhf" or label.startswith("trl")


def made(label: str, args: argparse.Namespace, comparisons: list[EncodedComparison]) -> Arm:
    """The arm of a label: "trl, batch 2" is the trainer with that batch size."""
    name, _, size = label.partition(", batch ")
    if name in ("rows", "rows once"):
        return Rows(name, args, comparisons)
    if name != "trl":
        return Ours(name, args, comparisons)
    return TRL(int(size), args, comparisons)


class WorkerDied(Exception):
    """A worker's process is no more; what it said is on stderr."""


class Worker:
    """An arm in a process of its own, which does something only when it is asked to."""

    MARK = "answer: "

    def __init__(self, label: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", label],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """What the process says next."""
        for line in self.process.stdout:
            if line.startswith(self.MARK):
                return json.loads(line[len(self.MARK) :])
        raise WorkerDied

    def ask(self, what: str) -> dict[str, Any]:
        """ "start": reference_s; "check": loss, margins (`Computed`); "step": seconds, peak_gb."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(what + "\n")
        return self.answer()

    def end(self) -> None:
        """Let the process end, and wait for that."""
        self.process.communicate()


def work(label: str, args: argparse.Namespace, comparisons: list[EncodedComparison]) -> None:
    """A worker's loop: a line in, an answer out."""
    cuda = torch.cuda.is_available()
    for line in sys.stdin:
        what = line.strip()
        if what == "start":
            arm = made(label, args, comparisons)
            found = {"reference_s": arm.reference_s}
        elif what == "check":
            found = arm.computed()._asdict()
        else:
            if cuda:
                arm.step()  # takes again the memory that was given back
                torch.cuda.synchronize()
            started = time.perf_counter()
            arm.step()
            if cuda:
                torch.cuda.synchronize()
            found = {"seconds": time.perf_counter() - started, "peak_gb": peak_memory_gb()}
        if cuda:
            torch.cuda.empty_cache()
        print(Worker.MARK + json.dumps(found), flush=True)


@dataclass
class Measured:
    """What was found of an arm."""

    reference_s: float
    computed: Computed | None = None
    seconds: list[float] = field(default_factory=list)
    peak_gb: float = math.nan


def measure(labels: Sequence[str], rounds: int, dtype: str) -> dict[str, Measured]:
    """The arms side by side: all start, all are checked, and in each round each takes its step.

    One of TRL's batch sizes that dies of it (too little memory) is left out.
    """
    workers = {label: Worker(label) for label in labels}
    found: dict[str, Measured] = {}
    for what in ("start", "check", *["step"] * rounds):
        for label in list(workers):
            try:
                answer = workers[label].ask(what)
            except WorkerDied:
                if not label.startswith("trl"):
                    raise SystemExit(f"the worker of {label} died; its messages are above") from None
                print(f"{label} is left out: its worker died; the messages are above", flush=True)
                del workers[label]
                found.pop(label, None)
                continue
            if what == "start":
                found[label] = Measured(**answer)
            elif what == "check":
                found[label].computed = Computed(**answer)
            else:
                found[label].seconds.append(answer["seconds"])
                found[label].peak_gb = answer["peak_gb"]
        if what == "check":
            check_equal({label: arm.computed for label, arm in found.items()}, dtype)
    for worker in workers.values():
        worker.end()
    return found


def arguments(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/prlhf/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", default="tldr", choices=SHAPES)
    parser.add_argument("--comparisons", type=int, default=4, help="per update")
    parser.add_argument("--micro-batch", type=int, default=1, help="trees per forward pass")
    parser.add_argument("--trl-batch", type=int, nargs="+", default=[1, 2, 4], help="sizes that divide --comparisons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 is full fine-tuning")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--arms", nargs="+", default=[*ARMS, "trl"], choices=[*ARMS, "trl"])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for the prlhf arms")
    parser.add_argument("--one-at-a-time", action="store_true", help="where the arms' models have no room together")
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
        with surroundings(args.worker, args):
            work(args.worker, args, comparisons)
        return

    dtype, found = computing_type(args), {}
    for group in [[label] for label in labels(args)] if args.one_at_a_time else [labels(args)]:
        found |= measure(group, args.rounds, dtype)
    check_equal({label: arm.computed for label, arm in found.items()}, dtype)
    rate = matmul_rate(AutoConfig.from_pretrained(str(Path(args.model).expanduser())).hidden_size, DTYPES[dtype])
    report(args, comparisons, found, Machine(device_name(), rate, dtype, versions()))


class Machine(NamedTuple):
    """What it was measured on, and with which packages (None: not installed)."""

    device: str
    matmul_rate: float  # FLOPs a second
    dtype: str  # of these FLOPs
    versions: dict[str, str | None]


def device_name() -> str:
    """The GPU's name, or the processor's with the threads that torch takes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """The version of each of PACKAGES."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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
    return {name: (plain if is_plain(name) else personal) / (time_taken * rate) for name, time_taken in seconds.items()}


def predicted_gb(name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]) -> float:
    """What the dry run says that an arm's memory will be at its peak, in 1e9 bytes, counted as `peak_memory_gb` counts."""
    config, device = config_of(name, args), choose_device("auto")
    memory = predict(config, load_tokenizer(config.model), training_data(comparisons, USERS), device).memory
    return (memory.peak - (CUDA_CONTEXT if device == "cuda" else 0)) / 1e9


def report(
    args: argparse.Namespace, comparisons: list[EncodedComparison], found: dict[str, Measured], machine: Machine
) -> None:
    """Print the table, and write it as JSON where that is asked for."""
    medians = {name: statistics.median(arm.seconds) for name, arm in found.items()}
    trl = {name: t for name, t in medians.items() if name.startswith("trl")}
    best = min(trl, key=lambda name: trl[name]) if trl else None
    useful = sum(c.length for c in comparisons)
    shares = shares_of_rate(args, comparisons, medians, machine.matmul_rate)
    rows = []
    for name, median in medians.items():
        arm = found[name]
        rows.append(
            {
                "arm": name,
                "comparisons_per_s": len(comparisons) / median,
                "useful_tokens_per_s": useful / median,
                "slowest_over_fastest_round": max(arm.seconds) / min(arm.seconds),
                "times_trl": medians[best] / median if best else None,
                "memory_gb": arm.peak_gb,
                "predicted_gb": predicted_gb(name, args, comparisons) if name in OURS else None,
                "memory_over_trl": arm.peak_gb / found[best].peak_gb if best else None,
                "reference_in_steps": arm.reference_s / median,
                "share_of_matmul_rate": shares[name],
                "loss": arm.computed.loss,
                "margins": arm.computed.margins,
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
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine.versions.items())
    rate = f"{machine.matmul_rate / 1e12:.3f} TFLOP/s, {machine.dtype}"
    print(f"\nmatmul rate: {rate}, measured in this run, while no arm worked\n{machine.device}; {packages}")
    if args.out:
        seconds = {name: arm.seconds for name, arm in found.items()}
        written = {"arguments": vars(args), **machine._asdict(), "seconds": seconds, "rows": rows}
        Path(args.out).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
