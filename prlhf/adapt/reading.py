"""What training learned from, as evidence on its users."""

import random
from collections.abc import Sequence

from prlhf.adapt.evidence import Judgements, judgements
from prlhf.batch.tokens import EncodedComparison
from prlhf.evaluate.held_out import encoded, training_file
from prlhf.store.final import Loaded

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
