"""Random comparisons with the lengths of real ones, models of real shapes, the FLOPs of an update, and its positions:

    python benchmarks/shapes.py

counts the positions that P-DPO with both branches computes a comparison, with the user vectors at each place.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PretrainedConfig

from prlhf.backbone.families import blocks
from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch.datasets import Dataset, TrainingData
from prlhf.batch.tokens import EncodedComparison, EncodingReport
from prlhf.config import load as config_module
from prlhf.data.users import UserIndex
from prlhf.method.build import build_model
from prlhf.score.task import Task
from prlhf.train.plan import plan_update

MODELS = {
    "GPT-J 6B": GPTJConfig(),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
    ),
}  # fmt: skip


class Shape(NamedTuple):
    """Mean and standard deviation of prompt and response lengths, in tokens."""

    prompt: tuple[int, int]
    response: tuple[int, int]


SHAPES = {
    "tldr": Shape((300, 100), (35, 12)),
    "chat": Shape((250, 0), (200, 80)),
    "short": Shape((40, 10), (12, 4)),
}


def random_comparisons(shape: str, count: int, vocabulary: int, users: int, seed: int = 0) -> list[EncodedComparison]:
    """`count` comparisons of uniformly random tokens, from users 1 .. `users` in turn; lengths are at least 2."""
    rng = random.Random(seed)

    def ids(length: tuple[int, int]) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(max(2, round(rng.gauss(*length))))]

    found = []
    for i in range(count):
        prompt = ids(SHAPES[shape].prompt)
        chosen, rejected = ids(SHAPES[shape].response), ids(SHAPES[shape].response)
        found.append(EncodedComparison(prompt, prompt, chosen, rejected, 1 + i % users))
    return found


def positions(comparisons: Sequence[EncodedComparison], *keys: str) -> float:
    """Positions that an update of P-DPO computes a comparison, without padding: counted in the rows that training lays out, by
    a model of one narrow block. keys: of the config, beside individual users of T_u = 10."""
    small = ("model.family=llama", "model.layers=1", "model.width=16", "model.heads=1", "user_model.tokens=10")
    config = config_module.load_config(None, [*small, *keys])
    task = Task(config, build_model(config, byte_tokenizer(), max(c.user for c in comparisons)), comparisons)
    parts = plan_update(task, range(len(comparisons)))
    batches = (task.model.collate([comparisons[i] for i in part.indices], part.users) for part in parts)
    return sum(int((batch.trees_RT > 0).sum()) for batch in batches) / len(comparisons)


def training_data(comparisons: list[EncodedComparison], users: int) -> TrainingData:
    """The comparisons as training takes them, with users user0, user1, ..."""
    index = UserIndex([f"user{i}" for i in range(users)])
    return TrainingData(index, Dataset(comparisons, [], EncodingReport(len(comparisons))), None)


def useful_flops(
    config: PretrainedConfig, comparisons: Sequence[EncodedComparison], vectors: int, branches: int, lora: bool
) -> int:
    """FLOPs in matrix products that one update needs at least: each prompt once per branch, logits at response positions only.

    Forward, for a tree of P prefix positions (T_u = `vectors` included) and responses of y1 and y2 tokens, with W weights in
    the blocks' linear layers, L layers, width D and vocabulary V (a multiplication and an addition are 2 FLOPs):

        2 W (P + y1 + y2) + 2 V D (y1 + y2) + 4 L D (P (P + 1) / 2 + sum_y [y P + y (y + 1) / 2])

    Backward: twice as much; with LoRA once for products with frozen weights, which need no weight gradient. Adapters, the
    precomputed reference, checkpointing, padding and the masked half of attention are not counted.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = blocks(model)
    W = sum(m.weight.numel() for block in layers for m in block.modules() if isinstance(m, torch.nn.Linear))
    D, V = config.hidden_size, config.vocab_size
    weights = attention = 0
    for c in comparisons:
        P, ys = vectors + len(c.prefix), (len(c.chosen), len(c.rejected))
        weights += 2 * W * (P + sum(ys)) + 2 * V * D * sum(ys)
        attention += 4 * len(layers) * D * (P * (P + 1) // 2 + sum(y * P + y * (y + 1) // 2 for y in ys))
    return branches * ((2 if lora else 3) * weights + 3 * attention)


def main() -> None:
    """Positions a comparison of each shape; a chat's template puts five tokens behind the user's words."""
    print("| | before_prompt | prompt_end | times less |\n" + "|---" * 4 + "|")
    for shape, tail in (("tldr", 0), ("chat", 5)):
        comparisons = [c._replace(tail=tail) for c in random_comparisons(shape, 256, 1000, users=16)]
        before, behind = (
            positions(comparisons, f"user_model.place={place}") for place in ("before_prompt", "prompt_end")
        )
        print(f"| {shape} | {before:.0f} | {behind:.0f} | {before / behind:.2f} |")


if __name__ == "__main__":
    main()
