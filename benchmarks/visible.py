"""CPU time of attention over what a tree's mask leaves visible, against torch's attention over all pairs.

    OMP_NUM_THREADS=1 python benchmarks/visible.py [--rounds 5]

Forward and backward passes of attention alone, heads of SmolLM2-135M (nine of 64, three key heads), by turns in each round;
medians of the ratios. The rows are those of random trees of the named lengths (`prlhf.batch.trees.lay_out`).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prlhf.backbone import visible
from prlhf.batch.trees import Layout, Reading, lay_out, tree_mask
from prlhf.errors import run_command

BLOCKS = (64, 128, 256)
HEADS, KEY_HEADS, WIDTH = 9, 3, 64


def readings(prompts: int, prompt: int, tail: int, responses: list[int], users: int) -> list[Reading]:
    """Each of the users reads each response to each prompt; lengths in tokens."""
    token = iter(range(10**9))

    def text(length: int) -> tuple[int, ...]:
        return tuple(next(token) for _ in range(length))

    found = []
    for _ in range(prompts):
        prefix, answers = text(prompt), [text(length) for length in responses]
        found += [Reading(user, prefix, answer, tail) for user in range(users) for answer in answers]
    return found


SHAPES = {
    "chat, prompt_end, both branches": ("prompt_end", readings(1, 250, 5, [200, 200], 2)),
    "chat, before_prompt": ("before_prompt", readings(1, 250, 5, [200, 200], 1)),
    "TL;DR, prompt_end, both branches": ("prompt_end", readings(1, 300, 0, [35, 35], 2)),
    "TL;DR, before_prompt": ("before_prompt", readings(1, 300, 0, [35, 35], 1)),
    "TL;DR, before_prompt, four trees": ("before_prompt", readings(4, 300, 0, [35, 35], 1)),
    "six voters, six statements each, four rows": ("prompt_end", readings(4, 40, 5, [20] * 6, 6)),
}


def passes(attend: Callable[..., Tensor], inputs: Sequence[Tensor], mask: Tensor, gradient: Tensor) -> None:
    """A forward and a backward pass of attention."""
    torch.autograd.grad(attend(*inputs, mask), inputs, gradient)


def seconds(work: Callable[[], None]) -> float:
    """CPU time of work()."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """The table: pairs of positions that are visible, and time over that of all pairs, by size of block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| rows | positions | pairs visible |" + "".join(f" blocks of {size} |" for size in BLOCKS))
    print("|---" * (3 + len(BLOCKS)) + "|")
    for name, (place, some) in SHAPES.items():
        batch = lay_out(some, Layout("tree", vectors=10, slot=1, place=place), tree_tokens=750)
        seen = tree_mask(batch.seen_until_RT)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        R, T = batch.seen_until_RT.shape
        generator = torch.Generator().manual_seed(0)
        q, k, v, gradient = (
            torch.randn(R, heads, T, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
        )
        inputs = [t.requires_grad_() for t in (q, k, v)]

        dense = partial(passes, partial(scaled_dot_product_attention, enable_gqa=True), inputs, mask, gradient)
        by_blocks = partial(passes, partial(visible.visible_attention, scale=None), inputs, mask, gradient)
        ratios = []
        for size in BLOCKS:
            visible.BLOCK, mask.blocks = size, None
            seconds(by_blocks), seconds(dense)  # once without looking at the clock
            ratios.append(statistics.median(seconds(by_blocks) / seconds(dense) for _ in range(rounds)))
        cells = [name, f"{R} x {T}", f"{seen.float().mean():.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_command(main)
