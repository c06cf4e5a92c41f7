"""What a run leaves on disk. A directory is complete or it is not there: written aside, synced, then renamed.

checkpoints/step_N/   *.safetensors (trained weights and the optimiser's state, in shards: files of its own for each rank),
                      checksums-*.json, users.json, state.json
final/                for use: model.safetensors or adapter_model.safetensors (none if frozen), users.safetensors, users.json,
                      config.yaml, base.json, tokenizer
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedTokenizerBase

from prlhf import config as config_module
from prlhf.config import Config
from prlhf.data import UserIndex
from prlhf.distributed import (
    barrier,
    named_parameters,
    on_main,
    rank,
    read_tensors,
    reason,
    summed,
    text_from_main,
    whole,
    world_size,
    write_tensors,
)
from prlhf.errors import TrainingError, UserError, did_you_mean
from prlhf.loading import DTYPES, load_backbone, load_tokenizer, load_weights
from prlhf.lora import load_lora, lora_state, save_lora
from prlhf.optim import Optimizers
from prlhf.personalized import PersonalizedLM, PersonalizedModel, build_model
from prlhf.reference import weights_fingerprint
from prlhf.user_models import UniformUsers, is_personal


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A fresh directory for all ranks to write into; on success it takes the place of `path`, on failure it is removed."""
    aside = path.parent / f".{path.name}.partial"

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".*.partial"):  # of a process that was killed meanwhile
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir()

    def finish() -> None:
        for file in [*aside.rglob("*"), aside]:
            _sync(file)
        old = path.parent / f".{path.name}.old.partial"
        if path.exists():
            os.rename(path, old)
        os.rename(aside, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)

    try:
        on_main(begin)
        yield aside
        barrier()  # all have written
        on_main(finish)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def training_tensors(model: nn.Module, optimizer: Optimizers | None) -> dict[str, torch.Tensor]:
    """What training changes, by name: the trained weights, and the optimiser's state of each."""
    weights = {name: p for name, p in named_parameters(model).items() if p.requires_grad and p.numel()}
    tensors = {f"model.{name}": p.detach() for name, p in weights.items()}
    state = optimizer.state if optimizer else {}
    for name, p in weights.items():
        for key, value in state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.view(1) if value.ndim == 0 else value
    return tensors


def save_step(folder: Path, model: nn.Module, optimizer: Optimizers, users: UserIndex, state: dict[str, Any]) -> Path:
    """Write folder/step_N with all that exact resumption needs: weights, optimiser, `state`; each rank its shards.

    TrainingError where it cannot be written (a full disk, say); what was there before stays good.
    """
    path = folder / f"step_{state['step']}"

    def write_plain() -> None:
        users.save(aside / "users.json")
        (aside / "state.json").write_text(json.dumps(state) + "\n")

    try:
        with written_aside(path) as aside:
            on_main(write_plain)
            write_tensors(training_tensors(model, optimizer), aside)
            # Each rank those that it wrote, which it sees on any file system: torch names them by the rank, from 1.
            own, others = f"shard-{rank() + 1:05d}-", ("shard-", "checksums-")
            names = [file.name for file in aside.iterdir()]
            names = [n for n in names if n.startswith(own) or (rank() == 0 and not n.startswith(others))]
            checksums = {name: _checksum(aside / name) for name in names}
            (aside / f"checksums-{rank()}.json").write_text(json.dumps(checksums))
    except (OSError, CheckpointException) as error:
        raise TrainingError(f"{path}: cannot be written ({reason(error)}); checkpoints before it are good") from None
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
    for i in range(rank(), len(names), world_size()):
        damaged[i] = _checksum(path / names[i]) != checksums[names[i]]
    if summed(damaged).any():
        raise _damaged(path, f"{names[int(damaged.argmax())]} is not what was written")
    return json.loads(text_from_main(lambda: (path / "state.json").read_text(encoding="utf-8")))


def load_step(path: Path, model: nn.Module, optimizer: Optimizers | None = None) -> None:
    """Put a step's weights, and, where one is given, the optimiser's state back, whatever the number of ranks that saved.

    UserError where it is of another model. `read_state` says whether it is damaged.
    """
    read_tensors(training_tensors(model, optimizer), path)


def _checksum(*files: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> UserError:
    others = [other.name for other in steps(path.parent).values() if other != path]
    then = f"go on from another: {', '.join(others)}" if others else "begin anew; there is no other"
    return UserError(f"{path}: damaged checkpoint ({reason}); remove it to {then}")


def steps(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder, by step, ascending."""
    found = {int(m[1]): p for p in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))}
    return dict(sorted(found.items()))


def save_final(
    path: Path,
    model: PersonalizedModel,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    users: UserIndex,
    base: str,
) -> None:
    """Write the model for use; `base` is the fingerprint of the weights that training started from.

    A plain Hugging Face folder, or PEFT adapter, whatever the number of ranks; rank 0 holds all weights meanwhile.
    TrainingError where it cannot be written (a full disk, say).
    """
    named_parameters(model)  # sharded from here on, where the model is
    adapters = whole(lora_state(model.backbone))
    trained = not config.lora.rank and not config.model.frozen
    weights = whole(dict(model.backbone.named_parameters()) if trained else {})
    users_state = whole(_user_state(model))

    def write() -> None:
        if config.lora.rank:
            save_lora(model.backbone, config.lora, config.model.name, aside, adapters)
        elif trained:
            model.backbone.save_pretrained(aside, state_dict=weights)
        save_file(users_state, aside / "users.safetensors")
        users.save(aside / "users.json")
        tokenizer.save_pretrained(aside)
        (aside / "config.yaml").write_text(config_module.dump(config), encoding="utf-8")
        described = {"name": config.model.name, "dtype": config.model.dtype, "fingerprint": base}
        (aside / "base.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    try:
        with written_aside(path) as aside:
            on_main(write)
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # as tokenizers raises
            raise
        raise TrainingError(
            f"{path}: cannot be written ({reason(error)}); the last checkpoint is good, and the same command goes on "
            "from it"
        ) from None


# What decides which model the saved weights are, and what of it may still change: where the base lies, how it computes.
FIXED = ("method", "model.", "user_model.", "lora.")
FREE = (
    "model.name", "model.layout", "model.share_trees", "model.log_probs", "model.gradient_checkpointing",
    "model.checkpoint_every", "model.recompute", "model.compile", "model.compute_dtype",
)  # fmt: skip


class Loaded(NamedTuple):
    """A model for use, with what belongs to it."""

    path: Path
    config: Config
    tokenizer: PreTrainedTokenizerBase
    users: UserIndex
    model: PersonalizedModel

    def number(self, name: str | None) -> int:
        """The user as whom the model answers `name`: 0 for the unknown, and for all where nothing personal was trained."""
        personal = is_personal(self.model.user_model, self.config.loss.alpha)
        return self.users.number(name) if personal else 0

    def required_number(self, name: str) -> int:
        """As `number`, but UserError for a name that is neither known nor 'generic'."""
        self.users.required_number(name)
        return self.number(name)


def find_final(checkpoint: str | Path) -> Path:
    """The final/ folder meant by a path: itself, or that of the run. UserError where there is none."""
    path = Path(checkpoint).expanduser()
    for candidate in (path, path / "final"):
        if (candidate / "users.json").is_file():
            return candidate
    if path.is_dir():
        unfinished = steps(path / "checkpoints")
        hint = f"; its training stopped at step {max(unfinished)}, the same train command goes on" if unfinished else ""
        raise UserError(f"{path}: no finished model in it (no users.json, no final/){hint}")
    near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{path}: no such checkpoint{did_you_mean(str(path), near)}")


def load_final(checkpoint: str | Path, overrides: tuple[str, ...] = ()) -> Loaded:
    """Load what `save_final` wrote, in eval mode, in the type that it computed in. UserError where it is damaged or the
    base model has changed."""
    path = find_final(checkpoint)
    config = config_module.load_resolved(path / "config.yaml", overrides)
    differing = config_module.differing_keys(config_module.load_resolved(path / "config.yaml"), config)
    fixed = [line for line in differing if line.startswith(FIXED) and not line.startswith(FREE)]
    if fixed:
        raise UserError(f"{path}: --set would make it another model than was trained: {', '.join(fixed)}")
    users = UserIndex.load(path / "users.json")
    tokenizer = load_tokenizer(config.model, path)
    if config.lora.rank or config.model.frozen:
        backbone = load_backbone(config.model, tokenizer, config.seed)
        _check_base(path, config, weights_fingerprint(backbone))
    else:
        backbone = load_weights(path, config.model.dtype)
    model = build_model(config, tokenizer, len(users), backbone)
    try:
        if config.lora.rank:
            load_lora(model.backbone, path)
        state = load_file(path / "users.safetensors")
        for part, module in _user_modules(model).items():
            prefix = f"{part}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: damaged or incomplete model ({error})") from None
    _to_compute_type(model.backbone, config)
    return Loaded(path, config, tokenizer, users, model.eval())


def _to_compute_type(backbone: nn.Module, config: Config) -> None:
    """As FSDP gathers them in training: parameters in model.compute_dtype where that is set; buffers as they are."""
    if config.model.compute_dtype:
        for p in backbone.parameters():
            p.data = p.data.to(DTYPES[config.model.compute_dtype])


def reference_model(loaded: Loaded) -> PersonalizedLM:
    """pi_SFT of a loaded model: itself where its backbone is the base's (adapters off), else the base loaded again, on the
    CPU."""
    if loaded.config.lora.rank or loaded.config.model.frozen:
        return loaded.model
    backbone = load_backbone(loaded.config.model, loaded.tokenizer, loaded.config.seed)
    _check_base(loaded.path, loaded.config, weights_fingerprint(backbone))
    _to_compute_type(backbone, loaded.config)
    nobody = UniformUsers(torch.zeros(0, backbone.config.hidden_size))
    return PersonalizedLM(backbone, nobody, None, 0, loaded.model.user_slot, loaded.model.config)


def base_fingerprint(path: Path) -> str:
    """The fingerprint of the weights that the model in `path` was trained from."""
    return _base(path)["fingerprint"]


def weights_checksum(path: Path) -> str:
    """A hash of all the safetensors files in a folder: which model it holds."""
    return _checksum(*sorted(path.glob("*.safetensors")))


def _base(path: Path) -> dict[str, str]:
    try:
        base = json.loads((path / "base.json").read_text(encoding="utf-8"))
        return {name: base[name] for name in ("dtype", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'base.json'}: cannot be read ({error})") from None


def _check_base(path: Path, config: Config, fingerprint: str) -> None:
    base = _base(path)
    if base["dtype"] == config.model.dtype and base["fingerprint"] != fingerprint:
        raise UserError(f"{path}: the base model's weights are not those that this model was trained from")


def _user_modules(model: PersonalizedModel) -> dict[str, nn.Module]:
    parts = {name: getattr(model, name, None) for name in ("user_model", "aggregator", "value_head")}
    return {name: part for name, part in parts.items() if part is not None}


def _user_state(model: PersonalizedModel) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part, module in _user_modules(model).items()
        for name, tensor in module.state_dict().items()
    }
