"""PairwisePreferenceModel, P_P(y1 over y2 | x, u): an LM that reads both responses, in both orders, and answers A or B."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from prlhf.backbone.families import head
from prlhf.batch.questions import PairQuestion
from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import PreferenceBatch
from prlhf.method.losses import Answers
from prlhf.method.models import Core, PersonalizedModel, of_comparisons


class PairwisePreferenceModel(PersonalizedModel):
    """The pairwise preference model of Dong et al. 2024 (arXiv 2405.07863, section 2.2) with a user model."""

    def __init__(self, core: Core, question: PairQuestion):
        super().__init__(core)
        self.answers = [question.answer_a, question.answer_b]

    def collate(self, comparisons: Sequence[EncodedComparison], users: Sequence[int] | None) -> PreferenceBatch:
        """The batch, in which the order of a question's two forms does not depend on which response is y1.

        Comparisons and the same ones swapped are then one forward pass, bit for bit: P(y1 over y2) + P(y2 over y1) = 1.
        """
        swapped = [c.rejected < c.chosen for c in comparisons]
        in_order = (sorted((c.chosen, c.rejected)) for c in comparisons)
        ordered = [c._replace(chosen=a, rejected=b) for c, (a, b) in zip(comparisons, in_order)]
        batch = super().collate(ordered, users)
        swapped_B1 = torch.tensor(swapped, device=batch.chosen_rejected_B2.device)[:, None]
        both_B2 = batch.chosen_rejected_B2
        return replace(batch, chosen_rejected_B2=torch.where(swapped_B1, both_B2.flip(1), both_B2))

    def forward(self, batch: PreferenceBatch) -> Answers:
        """The logit of y1's letter minus that of y2's, in both orders."""
        hidden_MD = self.states_at(batch, batch.last_at_M)
        dtype = torch.promote_types(hidden_MD.dtype, torch.float32)
        logits_M2 = head(self.backbone).of_tokens(self.answers, dtype).logits(hidden_MD.to(dtype))
        # y1 is A in the first order, B in the second.
        first_B, second_B = of_comparisons(logits_M2[:, 0] - logits_M2[:, 1], batch)
        return Answers(first_B, -second_B, batch.margin_B.to(first_B))
