"""Baselines that train nothing: the base model of a run, without user vectors."""

from dataclasses import replace

from prlhf.errors import UserError, did_you_mean
from prlhf.store.final import Loaded, base_model

BASELINES = ("base",)


def untouched(loaded: Loaded, baseline: str) -> Loaded:
    """A run's base model in the place of the model that was trained, which is of no more use. It reads no user text before the
    prompt, and no user vectors. UserError for another baseline than BASELINES."""
    if baseline not in BASELINES:
        hint = did_you_mean(baseline, BASELINES)
        raise UserError(f"--baseline {baseline}: no such baseline{hint}; expected one of {', '.join(BASELINES)}")
    data = replace(loaded.config.data, user_text=False)
    return loaded._replace(model=base_model(loaded), config=replace(loaded.config, data=data))
