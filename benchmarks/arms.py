"""The arms that benchmarks/step.py and benchmarks/breakdown.py compare: ways to take one training step.

prlhf      plain DPO (uniform user, T_u = 0); the reference is computed once, before the steps
prlhf pdpo P-DPO with both branches (individual users, T_u = 10, alpha 0.5); reference as above
prlhf pdpo prompt_end
           as prlhf pdpo, with the users behind the prompt, which both branches then share
rows       the same P-DPO in the obvious way: DPO's loss for each branch, the two responses as separate rows, the model's logits
           at all positions, the reference computed in the step for each branch
rows once  as rows, but both branches share one reference
trl        TRL's DPOTrainer with its defaults, except: precision as here (a float32 model that computes in bfloat16 if
           model.compute_dtype says so), reference precomputed, dropout and checkpointing as here. One arm per per-device batch
           size, of which the fastest counts. On a GPU with Liger's kernels if they are installed

The first three do what train.py does, on a GPU with deterministic kernels (--set deterministic=false turns them off).
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
from prlhf.errors import expanded
from prlhf.parallel.ranks import process_group
from prlhf.parallel.shard import training_model
from prlhf.parallel.tensors import named_parameters
from prlhf.score.score import score
from prlhf.score.task import Task
from prlhf.train.optimizer import Optimizers, clip, make_optimizer
from prlhf.train.plan import plan_update
from prlhf.train.process import reproducible
from prlhf.train.step import accumulate_gradients, part_loss

P_DPO = ("user_model.kind=individual", "user_model.tokens=10", "loss.alpha=0.5")
PLAIN = ("user_model.kind=uniform", "user_model.tokens=0")
BEHIND = "prlhf pdpo prompt_end"
ARMS = {
    "prlhf": PLAIN, "prlhf pdpo": P_DPO, BEHIND: (*P_DPO, "user_model.place=prompt_end"), "rows": P_DPO, "rows once": P_DPO,
}  # fmt: skip
OURS = ("prlhf", "prlhf pdpo", BEHIND)  # the arms that do what train.py does
USERS = 4
NOISE = 0.5  # change of a layer's output, relative to its input; without it the policy's margins are 0


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
    """The type in which all arms compute matrix products."""
    model = config_of("prlhf", args).model
    return model.compute_dtype or model.dtype


@contextlib.contextmanager
def surroundings(label: str, args: argparse.Namespace) -> Iterator[None]:
    """The context of an arm: a process group if model.compute_dtype needs one; reproducible kernels, as in train.py, for ours."""
    device = choose_device("auto")
    with contextlib.ExitStack() as stack:
        if label in OURS:
            reproducible(config_of(label, args), device)
            stack.callback(torch.use_deterministic_algorithms, False)
        if label in ARMS:
            stack.enter_context(process_group(config_of(label, args), device))
        yield


class Computed(NamedTuple):
    """An update's loss, and the reward margin beta h of each comparison. P-DPO has the margins of the generic branch first,
    then those of the user branch."""

    loss: float
    margins: list[float]


class Arm(ABC):
    """One way to take a training step."""

    optimizer: torch.optim.Optimizer | Optimizers
    reference_s = 0.0  # seconds that the reference took before the first step

    @abstractmethod
    def accumulate(self) -> float:
        """Forward and backward passes over all comparisons; returns the loss."""

    @abstractmethod
    def margins(self) -> list[float]:
        """The reward margins of `Computed`, by the functions that `accumulate` calls."""

    def computed(self) -> Computed:
        """The loss and margins; the weights stay as they are."""
        with torch.no_grad():
            margins = self.margins()
        return Computed(self.step(apply=False), margins)

    def step(self, apply: bool = True) -> float:
        """One update; returns the loss. apply=False: all of it except the change of the weights."""
        loss = self.accumulate()
        clip([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def path_of(name: str) -> str:
    """A parameter's path in the backbone, from its name in our model or in PEFT's."""
    return name.removeprefix("backbone.").removeprefix(PEFT_PREFIX).removesuffix(".default.weight")


@torch.no_grad()
def moved(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Move the trained weights away from the reference's, to the same values in every arm.

    Adds noise of size NOISE / sqrt(inputs) to weights that all arms start with. Adapters, which each implementation
    initialises in its own way, are replaced by such noise, both A and B. The noise depends on the weight's path alone, not
    on the order; tied weights occur under one name.
    """
    for name, p in parameters.items():
        if not p.requires_grad:
            continue
        path, values = (
            path_of(name),
            p.to_local() if isinstance(p, DTensor) else p,
        )  # there is one process, so all are local
        generator = torch.Generator(values.device).manual_seed(zlib.crc32(path.encode()))
        noise = NOISE / values.shape[-1] ** 0.5 * torch.randn(values.shape, generator=generator, device=values.device)
        if path.endswith((".lora_A", ".lora_B")):
            values.copy_(noise)
        else:
            values += noise.to(values)


class Ours(Arm):
    """A step of this project, taken by the function that the training loop calls."""

    def __init__(self, name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        self.config = config_of(name, args)
        self.model = training_model(self.config, load_tokenizer(self.config.model), USERS, choose_device("auto"))
        self.comparisons = comparisons
        started = time.perf_counter()
        self.reference = score(self.model, comparisons, None, self.config.optim.micro_batch_size)
        self.reference_s = time.perf_counter() - started
        moved(named_parameters(self.model))
        self.optimizer = make_optimizer(
            self.config, self.model, 2 * args.rounds
        )  # on a GPU half the steps are not timed
        if self.model.device.type == "cpu" and name in OURS:  # as train.py does
            self.optimizer.keep_gradients()
        self.model.train()

    def accumulate(self) -> float:
        update = range(len(self.comparisons))
        self.optimizer.catch_up()
        return accumulate_gradients(Task(self.config, self.model, self.comparisons, self.reference), update).loss

    def margins(self) -> list[float]:
        update, found = range(len(self.comparisons)), {}
        task = Task(self.config, self.model, self.comparisons, self.reference)
        for part in plan_update(task, update):
            _, margins_B = part_loss(task, part, len(update))
            found |= dict(zip(zip(part.branches, part.indices), margins_B.tolist()))
        return [found[key] for key in sorted(found)]


class Rows(Ours):
    """P-DPO without any of this project's savings."""

    def __init__(self, name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        super().__init__(name, args, comparisons)
        self.shares_reference = name == "rows once"
        config = self.config.model
        self.reference_model = load_weights(config.name, config.dtype).to(
            self.model.device
        )  # the weights before the first step

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
        """beta h (a scalar) of each comparison: the user branch, then the generic one."""
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
    """A step of DPOTrainer: its collator and its training_step, with our AdamW settings."""

    def __init__(self, batch_size: int, args: argparse.Namespace, comparisons: list[EncodedComparison]):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        name = str(expanded(args.model))
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
        """TRL's batch of some comparisons, without reference log-probs."""
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
        """Recovered from the trainer's loss log(1 + exp(-margin)) of each comparison."""
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
    """The arm of a label; "trl, batch 2" is the trainer with batch size 2."""
    name, _, size = label.partition(", batch ")
    if name in ("rows", "rows once"):
        return Rows(name, args, comparisons)
    if name != "trl":
        return Ours(name, args, comparisons)
    return TRL(int(size), args, comparisons)
