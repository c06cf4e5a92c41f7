"""Many processes train as one, and models that are described before they are loaded."""

import pytest
import torch

from prlhf import config
from prlhf.backbones import empty_backbone, load_backbone, load_tokenizer


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_an_empty_backbone_is_the_real_one_without_values(family):
    model = config.load(None, [f"model.family={family}"]).model
    tokenizer = load_tokenizer(model)
    empty, real = empty_backbone(model, tokenizer), load_backbone(model, tokenizer, seed=0)

    def described(parameters):
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in parameters}

    assert described(empty.named_parameters()) == described(real.named_parameters())
    assert all(p.is_meta for p in empty.parameters())
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    assert all(torch.equal(buffers[name], b) for name, b in real.named_buffers())
