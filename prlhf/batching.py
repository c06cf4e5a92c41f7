"""Tokens to a `PreferenceBatch`: one tensor row holds a preference tree. And which comparisons go together.

    row:        [BOS] u_t x | y1 EOS | y2 EOS | padding
    segment:        PREFIX  | CHOSEN | REJECTED | PAD

The chosen and the rejected response share the prefix, which is computed once. y2 does not see y1, and its position
ids go on from the prefix. The user vectors e_u are not tokens: `insert_user_vectors` puts them after BOS. The plain layout
("rows") holds [prefix y1] and [prefix y2] in two rows of the same structure; it is the readable reference.

Shape suffixes: B comparisons, M = 2 B responses, R rows, T positions in a row, N response tokens, U user vectors,
D width.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.encoding import EncodedComparison

PAD, PREFIX, CHOSEN, REJECTED = 0, 1, 2, 3
SHAPES = ("_RT", "_R", "_N", "_M", "_B")


@dataclass
class PreferenceBatch:
    """B comparisons as rows of tokens, and where their response tokens are predicted.

    A response's first token is predicted at the last prefix position, the others at the token before them. Flat
    positions count row by row (row * T + t) and know nothing of the user vectors, which the model inserts.
    """

    input_ids_RT: Tensor
    segments_RT: Tensor  # PAD, PREFIX, CHOSEN or REJECTED
    positions_RT: Tensor
    comparison_R: Tensor  # which comparison a row belongs to
    predicted_at_N: Tensor  # flat position whose hidden state predicts response token n
    targets_N: Tensor  # that token's id
    response_N: Tensor  # its response: 2 b for chosen, 2 b + 1 for rejected
    last_at_M: Tensor  # flat position of each response's last token (EOS), in order of the responses
    margin_B: Tensor  # what reward models may require of the margin, 1 by default
    size: int  # B

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        """The same batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name.endswith(SHAPES)}
        return replace(self, **moved)


class Row(NamedTuple):
    """One tensor row before it is one: a prefix and the responses that go on from it, each with its number."""

    comparison: int
    prefix: Sequence[int]
    responses: list[tuple[int, Sequence[int]]]


def collate(comparisons: Sequence[EncodedComparison], layout: str = "tree", reference: bool = False) -> PreferenceBatch:
    """Lay out comparisons as trees (one row each) or plain rows (two each); `reference` takes the reference's prefix."""
    rows: list[Row] = []
    for b, comparison in enumerate(comparisons):
        prefix = comparison.reference_prefix if reference else comparison.prefix
        responses = [(2 * b, comparison.chosen), (2 * b + 1, comparison.rejected)]
        if layout == "tree":
            rows.append(Row(b, prefix, responses))
        else:
            rows.extend(Row(b, prefix, [response]) for response in responses)
    return lay_out(rows, [c.margin for c in comparisons])


def lay_out(rows: Sequence[Row], margins: Sequence[float]) -> PreferenceBatch:
    """Rows of one prefix and any number of responses as tensors; their segments are CHOSEN, REJECTED and so on."""
    width = max(len(row.prefix) + sum(len(ids) for _, ids in row.responses) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), PAD)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    predicted_at: list[int] = []
    targets: list[int] = []
    response_of: list[int] = []
    last_at: dict[int, int] = {}
    for r, (_, prefix, responses) in enumerate(rows):
        start = len(prefix)
        input_ids[r, :start] = torch.tensor(prefix)
        segments[r, :start] = PREFIX
        positions[r, :start] = torch.arange(start)
        for branch, (number, ids) in enumerate(responses):
            end = start + len(ids)
            input_ids[r, start:end] = torch.tensor(ids)
            segments[r, start:end] = CHOSEN + branch
            positions[r, start:end] = torch.arange(len(prefix), len(prefix) + len(ids))
            predicted_at += [r * width + len(prefix) - 1, *range(r * width + start, r * width + end - 1)]
            targets += ids
            response_of += [number] * len(ids)
            last_at[number] = r * width + end - 1
            start = end
    return PreferenceBatch(
        input_ids,
        segments,
        positions,
        torch.tensor([row.comparison for row in rows]),
        torch.tensor(predicted_at),
        torch.tensor(targets),
        torch.tensor(response_of),
        torch.tensor([last_at[number] for number in sorted(last_at)]),
        torch.tensor(margins),
        len(margins),
    )


Response = tuple[tuple[int, ...], tuple[int, ...]]  # a prefix and a response to it


class DistinctResponses(NamedTuple):
    """B comparisons as indices into the distinct responses among them: what is in several is computed once."""

    responses: list[Response]
    index_B2: Tensor  # of the chosen and the rejected one
    margin_B: Tensor

    def to(self, device: torch.device | str) -> "DistinctResponses":
        """The same with its tensors on `device`."""
        return self._replace(index_B2=self.index_B2.to(device), margin_B=self.margin_B.to(device))


def distinct_responses(comparisons: Sequence[EncodedComparison]) -> DistinctResponses:
    """The responses of some comparisons, each once. A response to another prompt or user text is another one."""
    number: dict[Response, int] = {}
    index = []
    for c in comparisons:
        prefix = tuple(c.prefix)
        index.append([number.setdefault((prefix, tuple(ids)), len(number)) for ids in (c.chosen, c.rejected)])
    return DistinctResponses(list(number), torch.tensor(index), torch.tensor([c.margin for c in comparisons]))


def collate_responses(responses: Sequence[Response], row_tokens: int = 256) -> PreferenceBatch:
    """Lay out responses (numbered in their order), those to one prefix side by side in rows of some `row_tokens`."""
    rows: list[Row] = []
    used = 0
    for number in sorted(range(len(responses)), key=lambda i: (responses[i][0], len(responses[i][1]))):
        prefix, ids = responses[number]
        if not rows or rows[-1].prefix != prefix or used + len(ids) > row_tokens:
            rows.append(Row(0, prefix, []))
            used = len(prefix)
        rows[-1].responses.append((number, ids))
        used += len(ids)
    return lay_out(rows, [1.0] * len(responses))


def tree_mask(segments_RT: Tensor) -> Tensor:
    """Which key each query sees, (R, 1, T, T) boolean: what came before, of the prefix or of its own branch.

    Padding sees itself alone, so that no softmax is empty; nothing sees padding.
    """
    query, key = segments_RT[:, :, None], segments_RT[:, None, :]
    T = segments_RT.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool, device=segments_RT.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=segments_RT.device)
    seen = earlier & (key != PAD) & ((key == PREFIX) | (key == query)) & (query != PAD)
    return (seen | itself)[:, None]


class Rows(NamedTuple):
    """Rows as the backbone takes them, user vectors in place."""

    embeddings_RTD: Tensor
    segments_RT: Tensor
    positions_RT: Tensor


def insert_user_vectors(embeddings_RTD: Tensor, batch: PreferenceBatch, user_RUD: Tensor | None, slot: int) -> Rows:
    """Put each row's U user vectors at column `slot`, as part of the prefix; what follows moves on by U."""
    if user_RUD is None or user_RUD.shape[1] == 0:
        return Rows(embeddings_RTD, batch.segments_RT, batch.positions_RT)
    s, (R, U, _) = slot, user_RUD.shape
    embeddings = torch.cat([embeddings_RTD[:, :s], user_RUD.to(embeddings_RTD.dtype), embeddings_RTD[:, s:]], dim=1)
    segments = torch.cat(
        [batch.segments_RT[:, :s], batch.segments_RT.new_full((R, U), PREFIX), batch.segments_RT[:, s:]], 1
    )
    slots = torch.arange(s, s + U, device=embeddings.device).expand(R, U)
    positions = torch.cat([batch.positions_RT[:, :s], slots, batch.positions_RT[:, s:] + U], dim=1)
    return Rows(embeddings, segments, positions)


def length_bucketed_updates(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The comparisons (as indices) of each update of an epoch, neighbours in length, in an order set by the seed.

    Shuffled pools of 16 updates are sorted by length and cut into updates, and the updates are shuffled: little is
    padding, and every comparison occurs once.
    """
    rng = random.Random(f"{seed}-{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    updates: list[list[int]] = []
    pool = 16 * batch_size
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda i: lengths[i])
        updates += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    rng.shuffle(updates)
    return updates


def micro_batches(indices: Sequence[int], comparisons: Sequence[EncodedComparison], size: int) -> list[list[int]]:
    """Cut indices of comparisons into groups of `size` of similar length, the longest first (memory peaks at once)."""
    by_length = sorted(indices, key=lambda i: (-comparisons[i].length, i))
    return [by_length[i : i + size] for i in range(0, len(by_length), size)]
