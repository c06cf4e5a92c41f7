"""Personalized RLHF in plain PyTorch: a user model learned together with a language model.

Implements "Personalized Language Modeling from Personalized Human Feedback" (arXiv 2402.05133).

    model = prlhf.load("runs/mine")                             # a run's directory, or its final/
    model.generate(["What is rain?"], users=["alice"])          # responses, as text

`load` imports torch; `import prlhf` alone does not.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prlhf.generate.api import TextModel

__version__ = "0.1.0"


def load(checkpoint: str, *overrides: str) -> "TextModel":
    """The trained model in `checkpoint` (a run's directory or its final/), in eval mode on the config's device.

    overrides: config keys as --set takes them, `load("runs/mine", "device=cpu")` for one; only keys that leave the
    model what was trained. UserError where there is no finished model, its files are damaged, or the base model's
    weights are others than it was trained from. The methods are described at `prlhf.generate.api.TextModel`.
    """
    from prlhf.generate.api import TextModel
    from prlhf.store.final import load_final

    return TextModel(load_final(checkpoint, overrides))
