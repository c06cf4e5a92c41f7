"""Which weights a model has, which its files hold, and what is refused where the two differ.

A weight is what a file must hold: a parameter, or a persistent buffer (a router's correction bias, a layer's scale).
"""

from torch import Tensor, nn


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name: its parameters, tied ones once, and its persistent buffers."""
    stored = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in stored}}
