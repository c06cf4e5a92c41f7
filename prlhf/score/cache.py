"""Tensors cached on disk, each under a fingerprint of what it was computed from. A damaged file is not used."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prlhf.parallel.ranks import from_main, on_any, on_main

# Changes where a version computes other numbers from the same fingerprint: what an earlier one cached is not taken. 2: logits'
# scales and caps, attention's sinks and caps.
VERSION = 2


def from_cache(path: Path, count: int, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor (_, count) of a file named by its fingerprint. If it is not valid, compute and write it."""
    cached = on_main(lambda: _read(path, path.stem, count))
    if not on_any(cached is not None):
        values = compute()
        on_main(lambda: _write(path, path.stem, values))
        return values
    return from_main(cached)


def bytes_of_tensor(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _checksum(fingerprint: str, values: Tensor) -> str:
    return hashlib.blake2b(
        f"{VERSION} {fingerprint}".encode() + bytes(bytes_of_tensor(values)), digest_size=16
    ).hexdigest()


def _write(path: Path, fingerprint: str, values: Tensor) -> None:
    """Write the values for the next start. Where that fails (a full disk), warn and go on: they are computed again then."""
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
    """The cached values (_, count); None where the file is missing, damaged, or has another shape or fingerprint."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values, checksum = file.get_tensor("values"), (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError):
        return None
    return values if values.shape[1:] == (count,) and checksum == _checksum(fingerprint, values) else None
