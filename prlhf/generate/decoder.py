"""Decoding with a KV cache, as trees, as training reads them (`batch.trees`).

What several requests read first alike is read once, and the responses to it stand behind it in one row:

    prefix | own 1 | own 2 | ... | y1_1 | y2_1 | ... | y1_2 | y2_2 | ...        own: what a request alone reads before its response

A response sees the prefix and itself. Where the user vectors stand before the prompt, the prefix is a prompt as one user reads
it, and nothing is left for `own`. Where they stand at its end, all users share the prompt up to there, and `own` is a user's
vectors and what follows them. Where the backbone reads no user, all share the whole prompt.

Shape suffixes: B responses, R rows, L lanes of a row, P = R L places, T columns, S new columns of each place, N pieces, Q = L S
new columns of a row, U user vectors, D width, V vocabulary.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prlhf.backbone.families import embeddings, head
from prlhf.generate.cache import GrowingCache
from prlhf.method.models import PersonalizedLM

PREFIX, PADDING = 0, -1  # the segments that all responses see, and that none sees
LANES = 8  # responses in one row: more read the prefix less often, and compute more of what the mask hides
FULL = 7 / 8  # of the lanes in use; with fewer the responses are laid out anew


class Context(NamedTuple):
    """What the backbone reads before a response, as embeddings: what requests with this `key` read alike, and its own rest."""

    key: Hashable
    shared_TD: Tensor
    own_SD: Tensor


class Decoder:
    """The state of decoding: trees of at most LANES responses in a KV cache, and each response's place in them.

    A place is row * lanes + lane. The segment of a column is PREFIX, PADDING, or 1 + the place of the one response that sees it.
    """

    def __init__(self, model: PersonalizedLM, user_BUD: Tensor, contexts: Sequence[Context]):
        """user_BUD: each response's user vectors, for a linear aggregator. contexts: what each response follows."""
        self.model, self.user_BUD, self.contexts = model, user_BUD, list(contexts)
        self.lanes, self.cache = 1, GrowingCache()
        prefixes = {context.key for context in contexts}
        self.segments_RT = torch.empty(len(prefixes), 0, dtype=torch.long, device=model.device)

    def prefill(self) -> Tensor:
        """Read the prompts; logits (B, V) of each response's first token, in float32."""
        device = self.model.device
        prefixes = {c.key: c.shared_TD for c in self.contexts}
        numbers = {key: number for number, key in enumerate(prefixes)}
        row_B = torch.tensor([numbers[c.key] for c in self.contexts], device=device)
        new_NSD, lengths_N = padded(list(prefixes.values()))
        every, zeros = torch.arange(len(prefixes), device=device), torch.zeros_like(lengths_N)
        if new_NSD.shape[1]:  # else all prompts are tails alone
            hidden_BD = self._read(new_NSD, lengths_N, every, zeros + PREFIX, zeros)[row_B]
        self.places_B, self.positions_B = row_B, lengths_N[row_B]
        self._lay_out()
        own = [context.own_SD for context in self.contexts]
        if any(map(len, own)):
            hidden_BD = self._read_own(*padded(own))
        return self._logits(hidden_BD)

    def decode_one_token(self, token_B: Tensor) -> Tensor:
        """Append one token to every response; logits (B, V) of the next."""
        return self._logits(self._read_own(embeddings(self.model.backbone, token_B[:, None]), torch.ones_like(token_B)))

    def keep(self, kept: list[int]) -> None:
        """Go on with these responses alone. Lanes of others stay unused until there are enough to be worth a new layout."""
        self.contexts = [self.contexts[b] for b in kept]
        self.user_BUD, self.places_B, self.positions_B = (
            state[kept] for state in (self.user_BUD, self.places_B, self.positions_B)
        )
        if len(kept) < FULL * len(self.segments_RT) * self.lanes:
            self._lay_out()

    def _lay_out(self) -> None:
        """Put the responses to one prefix into rows of `lanes_of` so many, with the columns that they see, and no others."""
        members: dict[Hashable, list[int]] = {}
        for b, context in enumerate(self.contexts):
            members.setdefault(context.key, []).append(b)
        before_RT, old, (_, T) = self.segments_RT.cpu(), self.places_B.tolist(), self.segments_RT.shape
        old_rows = [place // self.lanes for place in old]
        self.lanes = lanes_of(map(len, members.values()))
        rows = [group[i : i + self.lanes] for group in members.values() for i in range(0, len(group), self.lanes)]
        cells, segments, places = [], [], dict[int, int]()
        for r, row in enumerate(rows):
            places |= {b: r * self.lanes + lane for lane, b in enumerate(row)}
            parts = [(row[0], PREFIX, PREFIX), *((b, 1 + old[b], 1 + places[b]) for b in row)]
            columns = [(before_RT[old_rows[b]] == was).nonzero()[:, 0] for b, was, _ in parts]
            cells.append(torch.cat([old_rows[b] * T + column for (b, _, _), column in zip(parts, columns)]))
            segments.append(torch.cat([torch.full_like(column, now) for (_, _, now), column in zip(parts, columns)]))
        device = self.model.device
        self.cache.gather(pad_sequence(cells, batch_first=True).to(device))
        self.segments_RT = pad_sequence(segments, batch_first=True, padding_value=PADDING).to(device)
        self.places_B = torch.tensor([places[b] for b in range(len(old))], device=device)

    def _read_own(self, new_BSD: Tensor, lengths_B: Tensor) -> Tensor:
        """Append so many positions to every response; the hidden states (B, D) of their last ones."""
        hidden_BD = self._read(new_BSD, lengths_B, self.places_B, 1 + self.places_B, self.positions_B)
        self.positions_B = self.positions_B + lengths_B
        return hidden_BD

    def _read(
        self, new_NSD: Tensor, lengths_N: Tensor, places_N: Tensor, segments_N: Tensor, positions_N: Tensor
    ) -> Tensor:
        """Append embeddings at their places, from these position ids on; the hidden states (N, D) of their last positions."""
        (_, S, D), R, L = new_NSD.shape, len(self.segments_RT), self.lanes
        column_S = torch.arange(S, device=self.model.device)
        segments_NS = torch.where(column_S < lengths_N[:, None], segments_N[:, None], PADDING)
        segments_PS = segments_NS.new_full((R * L, S), PADDING).index_copy(0, places_N, segments_NS)
        positions_PS = torch.zeros_like(segments_PS).index_copy(0, places_N, positions_N[:, None] + column_S)
        embeddings_PSD = new_NSD.new_zeros(R * L, S, D).index_copy(0, places_N, new_NSD)

        self.segments_RT = torch.cat([self.segments_RT, segments_PS.view(R, L * S)], dim=1)
        key_T = torch.arange(self.segments_RT.shape[1], device=self.model.device)
        query_segment, key_segment = self.segments_RT[:, -L * S :, None], self.segments_RT[:, None]
        # Padding sees padding, itself too: the softmax of a query that sees nothing would be NaN.
        in_path = (key_segment == PREFIX) | (key_segment == query_segment)
        mask_RQT = in_path & (key_T <= key_T[-L * S :, None])
        hidden_RQD = self.model.states(
            embeddings_PSD.view(R, L * S, D), mask_RQT[:, None], positions_PS.view(R, L * S), self.cache
        )
        return hidden_RQD.reshape(R * L, S, D)[places_N, lengths_N - 1]

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        return head(self.model.backbone).logits(self.model.read_out(hidden_BD, self.user_BUD))


def padded(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pieces (S_n, D) as (N, S, D), padded at their ends, and their lengths (N,)."""
    lengths_N = torch.tensor([len(piece) for piece in pieces], device=pieces[0].device)
    return pad_sequence(pieces, batch_first=True), lengths_N


def lanes_of(responses: Iterable[int]) -> int:
    """How many responses a row takes, of so many to each prefix: at most LANES, where FULL of all places then are in use."""
    counts = list(responses)
    return max(
        lanes
        for lanes in range(1, min(LANES, max(counts)) + 1)
        if sum(counts) >= FULL * lanes * sum(-(-count // lanes) for count in counts)
    )


class Rereader:
    """As `Decoder`, for layout rows: each token reads all before it again, by the model's own forward pass. There is no
    cache, since families that need this layout have caches of their own, which left padding would spoil."""

    def __init__(self, model: PersonalizedLM, user_BUD: Tensor, contexts: Sequence[Context]):
        self.model, self.user_BUD = model, user_BUD
        self.rows = [torch.cat([context.shared_TD, context.own_SD]) for context in contexts]

    def prefill(self) -> Tensor:
        """Logits (B, V) of each row's next token, in float32."""
        lengths_B = torch.tensor([len(row) for row in self.rows], device=self.model.device)
        embeddings_BTD = pad_sequence(self.rows, batch_first=True)
        mask_BT = torch.arange(embeddings_BTD.shape[1], device=self.model.device) < lengths_B[:, None]
        hidden_BTD = self.model.states(embeddings_BTD, mask_BT, mask_BT.cumsum(dim=1) - 1)
        hidden_BD = hidden_BTD[torch.arange(len(self.rows)), lengths_B - 1]
        return head(self.model.backbone).logits(self.model.read_out(hidden_BD, self.user_BUD))

    def decode_one_token(self, token_B: Tensor) -> Tensor:
        """Append one token to every row; logits (B, V) of the next."""
        self.rows = [
            torch.cat([row, token]) for row, token in zip(self.rows, embeddings(self.model.backbone, token_B[:, None]))
        ]
        return self.prefill()

    def keep(self, kept: list[int]) -> None:
        """Go on with these rows alone."""
        self.user_BUD, self.rows = self.user_BUD[kept], [self.rows[b] for b in kept]
