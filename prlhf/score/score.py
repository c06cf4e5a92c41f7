"""Scores of many comparisons without gradients, as read by any users or by the reference."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import torch
from tqdm import tqdm

from prlhf.batch.order import micro_batches, pair_of
from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import USERS_PER_TREE
from prlhf.method.losses import Outputs
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import gathered_rows, rank, share, world_size
from prlhf.score.states import States


def forward(
    model: PersonalizedModel, comparisons: Sequence[EncodedComparison], users: Sequence[int], states: States | None
) -> Outputs:
    """The model's outputs for a batch of comparisons, each read by its entry of `users`. Known `states` are not recomputed."""
    batch = model.collate(comparisons, users)
    return model(batch) if states is None else model(batch, states.of(batch.readings))


def score(
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    users: Sequence[int] | None,
    batch_size: int,
    title: str | None = None,
    states: States | None = None,
) -> Outputs:
    """log p(y|x, u) or r(x, y, u) of both responses of each comparison, on the CPU, in the comparisons' order.

    users: which user reads each comparison; None for the reference pi_SFT, which sees the reference's prefix. batch_size:
    trees per forward pass; equal trees are computed once. Ranks share the work, and all receive the result.
    """
    model.check_lengths(comparisons)
    outputs: list[Outputs] = []
    order: list[int] = []
    training = model.training
    model.eval()
    bar = tqdm(total=len(comparisons), desc=title, disable=None if title and rank() == 0 else True, leave=False)
    trees = tree_keys(model, comparisons, users)
    with torch.no_grad():
        for indices, is_mine in share(micro_batches(trees, [c.length for c in comparisons], batch_size)):
            batch = [comparisons[i] for i in indices]
            if users is None:
                with model.as_reference():
                    scored = model(model.collate(batch, None))
            else:
                scored = forward(model, batch, [users[i] for i in indices], states)
            mine = indices if is_mine else []
            outputs.append(type(scored)(*(t[: len(mine)].cpu() for t in scored)))
            order += mine
            bar.update(len(indices) * world_size())
    bar.close()
    model.train(training)
    return type(outputs[0])(*(gathered_rows(order, torch.cat(parts), len(comparisons)) for parts in zip(*outputs)))


def score_readers(
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    readers: Mapping[str, Sequence[int]],
    batch_size: int,
    states: States | None = None,
) -> dict[str, Outputs]:
    """`score` for several assignments of users to the comparisons, by name. Each pair (comparison, user) is computed once."""
    places = dict.fromkeys(place for users in readers.values() for place in enumerate(users))
    row = {place: n for n, place in enumerate(places)}
    indices, as_users = zip(*row)
    scored = score(model, [comparisons[i] for i in indices], as_users, batch_size, "evaluation", states)
    rows = {name: [row[place] for place in enumerate(users)] for name, users in readers.items()}
    return {name: type(scored)(*(t[rows_B] for t in scored)) for name, rows_B in rows.items()}


def tree_keys(
    model: PersonalizedModel, comparisons: Sequence[EncodedComparison], users: Sequence[int] | None
) -> list[Hashable]:
    """A key for each comparison's tree. Equal keys: the same pair and, if the backbone reads the user, the same user. Of users
    who share the prompt (user_model.place), USERS_PER_TREE have one key."""
    if users is None or not model.backbone_reads_users:
        return [pair_of(c) for c in comparisons]
    if not model.users_share:
        return [(pair_of(c), user) for c, user in zip(comparisons, users)]
    numbers: dict[Hashable, dict[int, int]] = defaultdict(dict)  # pair -> its users in the order in which they come
    keys: list[Hashable] = []
    for c, user in zip(comparisons, users):
        of_pair = numbers[pair_of(c)]
        keys.append((pair_of(c), of_pair.setdefault(user, len(of_pair)) // USERS_PER_TREE))
    return keys
