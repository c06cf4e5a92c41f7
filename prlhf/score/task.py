"""A model and its comparisons as one object, for training, evaluation and the dry run."""

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
    """A model, the comparisons that it is trained or evaluated on, and what is computed for them in advance."""

    config: Config
    model: PersonalizedModel
    comparisons: Sequence[EncodedComparison]
    reference: ResponseLogProbs | None = None  # of each comparison, on the CPU; None where the loss has no reference
    states: States | None = None  # of all responses, where they depend on neither training nor user
    names: Sequence[str | None] = ()  # each comparison's user, as named in the file

    @property
    def users(self) -> list[int]:
        """Each comparison's user by number, 0 for an unknown one."""
        return [c.user for c in self.comparisons]

    def outputs(self, indices: Sequence[int], users: Sequence[int]) -> Outputs:
        """The model's outputs for comparisons[indices], each read by its user in `users`."""
        return forward(self.model, [self.comparisons[i] for i in indices], users, self.states)

    def reference_of(self, indices: Sequence[int]) -> ResponseLogProbs | None:
        """The reference's log-probs of comparisons[indices], on the CPU."""
        if self.reference is None:
            return None
        rows = torch.as_tensor(indices)
        return ResponseLogProbs(*(t[rows] for t in self.reference))


def prepare_task(config: Config, model: PersonalizedModel, data: Dataset, base: str) -> Task:
    """A task with the reference log-probs and states that the config needs, from the cache or computed.

    The backbone must still be the reference. base: its `weights_fingerprint`. UserError: a comparison that is too long.
    """
    model.check_lengths(data.comparisons)  # in training nothing else does
    size = config.evaluate.batch_size
    states = fixed_states(model, data.comparisons, size, base)
    reference = None
    if needs_reference(config):
        where = computes_on(config.model, model.device.type)
        reference = reference_log_probs(lambda: model, data.comparisons, size, base, where)
    return Task(config, model, data.comparisons, reference, states, data.names)
