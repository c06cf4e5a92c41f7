"""The ways to take a training step that benchmarks/step.py and benchmarks/breakdown.py compare.

prlhf      plain DPO (uniform user, T_u = 0); reference computed before, once
prlhf pdpo P-DPO, both branches (individual users, T_u = 10, alpha 0.5); reference as above
rows       the same P-DPO as one would write it, DPO's loss in each branch: both responses as rows of their own, the model's
           logits at all positions, their reference computed in the step
rows once  the same, but for a reference that both branches share
trl        TRL's DPOTrainer with its defaults, but for: precision as here (a model in float32 that computes in bfloat16 where
           model.compute_dtype says so), precomputed reference, dropout and checkpointing as here; one arm for each
           per-device batch size, of which the fastest counts. On a GPU Liger's kernels where installed

The first two do as train.py does, on a GPU with deterministic kernels (--set deterministic=false turns these off).
"""

import argparse
import contextlib
import importlib.util
import os
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from torch.distributed.tensor import DTensor

from prlhf.backbone.loading import choose_device, load_tokenizer, load_weights
from prlhf.backbone.lora import PEFT_PREFIX
from prlhf.backbone.toys import DTYPES
from prlhf.batch.tokens import EncodedComparison
from prlhf.config import load as config_module
from prlhf.config.keys import Config
from prlhf.parallel.ranks import process_group
from prlhf.parallel.shard import training_model
from prlhf.parallel.tensors import named_parameters
from prlhf.score.score import score
from prlhf.train.loop import reproducible
from prlhf.train.optimizer import Optimizers, clip, make_optimizer
from prlhf.train.plan import update_parts
from prlhf.train.step import accumulate_gradients, part_loss

P_DPO = ("user_model.kind=individual", "user_model.tokens=10", "loss.alpha=0.5")
PLAIN = ("user_model.kind=uniform", "user_model.tokens=0")
ARMS = {"prlhf": PLAIN, "prlhf pdpo": P_DPO, "rows": P_DPO, "rows once": P_DPO}
OURS = ("prlhf", "prlhf pdpo")  # the arms that do as train.py does
USERS = 4
NOISE = 0.5  # by how much of its input a layer's output is moved, so that the policy's margins are not 0


def config_of(name: str, args: argparse.Namespace) -> Config:
    """The config of one of our arms."""
    keys = [f"model.name={args.model}", f"optim.micro_batch_size={args.micro_batch}", f"lora.rank={args.lora}"]
    keys += [
        f"model.recompute={'blocks' if args.checkpointing else 'cheap'}",
        f"model.dtype={args.dtype}",
        "optim.lr=1e-6",
    ]
    keys += [f"optim.batch_size={args.comparisons}", f"evaluate.batch_size={args.micro_batch}"]
    return config_module.load_config(None, [*keys, *ARMS[name], *args.set])


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
