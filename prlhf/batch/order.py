"""Which comparisons go together: into an update, and into one forward pass."""

import math
import random
from collections.abc import Hashable, Sequence

from prlhf.batch.tokens import EncodedComparison

READERS_PER_TREE = 16  # comparisons per tree, on average, in one forward pass: only the backbone's work is shared


def pair_of(comparison: EncodedComparison) -> Hashable:
    """The prompt and the two responses, whichever of them is chosen: equal for comparisons of the same pair."""
    return tuple(comparison.prefix), frozenset((tuple(comparison.chosen), tuple(comparison.rejected)))


def equal_ones(keys: Sequence[Hashable]) -> list[list[int]]:
    """The indices of equal keys in one list, in the order in which each key comes first."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def response_blocks(comparisons: Sequence[EncodedComparison], batch_size: int, rng: random.Random) -> list[list[int]]:
    """The comparisons (as indices) of each prompt, in an order in which any `batch_size` neighbours share responses.

    A prompt's n responses get random ranks. Its C comparisons are cells (lower rank, higher rank) of a triangle, which
    is cut into strips of s lower ranks; each strip is walked in the order of the higher ranks. s = n sqrt(batch_size /
    2C) makes squares: batch_size neighbours have about 2s responses, instead of up to 2 batch_size.
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
    """The comparisons (as indices) of each update of an epoch, of similar length, in an order set by the seed.

    Pools of 16 shuffled updates are sorted by length and cut into updates, and the updates are shuffled: there is
    little padding, and every comparison occurs once. group_by "pair": comparisons of one pair stay neighbours, so that
    most are in one update and share work. "response": comparisons of one prompt, ordered by `response_blocks`.
    """
    rng = random.Random(f"{seed}-{epoch}")
    if group_by == "response":
        groups = response_blocks(comparisons, batch_size, rng)
    else:
        groups = equal_ones([pair_of(c) if group_by == "pair" else i for i, c in enumerate(comparisons)])
    rng.shuffle(groups)
    length: dict[int, int] = {}
    for group in groups:  # sorted by its longest comparison, a group stays together
        length |= dict.fromkeys(group, max(comparisons[i].length for i in group))
    order = list(length)  # group after group
    updates: list[list[int]] = []
    pool = 16 * batch_size
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=length.__getitem__)
        updates += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    rng.shuffle(updates)
    return updates


def micro_batches(trees: Sequence[Hashable], lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of `trees` in groups of similar length, each with at most `size` different trees. The longest
    come first, so memory peaks at once. Equal trees stay together, up to READERS_PER_TREE * size a group."""
    first = {tree: i for i, tree in reversed(list(enumerate(trees)))}
    groups: list[list[int]] = []
    inside: set[Hashable] = set()  # the trees of the last group
    for i in sorted(range(len(trees)), key=lambda i: (-lengths[i], first[trees[i]], i)):
        full = not groups or len(groups[-1]) == READERS_PER_TREE * size
        if full or (trees[i] not in inside and len(inside) == size):
            groups.append([])
            inside = set()
        groups[-1].append(i)
        inside.add(trees[i])
    return groups


def even_micro_batches(
    trees: Sequence[Hashable], lengths: Sequence[int], size: int, processes: int, packed: bool
) -> list[list[int]]:
    """The indices of `trees` in groups of at most `size` different trees, as few and as even as a multiple of `processes` allows;
    one tree each where there are not enough. Equal trees stay together, as in `micro_batches`. The longest group is the first.

    packed: rows have no padding, so each next longest tree goes where there are the fewest positions so far, and the groups
    take equally long. Otherwise trees of similar length go together.
    """
    limit = READERS_PER_TREE * size
    units = [of[start : start + limit] for of in equal_ones(trees) for start in range(0, len(of), limit)]
    units.sort(key=lambda unit: -lengths[unit[0]])
    count = min(len(units), -(-len(units) // (size * processes)) * processes)
    groups: list[list[list[int]]] = [[] for _ in range(count)]
    positions = [0] * count
    for n, unit in enumerate(units):
        fitting = [g for g, of in enumerate(groups) if len(of) < size and sum(map(len, of)) + len(unit) <= limit]
        if not fitting:  # too many comparisons a tree
            fitting = [len(groups)]
            groups.append([])
            positions.append(0)
        g = (
            min(fitting, key=positions.__getitem__)
            if packed
            else next((g for g in fitting if g >= n * count // len(units)), fitting[0])
        )
        groups[g].append(unit)
        positions[g] += lengths[unit[0]]
    order = sorted(range(len(groups)), key=lambda g: -positions[g])
    return [sum(groups[g], []) for g in order]


def whole_groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Groups of these sizes, by place and in order, in batches that hold `most` at most, or one group that is larger."""
    batches: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if size > room:
            batches.append([])
            room = most
        batches[-1].append(place)
        room -= size
    return batches
