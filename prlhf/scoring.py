"""What a model says of many comparisons, without gradients: the reference's log-probs, and any model's for any users."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from prlhf.batching import micro_batches
from prlhf.encoding import EncodedComparison
from prlhf.losses import Outputs, ResponseLogProbs
from prlhf.personalized import PersonalizedModel


def score(
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    users: Sequence[int] | None,
    batch_size: int,
    layout: str = "tree",
    title: str | None = None,
) -> Outputs:
    """log p(y|x, u), or r(x, y, u), of both responses of each comparison, on the CPU in the comparisons' order.

    users: one number a comparison; None is the reference pi_SFT, which sees the reference's prefix.
    """
    model.check_lengths(comparisons)
    outputs: list[Outputs] = []
    order: list[int] = []
    training = model.training
    model.eval()
    bar = tqdm(total=len(comparisons), desc=title, disable=None if title else True, leave=False)
    with torch.no_grad():
        for indices in micro_batches(range(len(comparisons)), comparisons, batch_size):
            chosen = [comparisons[i] for i in indices]
            batch = model.collate(chosen, layout, reference=users is None).to(model.device)
            if users is None:
                with model.as_reference():
                    scored = model(batch, None)
            else:
                scored = model(batch, torch.tensor([users[i] for i in indices], device=model.device))
            outputs.append(type(scored)(*(t.cpu() for t in scored)))
            order += indices
            bar.update(len(indices))
    bar.close()
    model.train(training)
    back = torch.tensor(order).argsort()
    return type(outputs[0])(*(torch.cat(parts)[back] for parts in zip(*outputs)))


def select(log_probs: ResponseLogProbs | None, indices: Sequence[int], device: torch.device) -> ResponseLogProbs | None:
    """The log-probs of some of the comparisons, on `device`; None stays None."""
    if log_probs is None:
        return None
    rows = torch.as_tensor(indices)
    return ResponseLogProbs(*(t[rows].to(device) for t in log_probs))
