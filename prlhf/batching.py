"""Comparisons to a `PreferenceBatch`: rows of preference trees. And which comparisons go together.

    tree:       [BOS] e_u u_t x | y1 EOS | y2 EOS | ...
    segment:            0       |   1    |   2    | ...

The responses to one prompt, read by one user, share the prefix, which is computed once. No response sees another one,
and the position ids of each go on from the prefix. The user vectors e_u are not tokens: the batch keeps their places
free. A response that is in several comparisons of a batch, read by the same user, is there once; what does not depend
on the user at all (the reference, and the aggregators behind the backbone) is there once for all users.

Layouts: "tree" has one tree a row; "packed" all trees in one row, without padding; "rows" one reading a row with the prompt
before each, which is the plain and readable reference of both.

Shape suffixes: B comparisons, M readings (a response as one user reads it), S trees, R rows, T positions in a row,
N response tokens, U user vectors, D width.
"""

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.encoding import EncodedComparison

PREFIX = 0  # the segment that all of a tree sees
TREE_TOKENS = 256  # a tree takes further responses up to this length, or that of the longest comparison
READERS = (
    16  # comparisons per tree, on average, that a forward pass may take: what is behind the backbone is each one's own
)
PACK_MULTIPLE = 128  # a packed row's length: FlexAttention works in blocks of this size
SHAPES = ("_RT", "_N", "_M", "_B", "_B2", "_S", "_SU")


class Reading(NamedTuple):
    """A response to a prefix [BOS] u_t x, and the number of the user who reads them."""

    user: int
    prefix: tuple[int, ...]
    response: tuple[int, ...]


class Layout(NamedTuple):
    """How readings become rows: the kind, where U user vectors go, and whether equal work is done once."""

    kind: str = "tree"  # tree, packed or rows
    vectors: int = 0  # U, before the prompt; 0 where the backbone does not read the user
    slot: int = 0  # how many tokens come before them (BOS)
    share: bool = True


@dataclass
class PreferenceBatch:
    """B comparisons as readings, the readings as rows of trees, and where their response tokens are predicted.

    A response's first token is predicted at the last prefix position, the others at the token before them. Flat
    positions count row by row (row * T + t).
    """

    input_ids_RT: Tensor
    trees_RT: Tensor  # which tree of its row a position belongs to, from 1; 0 is padding
    segments_RT: Tensor  # PREFIX, or which response of the tree, from 1
    positions_RT: Tensor
    vectors_at_SU: Tensor  # flat positions of each tree's user vectors
    users_S: Tensor  # the user who reads a tree
    predicted_at_N: Tensor  # flat position whose hidden state predicts response token n
    targets_N: Tensor  # that token's id
    reading_N: Tensor  # its reading
    response_at_N: Tensor  # flat position of response token n itself
    last_at_M: Tensor  # flat position of each reading's last token (EOS)
    users_M: Tensor | None  # who reads; None: the reference, which knows no user
    readings: list[Reading]
    chosen_rejected_B2: Tensor  # the readings that a comparison compares
    margin_B: Tensor  # what reward models may require of the margin, 1 by default
    packed: bool  # all trees in one row

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        """The same batch with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(SHAPES)}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if t is not None})


def collate(
    comparisons: Sequence[EncodedComparison], users: Sequence[int] | None, layout: Layout = Layout()
) -> PreferenceBatch:
    """Comparisons, each read by a user of `users`, as a batch; users=None takes the reference's prefix and no user."""
    number: dict[Hashable, int] = {}
    readings: list[Reading] = []
    compared: list[list[int]] = []
    for b, comparison in enumerate(comparisons):
        prefix = tuple(comparison.reference_prefix if users is None else comparison.prefix)
        sides = []
        for side, response in enumerate((comparison.chosen, comparison.rejected)):
            reading = Reading(0 if users is None else users[b], prefix, tuple(response))
            key = reading if layout.share else (b, side)
            if key not in number:
                number[key] = len(readings)
                readings.append(reading)
            sides.append(number[key])
        compared.append(sides)
    longest = max(c.length for c in comparisons)
    batch = lay_out(readings, layout, max(TREE_TOKENS, longest), know_users=users is not None)
    return replace(
        batch, chosen_rejected_B2=torch.tensor(compared), margin_B=torch.tensor([c.margin for c in comparisons])
    )


class Tree(NamedTuple):
    """A prefix, its reader, and the responses that go on from it, each with the readings that it serves."""

    user: int
    prefix: tuple[int, ...]
    responses: list[tuple[tuple[int, ...], list[int]]]


def grow_trees(readings: Sequence[Reading], layout: Layout, tree_tokens: int) -> list[Tree]:
    """Readings as trees of at most `tree_tokens` tokens, or of one response where that alone is longer.

    Where the backbone does not read the user, one response serves the readings of all users.
    """
    trees: list[Tree] = []
    used: list[int] = []
    open_tree: dict[Hashable, int] = {}  # (user, prefix) -> the tree that takes its responses
    response_at: dict[Hashable, list[int]] = {}  # (user, prefix, response) -> the readings that it serves
    for m, (user, prefix, response) in enumerate(readings):
        user = user if layout.vectors else 0
        shared = layout.share and layout.kind != "rows"
        place = (user, prefix, response) if shared else m
        if place in response_at:
            response_at[place].append(m)
            continue
        root = (user, prefix) if shared else (user, prefix, m // 2)  # unshared readings come in pairs
        t = open_tree.get(root)
        if t is None or used[t] + len(response) > tree_tokens or layout.kind == "rows":
            t = open_tree[root] = len(trees)
            trees.append(Tree(user, prefix, []))
            used.append(len(prefix))
        response_at[place] = [m]
        trees[t].responses.append((response, response_at[place]))
        used[t] += len(response)
    return trees


def lay_out(
    readings: Sequence[Reading], layout: Layout, tree_tokens: int = TREE_TOKENS, know_users: bool = True
) -> PreferenceBatch:
    """Readings as rows; the batch compares none of them yet."""
    trees = grow_trees(readings, layout, tree_tokens)
    U = layout.vectors
    sizes = [U + len(tree.prefix) + sum(len(response) for response, _ in tree.responses) for tree in trees]
    packed = layout.kind == "packed"
    T = -(-sum(sizes) // PACK_MULTIPLE) * PACK_MULTIPLE if packed else max(sizes)
    R = 1 if packed else len(trees)
    input_ids, trees_of, segments, positions = (torch.zeros(R * T, dtype=torch.long) for _ in range(4))
    vectors_at: list[range] = []
    predicted_at: list[list[int]] = [[] for _ in readings]
    start = 0
    for t, (tree, size) in enumerate(zip(trees, sizes)):
        start = start if packed else t * T
        prefix = [*tree.prefix[: layout.slot], *[0] * U, *tree.prefix[layout.slot :]]
        vectors_at.append(range(start + layout.slot, start + layout.slot + U))
        ids, segment, position = list(prefix), [PREFIX] * len(prefix), list(range(len(prefix)))
        for branch, (response, served) in enumerate(tree.responses, start=1):
            first = start + len(ids)
            for m in served:
                predicted_at[m] = [start + len(prefix) - 1, *range(first, first + len(response))]
            ids += response
            segment += [branch] * len(response)
            position += range(len(prefix), len(prefix) + len(response))
        end = start + size
        input_ids[start:end], segments[start:end] = torch.tensor(ids), torch.tensor(segment)
        positions[start:end], trees_of[start:end] = torch.tensor(position), t + 1 if packed else 1
        start = end
    return PreferenceBatch(
        input_ids.view(R, T),
        trees_of.view(R, T),
        segments.view(R, T),
        positions.view(R, T),
        torch.tensor([list(at) for at in vectors_at], dtype=torch.long),
        torch.tensor([tree.user for tree in trees]),
        torch.tensor([at for places in predicted_at for at in places[:-1]]),
        torch.tensor([token for reading in readings for token in reading.response]),
        torch.tensor([m for m, reading in enumerate(readings) for _ in reading.response]),
        torch.tensor([at for places in predicted_at for at in places[1:]]),
        torch.tensor([places[-1] for places in predicted_at]),
        torch.tensor([reading.user for reading in readings]) if know_users else None,
        list(readings),
        torch.zeros(0, 2, dtype=torch.long),
        torch.zeros(0),
        packed,
    )


def sees(trees_RT: Tensor, segments_RT: Tensor, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether position `query` of a row sees position `key`: it came before in its tree, in the prefix or its response.

    row, query and key are indices of one shape, or of shapes that broadcast. Padding is a tree of its own, so that no
    softmax is empty.
    """
    key_segment = segments_RT[row, key]
    of_the_response = (key_segment == PREFIX) | (key_segment == segments_RT[row, query])
    return (key <= query) & (trees_RT[row, key] == trees_RT[row, query]) & of_the_response


def tree_mask(trees_RT: Tensor, segments_RT: Tensor) -> Tensor:
    """What each query `sees`, (R, 1, T, T) boolean."""
    (R, T), device = trees_RT.shape, trees_RT.device
    row, at = torch.arange(R, device=device)[:, None, None], torch.arange(T, device=device)
    return sees(trees_RT, segments_RT, row, at[:, None], at)[:, None]


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

    The longest come first (memory peaks at once); equal trees stay together, up to READERS * size of them.
    """
    first: dict[Hashable, int] = {}
    for i, tree in enumerate(trees):
        first.setdefault(tree, i)
    groups: list[list[int]] = []
    inside: set[Hashable] = set()
    for i in sorted(range(len(trees)), key=lambda i: (-lengths[i], first[trees[i]], i)):
        full = len(groups[-1]) == READERS * size if groups else True
        if full or (trees[i] not in inside and len(inside) == size):
            groups.append([])
            inside = set()
        groups[-1].append(i)
        inside.add(trees[i])
    return groups
