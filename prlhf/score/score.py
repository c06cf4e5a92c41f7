"""What a model says of many comparisons, without gradients: the reference's log-probs, and any model's for any users."""

from collections.abc import Hashable, Sequence

import torch
from tqdm import tqdm

from prlhf.batch.order import micro_batches, pair_of
from prlhf.batch.tokens import EncodedComparison
from prlhf.method.losses import Outputs, ResponseLogProbs
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import gathered_rows, rank, share, world_size


def score(
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    users: Sequence[int] | None,
    batch_size: int,
    title: str | None = None,
) -> Outputs:
    """log p(y|x, u), or r(x, y, u), of both responses of each comparison, on the CPU in the comparisons' order.

    users: one number a comparison; None is the reference pi_SFT, which sees the reference's prefix. batch_size: trees per
    forward pass; equal ones are computed once, and are kept together. Ranks share the work, and all know the result.
    """
    model.check_lengths(comparisons)
    outputs: list[Outputs] = []
    order: list[int] = []
    training = model.training
    model.eval()
    bar = tqdm(total=len(comparisons), desc=title, disable=None if title and rank() == 0 else True, leave=False)
    trees = tree_keys(model, comparisons, users)
    with torch.no_grad():
        for indices, counts in share(micro_batches(trees, [c.length for c in comparisons], batch_size)):
            chosen = [comparisons[i] for i in indices]
            if users is None:
                with model.as_reference():
                    scored = model(model.collate(chosen, None))
            else:
                scored = model(model.collate(chosen, [users[i] for i in indices]))
            outputs.append(type(scored)(*(t[: len(indices) * counts].cpu() for t in scored)))
            order += indices * counts
            bar.update(len(indices) * world_size())
    bar.close()
    model.train(training)
    return type(outputs[0])(*(gathered_rows(order, torch.cat(parts), len(comparisons)) for parts in zip(*outputs)))


def tree_keys(
    model: PersonalizedModel, comparisons: Sequence[EncodedComparison], users: Sequence[int] | None
) -> list[Hashable]:
    """What each comparison's tree is known by: its pair, and its reader where the backbone reads the user."""
    if users is None or not model.backbone_reads_users:
        return [pair_of(c) for c in comparisons]
    return [(pair_of(c), user) for c, user in zip(comparisons, users)]


def select(log_probs: ResponseLogProbs | None, indices: Sequence[int], device: torch.device) -> ResponseLogProbs | None:
    """The log-probs of some of the comparisons, on `device`; None stays None."""
    if log_probs is None:
        return None
    rows = torch.as_tensor(indices)
    return ResponseLogProbs(*(t[rows].to(device) for t in log_probs))
