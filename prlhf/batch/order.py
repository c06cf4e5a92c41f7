"""Which comparisons go together: into an update, and into one forward pass."""

import math
import random
from collections.abc import Hashable, Sequence

from prlhf.batch.tokens import EncodedComparison

READERS_PER_TREE = (
    16  # comparisons per tree, on average, that a forward pass may take: what is behind the backbone is each one's own
)


def pair_of(comparison: EncodedComparison) -> Hashable:
    """What two comparisons have in common that have the same prompt and the same two responses, either of them chosen."""
    return tuple(comparison.prefix), frozenset((tuple(comparison.chosen), tuple(comparison.rejected)))


def equal_ones(keys: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal keys, together, in the order of their first."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def response_blocks(comparisons: Sequence[EncodedComparison], batch_size: int, rng: random.Random) -> list[list[int]]:
    """The comparisons (as indices) of each prompt, in an order in which any `batch_size` neighbours share responses.

    A prompt's n responses get random ranks. Its C comparisons are cells (lower rank, higher rank) of a triangle; it is cut
    into strips of s lower ranks, and a strip is walked in the order of the higher ranks. s = n sqrt(batch_size / 2C) makes
    squares: batch_size neighbours hold some 2s responses, in place of up to 2 batch_size.
    """
    blocks = []
    for of_prompt in equal_ones([tuple(c.prefix) for c in comparisons]):
        responses = {i: (tuple(comparisons[i].chosen), tuple(comparisons[i].rejected)) for i in of_prompt}
        distinct = list(dict.fromkeys(response for both in responses.values() for response in both))
        rng.shuffle(distinct)
        rank = {response: r for r, response in enumerate(distinct)}
        strip = max(1, round(len(distinct) * math.sqrt(batch_size / (2 * len(of_prompt)))))
        cells = {i: sorted(rank[response] for response in both) for i, both in responses.items()}
        rng.shuffle(of_prompt)  # the order of equal cells
        blocks.append(sorted(of_prompt, key=lambda i: (cells[i][0] // strip, cells[i][1])))
    return blocks


def updates_of_epoch(
    comparisons: Sequence[EncodedComparison], batch_size: int, seed: int, epoch: int, group_by: str = "none"
) -> list[list[int]]:
    """The comparisons (as indices) of each update of an epoch, neighbours in length, in an order set by the seed.

    Shuffled pools of 16 updates are sorted by length and cut into updates, and the updates are shuffled: little is
    padding, and every comparison occurs once. group_by "pair": those of one pair are shuffled as one and stay neighbours,
    so most are in one update, where they share work; "response": those of one prompt, as `response_blocks` orders them.
    """
    rng = random.Random(f"{seed}-{epoch}")
    if group_by == "response":
        groups = response_blocks(comparisons, batch_size, rng)
    else:
        groups = equal_ones([pair_of(c) if group_by == "pair" else i for i, c in enumerate(comparisons)])
    rng.shuffle(groups)
    longest = [max(comparisons[i].length for i in group) for group in groups]
    length = {i: size for group, size in zip(groups, longest) for i in group}
    order = [i for group in groups for i in group]
    updates: list[list[int]] = []
    pool = 16 * batch_size
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=length.__getitem__)
        updates += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    rng.shuffle(updates)
    return updates


def micro_batches(trees: Sequence[Hashable], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut the indices of `trees` into groups with at most `size` different trees each, of similar length.

    The longest come first (memory peaks at once); equal trees stay together, up to READERS_PER_TREE * size of them.
    """
    first: dict[Hashable, int] = {}
    for i, tree in enumerate(trees):
        first.setdefault(tree, i)
    groups: list[list[int]] = []
    inside: set[Hashable] = set()
    for i in sorted(range(len(trees)), key=lambda i: (-lengths[i], first[trees[i]], i)):
        full = len(groups[-1]) == READERS_PER_TREE * size if groups else True
        if full or (trees[i] not in inside and len(inside) == size):
            groups.append([])
            inside = set()
        groups[-1].append(i)
        inside.add(trees[i])
    return groups
