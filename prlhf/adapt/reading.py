"""Comparisons as adaptation reads them: what training learned from, as evidence on its users; tasks for a search."""

import random
from collections.abc import Sequence

from prlhf.adapt.evidence import Judgements, judgements
from prlhf.batch.tokens import EncodedComparison
from prlhf.evaluate.held_out import encoded, training_file
from prlhf.method.losses import needs_reference
from prlhf.score.agreement import check_agreement
from prlhf.score.reference import computes_on, reference_log_probs
from prlhf.score.task import Task
from prlhf.store.final import Loaded, base_fingerprint, reference_model

MOST_USERS = 200


def training_comparisons(loaded: Loaded) -> list[EncodedComparison] | None:
    """What the model was trained on, as tokens; None where the file is gone."""
    file = training_file(loaded)
    return None if file is None else encoded(loaded, file).comparisons


def training_judgements(loaded: Loaded, of: Sequence[int] = ()) -> Judgements | None:
    """What users of training said in it; None where that file is gone.

    These are all of them or, where there are more, MOST_USERS drawn at random, so that the cost does not grow with all; and
    `of`, known users.
    """
    if (comparisons := training_comparisons(loaded)) is None:
        return None
    judges = sorted({c.user for c in comparisons} - {0})
    if len(judges) > MOST_USERS:
        some = {*of, *random.Random(0).sample(judges, MOST_USERS)}
        comparisons = [c for c in comparisons if c.user in some]
    return judgements(loaded, comparisons) if comparisons else None


def task_of(loaded: Loaded, comparisons: list[EncodedComparison]) -> Task:
    """The comparisons with the reference's log-probs, as training computes them; the model's weights take no gradients.

    UserError for a comparison that is too long.
    """
    config, model = loaded.config, loaded.model.requires_grad_(False)
    model.check_lengths(comparisons)
    reference = None
    if needs_reference(config):
        reference = reference_log_probs(
            lambda: check_agreement(reference_model(loaded).to(model.device)), comparisons, config.evaluate.batch_size,
            base_fingerprint(loaded.path), computes_on(config.model, model.device.type),
        )  # fmt: skip
    return Task(config, model, comparisons, reference)
