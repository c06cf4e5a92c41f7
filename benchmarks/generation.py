"""Tokens per second of generation: ours, ours as it was, and Hugging Face's generate, for the same rows.

    pip install -c constraints.txt -e . && make model
    python benchmarks/generation.py [--shape short | tldr] [--prompts 8] [--users 32] [--new-tokens 64] [--set key=value ...]

Every prompt, of random tokens, is answered for every user, greedily. The arms take turns within a run, and medians over the
rounds are compared, since separate runs on a shared machine differ by up to a factor of two:

prlhf     `prlhf.generate.decode.generate`
former    what that was: each row reads its own prompt, the cache is copied for every token, adapters are separate products, and
          finished rows go on until the last one ends
hf        Hugging Face's generate with its own attention (SDPA) and cache, on the same embeddings, left-padded, with the same
          adapters as separate products, as PEFT has them

Where other work shares the cores, CPU time tells arms apart better, with one thread (OMP_NUM_THREADS=1).

All arms take the same batches. Tokens are those of the responses: what a row computes after its end counts for nothing. Arms
may differ in near ties, so the share of equal responses is told: greedy decoding of random prompts has some.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from shapes import SHAPES
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from prlhf.backbone.families import embeddings, head
from prlhf.backbone.loading import choose_device, load_backbone, load_tokenizer
from prlhf.backbone.lora import lora_layers
from prlhf.config import load as config_module
from prlhf.errors import run_command
from prlhf.generate.decode import Decoding, Request, batches, generate, read_prompts
from prlhf.method.build import build_model
from prlhf.method.models import PersonalizedLM

TAIL = 5  # tokens behind a prompt's content, as many as ChatML puts there


class Task(NamedTuple):
    """What every arm does."""

    model: PersonalizedLM
    requests: list[Request]
    ends: set[int]
    new_tokens: int
    batch_size: int

    def in_batches(self) -> list[list[Request]]:
        """The requests, as generate.py batches them."""
        return [[self.requests[n] for n in batch] for batch in batches(self.requests, self.batch_size)]


def rows_of(model: PersonalizedLM, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """What the backbone reads of each request, (B, T, D), padded on the left, and the padding's lengths (B,)."""
    _, contexts = read_prompts(model, requests)
    rows = [torch.cat([context.shared_TD, context.own_SD]) for context in contexts]
    padding = [max(map(len, rows)) - len(row) for row in rows]
    padded = torch.stack([pad(row, (0, 0, left, 0)) for row, left in zip(rows, padding)])
    return padded, torch.tensor(padding, device=model.device)


def until_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """The tokens before the first one of `ends`."""
    return list(tokens[: next((n for n, token in enumerate(tokens) if token in ends), len(tokens))])


@torch.inference_mode()
def ours(task: Task) -> list[list[int]]:
    """The responses of `generate`."""
    decoding = Decoding(max_new_tokens=task.new_tokens)
    return [r.ids for rows in task.in_batches() for r in generate(task.model, rows, task.ends, decoding)]


@torch.inference_mode()
def former(task: Task) -> list[list[int]]:
    """The responses of the decoder that shared nothing."""
    found, model = [], task.model
    for requests in task.in_batches():
        embeddings_BTD, padding_B = rows_of(model, requests)
        cache, columns = DynamicCache(), embeddings_BTD.shape[1]
        column_T = torch.arange(columns, device=model.device)
        real_BT = column_T >= padding_B[:, None]
        mask_BST = ((column_T[:, None] >= column_T) & real_BT[:, None]) | (column_T[:, None] == column_T)
        positions_BS = (column_T - padding_B[:, None]).clamp(min=0)
        drawn: list[Tensor] = []
        ended_B = torch.zeros(len(requests), dtype=torch.bool)
        while True:
            hidden_BD = model.states(embeddings_BTD, mask_BST[:, None], positions_BS, cache)[:, -1]
            drawn.append(head(model.backbone).logits(hidden_BD).argmax(dim=-1))
            ended_B |= torch.tensor([token in task.ends for token in drawn[-1].tolist()])
            if ended_B.all() or len(drawn) == task.new_tokens:
                break
            embeddings_BTD = embeddings(model.backbone, drawn[-1][:, None])
            positions_BS = (columns - padding_B)[:, None]
            columns += 1
            mask_BST = (torch.arange(columns, device=model.device) >= padding_B[:, None])[:, None]
        found += [until_end(row, task.ends) for row in torch.stack(drawn, dim=1).tolist()]
    return found


class HuggingFace:
    """Hugging Face's generate, of a copy of the backbone with Hugging Face's attention."""

    def __init__(self, task: Task):
        self.backbone = copy.deepcopy(task.model.backbone)
        self.backbone.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def __call__(self, task: Task) -> list[list[int]]:
        found = []
        for requests in task.in_batches():
            embeddings_BTD, padding_B = rows_of(task.model, requests)
            real_BT = torch.arange(embeddings_BTD.shape[1], device=padding_B.device) >= padding_B[:, None]
            tokens = self.backbone.generate(
                inputs_embeds=embeddings_BTD, attention_mask=real_BT.long(), max_new_tokens=task.new_tokens, do_sample=False,
                eos_token_id=sorted(task.ends) or None, pad_token_id=0,
            )  # fmt: skip
            found += [until_end(row, task.ends) for row in tokens.tolist()]
        return found


def make_task(args: argparse.Namespace) -> Task:
    """The model, with adapters that do something, and the requests."""
    keys = (f"model.name={args.model}", f"lora.rank={args.lora}", "user_model.kind=individual", *args.set)
    config = config_module.load_config(None, keys)
    tokenizer = load_tokenizer(config.model)
    model = build_model(config, tokenizer, args.users, load_backbone(config.model, tokenizer, 0)).eval()
    model.to(choose_device("auto"))
    generator, rng = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    with torch.no_grad():
        for layer in lora_layers(model.backbone).values():
            layer.lora_B.copy_(0.01 * torch.randn(layer.lora_B.shape, generator=generator))
        for table in model.user_model.parameters():
            table += 0.02 * torch.randn(table.shape, generator=generator).to(table)
    requests = []
    for _ in range(args.prompts):
        ids = [rng.randrange(len(tokenizer)) for _ in range(max(2, round(rng.gauss(*SHAPES[args.shape].prompt))))]
        requests += [Request(ids, user, "", TAIL) for user in range(1, args.users + 1)]
    ends = set(range(0, len(tokenizer), args.end_every)) if args.end_every else set()
    return Task(model, requests, ends, args.new_tokens, args.batch_size)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/prlhf/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", default="short", choices=SHAPES, help="of the prompts")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapters; 0: none")
    parser.add_argument(
        "--end-every", type=int, default=0, help="tokens whose id is a multiple end a response; 0: none does"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--out", help="also write the seconds as JSON")
    return parser.parse_args()


def main() -> None:
    """Time the arms in turn, and print tokens per second over those of Hugging Face."""
    args = arguments()
    task = make_task(args)
    arms = {"prlhf": ours, "former": former, "hf": HuggingFace(task)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in arms}
    responses: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            responses[name] = arm(task)  # as lists, so a GPU has finished
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name].append(time.process_time() - cpu_started)
    rates = {name: sum(map(len, responses[name])) / statistics.median(seconds[name]) for name in arms}
    cpu_rates = {name: sum(map(len, responses[name])) / statistics.median(cpu_seconds[name]) for name in arms}
    columns = ("tokens/s over hf", "prlhf over it", "by CPU time", "tokens", "equal to hf's", "slowest round / fastest")
    print("| " + " | ".join(("arm", *columns)) + " |")
    print("|---" * 7 + "|")
    for name in arms:
        equal = sum(map(list.__eq__, responses[name], responses["hf"])) / len(task.requests)
        spread = max(seconds[name]) / min(seconds[name])
        cells = [name, f"{rates[name] / rates['hf']:.2f}", f"{rates['prlhf'] / rates[name]:.2f}"]
        cells += [f"{cpu_rates['prlhf'] / cpu_rates[name]:.2f}"]
        cells += [f"{sum(map(len, responses[name]))}", f"{equal:.2f}", f"{spread:.2f}"]
        print("| " + " | ".join(cells) + " |")
    if args.out:
        Path(args.out).write_text(
            json.dumps({"arguments": vars(args), "seconds": seconds, "cpu_seconds": cpu_seconds}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_command(main)
