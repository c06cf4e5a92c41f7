"""Comparisons as a `PreferenceBatch`: rows of preference trees.

    tree:       [BOS] e_u u_t x | y1 EOS | y2 EOS | ...
    segment:            0       |   1    |   2    | ...

The responses to one prompt that one user reads share the prefix, which is computed once. No response sees another one.
The position ids of each response continue from the prefix. The user vectors e_u are not tokens: the batch leaves their
places free. A response in several comparisons is computed once per user, or once for all users where the backbone does
not read the user (the reference, and linear aggregators).

Layouts: "tree" has one tree a row; "packed" has all trees in one row, without padding; "rows" has one reading a row,
with the prompt before each: the sequences of the model's own forward pass, right for models that no mask can divide
(recurrent ones, say), and the readable reference of both.

Shape suffixes: B comparisons, M readings (a response as one user reads it), S trees, R rows, T positions in a row,
N response tokens, U user vectors, D width.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from prlhf.batch.moves import moved
from prlhf.batch.tokens import EncodedComparison

PREFIX = 0  # the segment that all of a tree sees
TREE_TOKENS = 256  # a tree takes further responses up to this length, or that of the longest comparison
PACK_MULTIPLE = 128  # a packed row's length is a multiple: FlexAttention works in blocks of this size
PACK_LEAST = 256  # for a row of a single block torch would compile FlexAttention anew


class Reading(NamedTuple):
    """A response to a prefix [BOS] u_t x, and the number of the user who reads it; None for the reference."""

    user: int | None
    prefix: tuple[int, ...]
    response: tuple[int, ...]


class Layout(NamedTuple):
    """How readings become rows: the kind, where U user vectors go, and whether equal work is done once."""

    kind: str = "tree"  # tree, packed or rows
    vectors: int = 0  # U, before the prompt; 0 where the backbone does not read the user
    slot: int = 0  # how many tokens come before them (BOS)
    share: bool = True


@dataclass
class ReadingBatch:
    """M readings as rows of trees, and where their response tokens are predicted: a response's first token at the last
    prefix position, the others at the token before them. Flat positions count row by row (row * T + t)."""

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
    lengths_M: Tensor  # response tokens of each reading
    users_M: Tensor | None  # who reads; None for the reference, which knows no user
    readings: list[Reading]
    kind: str  # the layout's

    def to(self: "AnyBatch", device: torch.device | str) -> "AnyBatch":
        """The same batch with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **dict(zip(tensors, moved(list(tensors.values()), device))))


@dataclass
class PreferenceBatch(ReadingBatch):
    """B comparisons of the readings."""

    chosen_rejected_B2: Tensor  # the readings that a comparison compares
    margin_B: Tensor  # what reward models may require of the margin, 1 by default


AnyBatch = TypeVar("AnyBatch", bound=ReadingBatch)


def collate(
    comparisons: Sequence[EncodedComparison], users: Sequence[int] | None, layout: Layout = Layout()
) -> PreferenceBatch:
    """Comparisons as a batch. users: who reads each of them; None takes the reference's prefix and no user.
    Unshared, each comparison is a group of its own, and nothing is shared between groups."""
    numbers: dict[tuple[Reading, int], int] = {}  # (reading, group) -> its number m
    chosen_rejected = []
    for b, comparison in enumerate(comparisons):
        user, prefix = (None, comparison.reference_prefix) if users is None else (users[b], comparison.prefix)
        responses = (comparison.chosen, comparison.rejected)
        both = [(Reading(user, tuple(prefix), tuple(y)), 0 if layout.share else b) for y in responses]
        chosen_rejected.append([numbers.setdefault(reading, len(numbers)) for reading in both])
    readings, groups = zip(*numbers)
    batch = lay_out(readings, layout, max(TREE_TOKENS, *(comparison.length for comparison in comparisons)), groups)
    margins = torch.tensor([comparison.margin for comparison in comparisons])
    return PreferenceBatch(**vars(batch), chosen_rejected_B2=torch.tensor(chosen_rejected), margin_B=margins)


class Tree(NamedTuple):
    """A prefix, its reader, and the responses that continue it, each with the readings that it serves."""

    user: int
    prefix: tuple[int, ...]
    responses: list[tuple[tuple[int, ...], list[int]]]

    @property
    def tokens(self) -> int:
        """How many tokens it has, without user vectors."""
        return len(self.prefix) + sum(len(response) for response, _ in self.responses)


def grow_trees(readings: Sequence[Reading], groups: Sequence[int], layout: Layout, tree_tokens: int) -> list[Tree]:
    """Readings as trees of at most `tree_tokens` tokens, or of one response where that alone is longer. Readings
    of different groups share nothing. Where the backbone does not read the user, one response serves all users."""
    trees: list[Tree] = []
    growing: dict[Hashable, Tree] = {}  # root -> the tree that takes its next responses
    served: dict[Hashable, list[int]] = {}  # (root, response) -> the readings that it serves
    for m, (reading, group) in enumerate(zip(readings, groups)):
        user = (reading.user or 0) if layout.vectors else 0
        root = (m if layout.kind == "rows" else group, user, reading.prefix)
        if (root, reading.response) in served:
            served[root, reading.response].append(m)
            continue
        tree = growing.get(root)
        if tree is None or tree.tokens + len(reading.response) > tree_tokens:
            tree = growing[root] = Tree(user, reading.prefix, [])
            trees.append(tree)
        served[root, reading.response] = [m]
        tree.responses.append((reading.response, served[root, reading.response]))
    return trees


def lay_out(
    readings: Sequence[Reading], layout: Layout, tree_tokens: int = TREE_TOKENS, groups: Sequence[int] | None = None
) -> ReadingBatch:
    """Readings as rows of trees. groups: as for `grow_trees`; by default all readings share, or none does."""
    if groups is None:
        groups = [0] * len(readings) if layout.share else range(len(readings))
    trees = grow_trees(readings, groups, layout, tree_tokens)
    U, slot, packed = layout.vectors, layout.slot, layout.kind == "packed"
    rows = [trees] if packed else [[tree] for tree in trees]
    T = max(sum(U + tree.tokens for tree in row) for row in rows)
    if packed:
        T = max(PACK_LEAST, -(-T // PACK_MULTIPLE) * PACK_MULTIPLE)
    cells: list[tuple[int, int, int, int]] = []  # token, tree, segment and position id at each flat position
    vectors_at: list[list[int]] = []
    prefix_end = [0] * len(readings)  # flat position of the last token of each reading's prefix
    response_at = [range(0)] * len(readings)  # flat positions of its response
    for row in rows:
        for number, tree in enumerate(row, start=1):
            vectors_at.append([len(cells) + slot + u for u in range(U)])
            prefix = [*tree.prefix[:slot], *[0] * U, *tree.prefix[slot:]]
            cells += [(token, number, PREFIX, at) for at, token in enumerate(prefix)]
            end = len(cells) - 1
            for segment, (response, served) in enumerate(tree.responses, start=1):
                for m in served:
                    prefix_end[m], response_at[m] = end, range(len(cells), len(cells) + len(response))
                cells += [(token, number, segment, at) for at, token in enumerate(response, start=len(prefix))]
        cells += [(0, 0, PREFIX, 0)] * (-len(cells) % T)
    input_ids_RT, trees_RT, segments_RT, positions_RT = torch.tensor(cells).T.contiguous().view(4, len(rows), T)
    users = [reading.user for reading in readings]
    return ReadingBatch(
        input_ids_RT=input_ids_RT,
        trees_RT=trees_RT,
        segments_RT=segments_RT,
        positions_RT=positions_RT,
        vectors_at_SU=torch.tensor(vectors_at, dtype=torch.long),
        users_S=torch.tensor([tree.user for tree in trees]),
        predicted_at_N=torch.tensor([n for end, at in zip(prefix_end, response_at) for n in (end, *at[:-1])]),
        targets_N=torch.tensor([token for reading in readings for token in reading.response]),
        reading_N=torch.tensor([m for m, at in enumerate(response_at) for _ in at]),
        response_at_N=torch.tensor([n for at in response_at for n in at]),
        last_at_M=torch.tensor([at[-1] for at in response_at]),
        lengths_M=torch.tensor([len(at) for at in response_at]),
        users_M=None if None in users else torch.tensor(users),
        readings=list(readings),
        kind=layout.kind,
    )


def sees(trees_RT: Tensor, segments_RT: Tensor, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether position `query` of a row sees position `key`: an earlier one of its tree, in the prefix or its own response.
    row, query and key are indices whose shapes broadcast. Padding is a tree of its own, so that no softmax is empty."""
    key_segment = segments_RT[row, key]
    in_path = (key_segment == PREFIX) | (key_segment == segments_RT[row, query])
    return (key <= query) & (trees_RT[row, key] == trees_RT[row, query]) & in_path


def tree_mask(trees_RT: Tensor, segments_RT: Tensor) -> Tensor:
    """What each query `sees`, (R, 1, T, T) boolean."""
    (R, T), device = trees_RT.shape, trees_RT.device
    row, at = torch.arange(R, device=device)[:, None, None], torch.arange(T, device=device)
    return sees(trees_RT, segments_RT, row, at[:, None], at)[:, None]
