"""A model at work on comparisons. Training, evaluation and the dry run hand it on as one object."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prlhf.batch.datasets import Dataset
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config
from prlhf.method.losses import Outputs, ResponseLogProbs, needs_reference
from prlhf.method.models import PersonalizedModel
from prlhf.score.reference import computes_on, reference_log_probs
from prlhf.score.score import forward
from prlhf.score.states import States, fixed_states


@dataclass(frozen=True)
class Task:
    """A model, the comparisons that it is trained or evaluated on, and what it need not compute again for them."""

    config: Config
    model: PersonalizedModel
    comparisons: Sequence[EncodedComparison]
    reference: ResponseLogProbs | None = None  # of each comparison, on the CPU; None where the loss has no reference
    states: States | None = None  # of all responses, where neither training nor users change them
    names: Sequence[str | None] = ()  # who chose, as the file names them

    @property
    def users(self) -> list[int]:
        """Who chose, by number; 0 is unknown."""
        return [c.user for c in self.comparisons]

    def outputs(self, indices: Sequence[int], users: Sequence[int]) -> Outputs:
        """What the model says of comparisons[indices], each read by its user of `users`."""
        return forward(self.model, [self.comparisons[i] for i in indices], users, self.states)

    def reference_of(self, indices: Sequence[int]) -> ResponseLogProbs | None:
        """The reference's log-probs of comparisons[indices], on the model's device."""
        if self.reference is None:
            return None
        rows = torch.as_tensor(indices)
        return ResponseLogProbs(*(t[rows].to(self.model.device) for t in self.reference))


def prepare_task(config: Config, model: PersonalizedModel, data: Dataset, base: str) -> Task:
    """A task with its reference log-probs and states, where the config needs them, from the cache or computed.

    base: the `weights_fingerprint` of the backbone, which still is the reference.
    """
    size = config.evaluate.batch_size
    states = fixed_states(model, data.comparisons, size, base)
    reference = None
    if needs_reference(config):
        where = computes_on(config.model, model.device.type)
        reference = reference_log_probs(lambda: model, data.comparisons, size, base, where)
    return Task(config, model, data.comparisons, reference, states, data.names)
