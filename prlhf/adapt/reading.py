"""Files of comparisons as a trained model reads them."""

import random
from collections.abc import Sequence

from prlhf.adapt.evidence import Judgements, judgements
from prlhf.batch.datasets import Dataset, encode_file
from prlhf.batch.tokens import EncodedComparison, Encoder
from prlhf.data.comparisons import ComparisonFile, read_comparisons
from prlhf.errors import expanded
from prlhf.store.final import Loaded

MOST_USERS = 200


def encoder_of(loaded: Loaded) -> Encoder:
    """Text to tokens, as in training."""
    config = loaded.config
    return Encoder(loaded.tokenizer, config.data, config.method, config.user_model.place)


def encoded(loaded: Loaded, file: ComparisonFile) -> Dataset:
    """The comparisons as tokens."""
    return encode_file(file, encoder_of(loaded), loaded.users)


def training_file(loaded: Loaded) -> ComparisonFile | None:
    """The comparisons that the model was trained on; None where the file is gone."""
    config = loaded.config
    if config.data.train is None or not expanded(config.data.train).is_file():
        return None
    return read_comparisons(config.data.train, config.data).sample(config.data.limit, config.seed)


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
