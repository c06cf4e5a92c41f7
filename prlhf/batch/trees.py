"""Comparisons as a `PreferenceBatch`: rows of preference trees.

A tree is made of segments. What continues one segment stands below it, so that what sequences have in common is computed
once. The user vectors e_u are not tokens: the batch leaves their places free. `user_model.place` says where they stand:

    before_prompt   [BOS] e_u u_t x | y1 EOS        the paper: users share nothing
                                    | y2 EOS

    prompt_end      [BOS] u_t x | e_u tail | y1 EOS        users share the prompt; tail: what the chat template puts between
                                           | y2 EOS        the prompt's content and the answer (in a text: nothing)
                                | e_0 tail | y1 EOS
                                           | y2 EOS

    response_end    [BOS] u_t x | y1 EOS | e_u        reward models: users share the response, and the head reads the last
                                         | e_0        of their vectors
                                | y2 EOS | e_u
                                         | e_0

Without e_u (the reference, linear aggregators) the prompt and its responses serve all users.

A position sees what is before it in its own segment and in those above, so no response sees another one. Position ids count
along this path. In a row each segment is followed by all that is below it. So a position is seen from where it stands up to
the end of what is below its segment, and this end (`seen_until_RT`) is all that the mask needs.

Layouts: "tree" has one tree a row; "packed" has all trees in one row, without padding; "rows" has one reading a row,
with the prompt before each: the sequences of the model's own forward pass, right for models that no mask can divide
(recurrent ones, say), and the readable reference of both.

Shape suffixes: B comparisons, M readings (a response as one user reads it), S sets of user vectors, R rows, T positions in a
row, N response tokens, U user vectors, D width.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from prlhf.batch.moves import moved
from prlhf.batch.order import equal_ones
from prlhf.batch.tokens import EncodedComparison

TREE_TOKENS = 256  # a tree takes further responses up to this length, or that of the longest comparison
USERS_PER_TREE = 3  # where users share a prompt, up to so many times that: as many users as usually read a comparison
PACK_MULTIPLE = 128  # a packed row's length is a multiple: FlexAttention works in blocks of this size
PACK_LEAST = 256  # for a row of a single block torch would compile FlexAttention anew


class Reading(NamedTuple):
    """A response to a prefix [BOS] u_t x, and the number of the user who reads it; None for the reference."""

    user: int | None
    prefix: tuple[int, ...]
    response: tuple[int, ...]
    tail: int = 0  # how many tokens of the prefix stand behind the prompt's content


class Segment(NamedTuple):
    """Tokens of a tree, and where in them user vectors stand."""

    tokens: tuple[int, ...]
    is_response: bool = False
    reader: int = 0  # the user whose vectors stand here
    vectors: int = 0  # how many they are
    slot: int = 0  # how many of the tokens precede them

    @property
    def positions(self) -> int:
        """How many positions it takes."""
        return len(self.tokens) + self.vectors


class Layout(NamedTuple):
    """How readings become rows: the kind, where U user vectors go, and whether equal work is done once."""

    kind: str = "tree"  # tree, packed or rows
    vectors: int = 0  # U; 0 where the backbone does not read the user
    slot: int = 0  # how many tokens come before them at place before_prompt (BOS)
    share: bool = True
    place: str = "before_prompt"  # or prompt_end, response_end

    def slot_of(self, reading: Reading) -> int:
        """How many of a reading's tokens, prefix and response, come before its user vectors."""
        if self.place == "before_prompt":
            return self.slot
        behind = len(reading.prefix) - reading.tail
        return behind if self.place == "prompt_end" else len(reading.prefix) + len(reading.response)

    def path(self, reading: Reading) -> tuple[Segment, ...]:
        """The segments of a reading, from its tree's root."""
        prompt, response = Segment(reading.prefix), Segment(reading.response, is_response=True)
        if not self.vectors:
            return prompt, response
        slot, user, U = self.slot_of(reading), reading.user or 0, self.vectors
        if self.place == "before_prompt":
            return Segment(reading.prefix, False, user, U, slot), response
        if self.place == "prompt_end":
            return Segment(reading.prefix[:slot]), Segment(reading.prefix[slot:], False, user, U), response
        return prompt, response, Segment((), False, user, U)


@dataclass
class ReadingBatch:
    """M readings as rows of trees, and where their response tokens are predicted: a response's first token at the last
    position before it, the others at the token before them. Flat positions count row by row (row * T + t)."""

    input_ids_RT: Tensor
    trees_RT: Tensor  # which tree of its row a position belongs to, from 1; 0 is padding
    seen_until_RT: Tensor  # the position of the row from which on nothing sees it: the end of what is below its segment
    positions_RT: Tensor
    vectors_at_SU: Tensor  # flat positions of each set of user vectors
    users_S: Tensor  # whose vectors these are
    predicted_at_N: Tensor  # flat position whose hidden state predicts response token n
    targets_N: Tensor  # that token's id
    reading_N: Tensor  # its reading
    response_at_N: Tensor  # flat position of response token n itself
    last_at_M: Tensor  # flat position of each reading's end: EOS, or the last user vector behind it
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
        both = [(Reading(user, tuple(prefix), tuple(y), comparison.tail), 0 if layout.share else b) for y in responses]
        chosen_rejected.append([numbers.setdefault(reading, len(numbers)) for reading in both])
    readings, groups = zip(*numbers)
    batch = lay_out(readings, layout, max(TREE_TOKENS, *(comparison.length for comparison in comparisons)), groups)
    margins = torch.tensor([comparison.margin for comparison in comparisons])
    return PreferenceBatch(**vars(batch), chosen_rejected_B2=torch.tensor(chosen_rejected), margin_B=margins)


@dataclass
class Node:
    """A segment in its tree: what continues it, and the readings that end with it."""

    segment: Segment
    below: dict[Segment, "Node"] = field(default_factory=dict)
    readings: list[int] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """Those of the segment and of all below it."""
        return self.segment.positions + sum(node.positions for node in self.below.values())

    def lacks(self, path: Sequence[Segment]) -> int:
        """How many positions the segments of a path below this node would add."""
        if path and path[0] in self.below:
            return self.below[path[0]].lacks(path[1:])
        return sum(segment.positions for segment in path)

    def add(self, path: Sequence[Segment]) -> "Node":
        """The node at the end of a path below this one, which is added where it is lacking."""
        return self.below.setdefault(path[0], Node(path[0])).add(path[1:]) if path else self


def grow_trees(readings: Sequence[Reading], groups: Sequence[int], layout: Layout, tree_tokens: int) -> list[Node]:
    """Readings as trees, each by its root. A tree has at most `tree_tokens` tokens and a user's vectors, USERS_PER_TREE times as
    many where users share a prompt, or one reading where that alone is longer. Readings of different groups share nothing.
    What continues the same user's vectors or the same response is put in one after the other, so that few trees repeat it.
    """
    own = layout.kind == "rows"  # each reading has a group of its own
    paths = [(m if own else group, layout.path(reading)) for m, (reading, group) in enumerate(zip(readings, groups))]
    trees: list[Node] = []
    growing: dict[Hashable, Node] = {}  # root -> the tree that takes its next segments
    ends: dict[Hashable, Node] = {}  # of the paths that are there
    most = tree_tokens + layout.vectors
    if layout.vectors and layout.place != "before_prompt":
        most *= USERS_PER_TREE
    for m in chain.from_iterable(equal_ones([(group, path[:2]) for group, path in paths])):
        group, (first, *rest) = paths[m]
        if paths[m] not in ends:
            tree = growing.get((group, first))
            if tree is None or tree.positions + tree.lacks(rest) > most:
                tree = growing[group, first] = Node(first)
                trees.append(tree)
            ends[paths[m]] = tree.add(rest)
        ends[paths[m]].readings.append(m)
    return trees


class Span(NamedTuple):
    """The flat positions of a response, and the one before its first: together those that predict it."""

    before: int = 0
    at: range = range(0)


NO_SPAN = Span()


class Cells:
    """The positions of a batch as they are written, row by row, and what is where in them (flat positions)."""

    def __init__(self, readings: int):
        self.cells: list[tuple[int, int, int, int]] = []  # token, tree, seen_until and position id
        self.row = 0  # where the row begins
        self.vectors_at: list[list[int]] = []
        self.users: list[int] = []
        self.spans = [NO_SPAN] * readings
        self.last_at = [0] * readings

    def write(self, node: Node, tree: int, position: int = 0, above: int = 0, response: Span = NO_SPAN) -> None:
        """A node and all below it. position: its first position id; above: the last position of what it continues;
        response: where that of its readings is, if it stands above."""
        (tokens, is_response, reader, vectors, slot), start = node.segment, len(self.cells)
        until = start - self.row + node.positions
        read = [*tokens[:slot], *[0] * vectors, *tokens[slot:]]
        self.cells += [(token, tree, until, at) for at, token in enumerate(read, start=position)]
        if vectors:
            self.vectors_at.append([*range(start + slot, start + slot + vectors)])
            self.users.append(reader)
        last = len(self.cells) - 1
        if is_response:
            response = Span(above, range(start, last + 1))
        for m in node.readings:
            self.spans[m], self.last_at[m] = response, last
        for child in node.below.values():
            self.write(child, tree, position + len(read), last, response)


def lay_out(
    readings: Sequence[Reading], layout: Layout, tree_tokens: int = TREE_TOKENS, groups: Sequence[int] | None = None
) -> ReadingBatch:
    """Readings as rows of trees. groups: as for `grow_trees`; by default all readings share, or none does."""
    if groups is None:
        groups = [0] * len(readings) if layout.share else range(len(readings))
    trees = grow_trees(readings, groups, layout, tree_tokens)
    rows = [trees] if layout.kind == "packed" else [[tree] for tree in trees]
    T = max(sum(tree.positions for tree in row) for row in rows)
    if layout.kind == "packed":
        T = max(PACK_LEAST, -(-T // PACK_MULTIPLE) * PACK_MULTIPLE)
    written = Cells(len(readings))
    for number, row in enumerate(rows):
        written.row = number * T
        for tree, root in enumerate(row, start=1):
            written.write(root, tree)
        written.cells += [(0, 0, T, 0)] * (-len(written.cells) % T)
    input_ids_RT, trees_RT, seen_until_RT, positions_RT = (
        torch.tensor(written.cells).T.contiguous().view(4, len(rows), T)
    )
    users = [reading.user for reading in readings]
    return ReadingBatch(
        input_ids_RT=input_ids_RT,
        trees_RT=trees_RT,
        seen_until_RT=seen_until_RT,
        positions_RT=positions_RT,
        vectors_at_SU=torch.tensor(written.vectors_at, dtype=torch.long),
        users_S=torch.tensor(written.users, dtype=torch.long),
        predicted_at_N=torch.tensor([n for before, at in written.spans for n in (before, *at[:-1])]),
        targets_N=torch.tensor([token for reading in readings for token in reading.response]),
        reading_N=torch.tensor([m for m, (_, at) in enumerate(written.spans) for _ in at]),
        response_at_N=torch.tensor([n for _, at in written.spans for n in at]),
        last_at_M=torch.tensor(written.last_at),
        lengths_M=torch.tensor([len(at) for _, at in written.spans]),
        users_M=None if None in users else torch.tensor(users),
        readings=list(readings),
        kind=layout.kind,
    )


def sees(seen_until_RT: Tensor, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether position `query` of a row sees position `key`: from where that stands up to the end of what is below its segment.
    row, query and key are indices whose shapes broadcast. Padding sees itself, so that no softmax is empty."""
    return (key <= query) & (query < seen_until_RT[row, key])


def tree_mask(seen_until_RT: Tensor) -> Tensor:
    """What each query `sees`, (R, 1, T, T) boolean."""
    (R, T), device = seen_until_RT.shape, seen_until_RT.device
    row, at = torch.arange(R, device=device)[:, None, None], torch.arange(T, device=device)
    return sees(seen_until_RT, row, at[:, None], at)[:, None]
