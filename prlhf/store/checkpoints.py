"""Checkpoints of training. A directory is complete or it is not there.

checkpoints/step_N/   *.safetensors (trained weights and the optimiser's state; each rank writes files of its own),
                      checksums-*.json, users.json, state.json
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.parallel.ranks import on_main, rank, summed, text_from_main, world_size
from prlhf.parallel.tensors import named_parameters, read_tensors, write_tensors
from prlhf.store.files import checksum, written_aside

OptimizerState = Mapping[torch.Tensor, dict[str, torch.Tensor]]  # by parameter


def training_tensors(model: nn.Module, state: OptimizerState) -> dict[str, torch.Tensor]:
    """What training changes, by name: the trained weights, and the optimiser's state of each."""
    weights = {name: p for name, p in named_parameters(model).items() if p.requires_grad and p.numel()}
    tensors = {f"model.{name}": p.detach() for name, p in weights.items()}
    for name, p in weights.items():
        for key, value in state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.view(1) if value.ndim == 0 else value
    return tensors


def save_step(
    folder: Path, model: nn.Module, optimizer: OptimizerState, users: UserIndex, state: dict[str, Any]
) -> Path:
    """Write folder/step_N, for exact resumption: weights, optimiser, `state`. TrainingError if it cannot be written."""

    def write_plain() -> None:
        users.save(aside / "users.json")
        (aside / "state.json").write_text(json.dumps(state) + "\n")

    path = folder / f"step_{state['step']}"
    with written_aside(path) as aside:
        on_main(write_plain)
        write_tensors(training_tensors(model, optimizer), aside)
        # Each rank checksums what it wrote: a network file system may show it the others' files only later.
        own, of_any_rank = f"shard-{rank() + 1:05d}-", ("shard-", "checksums-")  # torch counts ranks from 1
        names = [file.name for file in aside.iterdir()]
        names = [n for n in names if n.startswith(own) or (rank() == 0 and not n.startswith(of_any_rank))]
        checksums = {name: checksum(aside / name) for name in names}
        (aside / f"checksums-{rank()}.json").write_text(json.dumps(checksums))
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that `save_step` wrote. UserError where a file of the checkpoint is damaged or missing."""

    def recorded() -> str:
        try:
            checksums: dict[str, str] = {}
            for file in path.glob("checksums-*.json"):
                checksums.update(json.loads(file.read_text(encoding="utf-8")))
            found = {file.name for file in path.iterdir() if not file.name.startswith("checksums-")}
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(path, str(error)) from None
        if found != checksums.keys():
            raise _damaged(path, f"missing, or not written with it: {', '.join(sorted(found ^ checksums.keys()))}")
        return json.dumps(checksums)

    checksums = json.loads(text_from_main(recorded))
    names = sorted(checksums)
    damaged = torch.zeros(len(names))
    for i in range(rank(), len(names), world_size()):  # the ranks share the work
        damaged[i] = checksum(path / names[i]) != checksums[names[i]]
    if summed(damaged).any():
        raise _damaged(path, f"{names[int(damaged.argmax())]} is not what was written")
    return json.loads(text_from_main(lambda: (path / "state.json").read_text(encoding="utf-8")))


def load_step(path: Path, model: nn.Module, optimizer: OptimizerState | None = None) -> None:
    """Load a step, saved by any number of ranks. UserError for another model's; `read_state` tells if it is damaged."""
    read_tensors(training_tensors(model, optimizer or {}), path)


def _damaged(path: Path, reason: str) -> UserError:
    others = [other.name for other in steps(path.parent).values() if other != path]
    then = f"go on from another: {', '.join(others)}" if others else "begin anew; there is no other"
    return UserError(f"{path}: damaged checkpoint ({reason}); remove it to {then}")


def steps(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder, by step, ascending."""
    found = {int(m[1]): p for p in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))}
    return dict(sorted(found.items()))
