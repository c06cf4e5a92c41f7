"""Held-out comparisons of a finished model, ready to be scored."""

from prlhf.backbone.loading import choose_device
from prlhf.batch.datasets import Dataset
from prlhf.data.comparisons import ComparisonFile, read_comparisons
from prlhf.data.unknown import check_users
from prlhf.method.losses import needs_reference
from prlhf.score.agreement import check_agreement
from prlhf.score.reference import computes_on, reference_log_probs
from prlhf.score.states import fixed_states
from prlhf.score.task import Task
from prlhf.store.final import Loaded, base_fingerprint, reference_model


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
