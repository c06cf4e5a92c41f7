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

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.batch.tokens import EncodedComparison

PREFIX = 0  # the segment that all of a tree sees
TREE_TOKENS = 256  # a tree takes further responses up to this length, or that of the longest comparison
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
