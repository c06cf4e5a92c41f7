"""What a model that training does not change says of the data, computed once and kept on disk under a fingerprint:
the reference's log-probs, and the hidden states of a frozen backbone.

The fingerprint covers the model's architecture, weights and type, the kind of device, and every token it sees (so
tokenizer, template, truncation and data). A cache file is written aside and renamed, and carries a checksum: it is
right, or it is not used.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from prlhf.batching import Reading
from prlhf.config import ModelConfig
from prlhf.data.files import fingerprint_of
from prlhf.data.sources import cache_dir
from prlhf.distributed import (
    from_main,
    full,
    gathered_rows,
    named_parameters,
    on_any,
    on_main,
    rank,
    share,
    summed,
    world_size,
)
from prlhf.encoding import EncodedComparison
from prlhf.lora import LoRALinear
from prlhf.losses import ResponseLogProbs
from prlhf.personalized import PersonalizedLM, PersonalizedModel, PersonalizedRewardModel
from prlhf.scoring import score

# What a model's config says beside how it computes.
NOT_ARCHITECTURE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")


def weights_fingerprint(backbone: nn.Module) -> str:
    """A hash of the backbone's architecture and all its weights, adapters left out (LoRA does not change it)."""
    shape = {k: v for k, v in backbone.config.to_dict().items() if k not in NOT_ARCHITECTURE}
    digest = hashlib.blake2b(json.dumps(shape, sort_keys=True, default=str).encode(), digest_size=16)
    weights = _base_parameters(backbone)
    hashes = torch.zeros(len(weights), 16, dtype=torch.int32)  # of each weight, by one of the ranks
    for i, (_, weight) in enumerate(weights):
        whole = full(weight)
        if i % world_size() == rank():
            hashes[i] = torch.tensor(list(hashlib.blake2b(_bytes(whole), digest_size=16).digest()))
    for (name, weight), digits in zip(weights, summed(hashes).tolist()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + bytes(digits))
    return digest.hexdigest()


def computes_on(config: ModelConfig, device: str) -> str:
    """What log-probs are computed on, and in which type if not the weights': others round differently."""
    return " ".join(filter(None, (device, config.compute_dtype)))


def reference_log_probs(
    reference: Callable[[], PersonalizedLM],
    comparisons: Sequence[EncodedComparison],
    batch_size: int,
    weights: str,
    where: str,
    folder: Path | None = None,
) -> ResponseLogProbs:
    """log pi_SFT(y|x) of both responses, each (N,) on the CPU; from the cache where it holds exactly these.

    reference: gives the model, asked for only where the cache does not hold what is needed.
    weights: its `weights_fingerprint`, taken while the weights still are the reference's.
    where: what it `computes_on`.
    """

    def compute() -> Tensor:
        scored = score(reference(), comparisons, None, batch_size, title="reference")
        return torch.stack([scored.chosen, scored.rejected])

    seen = [[c.reference_prefix, c.chosen, c.rejected] for c in comparisons]
    path = (folder or cache_dir() / "reference") / f"{fingerprint_of(weights, where, seen)}.safetensors"
    cached = _cached(path, len(comparisons), compute)
    lengths = [torch.tensor([len(ids) for ids in side]) for side in zip(*((c.chosen, c.rejected) for c in comparisons))]
    return ResponseLogProbs(cached[0], cached[1], lengths[0], lengths[1])


def response_states(
    model: PersonalizedRewardModel, comparisons: Sequence[EncodedComparison], batch_size: int, weights: str
) -> tuple[list[Reading], Tensor]:
    """All responses, each once, and their pooled hidden states (M, W) on the CPU, from the cache where it holds exactly these.

    Of a backbone that does not read the user, as it is now. Arguments as of `reference_log_probs`.
    """
    readings = readings_of(comparisons)
    pooling = model.config.pooling
    parts = (weights, model.device.type, readings, *([] if pooling == "last" else [pooling]))
    path = cache_dir() / "states" / f"{fingerprint_of(*parts)}.safetensors"
    states = _cached(path, len(readings), lambda: _states(model, readings, batch_size).T)
    return readings, states.T.contiguous()


def remember_states(
    model: PersonalizedModel, comparisons: Sequence[EncodedComparison], batch_size: int, weights: str
) -> None:
    """Give a reward model with a frozen backbone and a linear head the hidden states of all responses; others need none."""
    if remembers_states(model):
        readings, states = response_states(model, comparisons, batch_size, weights)
        model.known_states.update(zip(readings, states.to(model.device).unbind()))


def remembers_states(model: PersonalizedModel) -> TypeGuard[PersonalizedRewardModel]:
    """Whether the hidden states of all responses are computed before the training, and kept."""
    return isinstance(model, PersonalizedRewardModel) and model.keeps_states


def readings_of(comparisons: Sequence[EncodedComparison]) -> list[Reading]:
    """All responses, each once, as nobody in particular reads them."""
    prefixes = (tuple(c.prefix) for c in comparisons)
    both = ((prefix, response) for prefix, c in zip(prefixes, comparisons) for response in (c.chosen, c.rejected))
    return list(dict.fromkeys(Reading(0, prefix, tuple(response)) for prefix, response in both))


def _states(model: PersonalizedRewardModel, readings: Sequence[Reading], batch_size: int) -> Tensor:
    """Last hidden states (M, D), of which each rank computes some."""
    rows: list[int] = []
    parts: list[Tensor] = []
    bar = tqdm(total=len(readings), desc="hidden states", leave=False, disable=None if rank() == 0 else True)
    for start, counts in share(range(0, len(readings), batch_size)):
        some = readings[start : start + batch_size]
        states = model.states_of(some)
        parts.append(states[: len(some) * counts])
        rows += range(start, start + len(some) * counts)
        bar.update(len(some) * world_size())
    bar.close()
    return gathered_rows(rows, torch.cat(parts), len(readings))


def _cached(path: Path, count: int, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor (_, count) in a cache file that is named by its fingerprint; computed and written where it is not.

    Rank 0 reads and writes; what it knows, all know.
    """
    cached = on_main(lambda: _read(path, path.stem, count))
    if not on_any(cached is not None):
        cached = compute()
        on_main(lambda: _write(path, path.stem, cached))
        return cached
    return from_main(cached)


def _base_parameters(backbone: nn.Module) -> list[tuple[str, Tensor]]:
    adapters = {id(p) for m in backbone.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)}
    named = named_parameters(backbone).items()
    return sorted((name.replace(".base.", "."), p) for name, p in named if id(p) not in adapters)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _checksum(fingerprint: str, values: Tensor) -> str:
    return hashlib.blake2b(fingerprint.encode() + bytes(_bytes(values)), digest_size=16).hexdigest()


def _write(path: Path, fingerprint: str, values: Tensor) -> None:
    """Keep values for the next start, which computes them again where that cannot be (a full disk, say)."""
    aside = path.with_suffix(f".partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"values": values.contiguous()}, aside, metadata={"checksum": _checksum(fingerprint, values)})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        print(f"warning: {path} cannot be written ({error}); going on without it", file=sys.stderr)


def _read(path: Path, fingerprint: str, count: int) -> Tensor | None:
    """The cached (_, count) values, or None where the file is absent, damaged or of something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values, checksum = file.get_tensor("values"), (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError):
        return None
    if values.shape[1:] != (count,) or checksum != _checksum(fingerprint, values):
        return None
    return values
