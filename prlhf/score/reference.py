"""The reference's log-probs, computed once before training and cached on disk under a fingerprint.

The fingerprint covers the model's architecture, weights and type, the kind of device, and every token that the model sees,
so also the tokenizer, the template, the truncation and the data.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prlhf.backbone.lora import LoRALinear
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import ModelConfig
from prlhf.data.files import fingerprint_of
from prlhf.data.sources import cache_dir
from prlhf.method.losses import ResponseLogProbs
from prlhf.method.models import PersonalizedLM
from prlhf.parallel.ranks import rank, summed, world_size
from prlhf.parallel.tensors import full, named_weights
from prlhf.score.cache import bytes_of_tensor, from_cache
from prlhf.score.score import score

# Entries of a model's config that do not change what it computes.
NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def weights_fingerprint(backbone: nn.Module) -> str:
    """A hash of the backbone's architecture and weights, without LoRA's."""
    shape = {k: v for k, v in backbone.config.to_dict().items() if k not in NOT_ARCHITECTURE}
    digest = hashlib.blake2b(json.dumps(shape, sort_keys=True, default=str).encode(), digest_size=16)
    weights = _base_weights(backbone)
    hashes = torch.zeros(len(weights), 16, dtype=torch.int32)  # each weight is hashed by one rank
    for i, (_, weight) in enumerate(weights):
        whole = full(weight)
        if i % world_size() == rank():
            hashes[i] = torch.tensor(list(hashlib.blake2b(bytes_of_tensor(whole), digest_size=16).digest()))
    for (name, weight), digits in zip(weights, summed(hashes).tolist()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + bytes(digits))
    return digest.hexdigest()


def computes_on(config: ModelConfig, device: str) -> str:
    """The kind of device, and model.compute_dtype if it is set: other devices and types round differently."""
    return " ".join(filter(None, (device, config.compute_dtype)))


def reference_log_probs(
    reference: Callable[[], PersonalizedLM],
    comparisons: Sequence[EncodedComparison],
    batch_size: int,
    weights: str,
    where: str,
    folder: Path | None = None,
) -> ResponseLogProbs:
    """log pi_SFT(y|x) of both responses, each (N,), on the CPU. Taken from the cache where it has them.

    reference: returns the model; called only if the cache lacks the values. weights: the model's `weights_fingerprint`, from
    before training changed the weights. where: see `computes_on`.
    """

    def compute() -> Tensor:
        scored = score(reference(), comparisons, None, batch_size, title="reference")
        assert isinstance(scored, ResponseLogProbs)  # of a language model
        return torch.stack([scored.chosen, scored.rejected])

    seen = [[c.reference_prefix, c.chosen, c.rejected] for c in comparisons]
    path = (folder or cache_dir() / "reference") / f"{fingerprint_of(weights, where, seen)}.safetensors"
    cached = from_cache(path, len(comparisons), compute)
    lengths = [torch.tensor([len(ids) for ids in side]) for side in zip(*((c.chosen, c.rejected) for c in comparisons))]
    return ResponseLogProbs(cached[0], cached[1], lengths[0], lengths[1])


def _base_weights(backbone: nn.Module) -> list[tuple[str, Tensor]]:
    adapters = {id(p) for m in backbone.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)}
    named = named_weights(backbone).items()
    return sorted((name.replace(".base.", "."), t) for name, t in named if id(t) not in adapters)
