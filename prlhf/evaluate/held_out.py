"""Files of comparisons as a finished model reads them; held-out ones, ready to be scored."""

from prlhf.backbone.loading import choose_device
from prlhf.batch.datasets import Dataset, encode_file
from prlhf.batch.tokens import Encoder
from prlhf.data.comparisons import ComparisonFile, read_comparisons
from prlhf.data.unknown import check_users
from prlhf.errors import expanded
from prlhf.method.losses import needs_reference
from prlhf.score.agreement import check_agreement
from prlhf.score.reference import computes_on, reference_log_probs
from prlhf.score.states import fixed_states
from prlhf.score.task import Task
from prlhf.store.final import Loaded, base_fingerprint, reference_model


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


def read_held_out(source: str, loaded: Loaded) -> ComparisonFile:
    """The comparisons of a file. Prints which users the model does not know; UserError as of `check_users`."""
    form = loaded.config.data
    file = read_comparisons(source, form)
    if said := check_users(source, [c.user for c in file.comparisons], loaded.users, form):
        print(said)
    return file


def held_out_task(loaded: Loaded, data: Dataset) -> Task:
    """The comparisons with the reference's log-probs and the hidden states that scoring needs. Moves the model to its device."""
    config, size = loaded.config, loaded.config.evaluate.batch_size
    device = choose_device(config.device)
    base = base_fingerprint(loaded.path)
    reference = None
    if needs_reference(config):  # before the model is on the GPU, which need not have room for both
        reference = reference_log_probs(
            lambda: check_agreement(reference_model(loaded).to(device)),
            data.comparisons,
            size,
            base,
            computes_on(config.model, device),
        )
    model = loaded.model.to(device)
    check_agreement(model)
    states = fixed_states(model, data.comparisons, size, base)
    return Task(config, model, data.comparisons, reference, states, data.names)
