"""Files of comparisons as a trained model reads them."""

from prlhf.adapt.evidence import Judgements, judgements
from prlhf.batch.datasets import Dataset, encode_file
from prlhf.batch.tokens import Encoder
from prlhf.data.comparisons import ComparisonFile, read_comparisons
from prlhf.errors import expanded
from prlhf.store.final import Loaded


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


def training_judgements(loaded: Loaded, update: bool) -> Judgements | None:
    """What the users of training said in it, if that file is there and needed."""
    if loaded.posterior is not None and not update:
        return None
    file = training_file(loaded)
    return None if file is None else judgements(loaded, encoded(loaded, file).comparisons)
