"""What a run leaves on disk. A directory is complete or it is not there: written aside, synced, then renamed.

checkpoints/step_N/   weights.safetensors (all trained weights), optimizer.pt, users.json, state.json
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
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from prlhf import config as config_module
from prlhf.backbones import load_backbone, load_tokenizer, load_weights
from prlhf.config import Config
from prlhf.data import UserIndex
from prlhf.errors import UserError, did_you_mean
from prlhf.lora import load_lora, save_lora
from prlhf.personalized import PersonalizedLM, PersonalizedModel, build_model
from prlhf.reference import weights_fingerprint
from prlhf.user_models import UniformUsers, is_personal


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A fresh directory to write into; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for file in [*aside.rglob("*"), aside]:
            _sync(file)
        if path.exists():
            shutil.rmtree(path)
        os.rename(aside, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_step(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, users: UserIndex, state: dict[str, Any]
) -> Path:
    """Write folder/step_N with all that exact resumption needs: weights, optimiser, random state, `state`."""
    path = folder / f"step_{state['step']}"
    with written_aside(path) as aside:
        weights = {name: p.detach().cpu().contiguous() for name, p in trained_parameters(model).items()}
        save_file(weights, aside / "weights.safetensors")
        random_state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_state["cuda"] = torch.cuda.get_rng_state()
        torch.save({"optimizer": optimizer.state_dict(), "random": random_state}, aside / "optimizer.pt")
        users.save(aside / "users.json")
        (aside / "state.json").write_text(json.dumps(state) + "\n")
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The `state` that `save_step` wrote. UserError where it is damaged."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def load_step(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a step's weights (and, where an optimiser is given, its and the random state) back. UserError if damaged."""
    try:
        weights = load_file(path / "weights.safetensors")
        saved = torch.load(path / "optimizer.pt", weights_only=True) if optimizer else None
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, UnpicklingError) as error:
        raise _damaged(path, error) from None
    parameters = trained_parameters(model)
    if weights.keys() != parameters.keys():
        raise UserError(f"{path}: weights of another model (e.g. {sorted(weights.keys() ^ parameters.keys())[0]})")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    if optimizer and saved:
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"]["cpu"])
        if torch.cuda.is_available() and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"])


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged checkpoint ({error}); remove it to go on from the one before")


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
    """Write the model for use; `base` is the fingerprint of the weights that training started from."""
    with written_aside(path) as aside:
        if config.lora.rank:
            save_lora(model.backbone, config.lora, config.model.name, aside)
        elif not config.model.frozen:
            model.backbone.save_pretrained(aside)
        save_file(_user_state(model), aside / "users.safetensors")
        users.save(aside / "users.json")
        tokenizer.save_pretrained(aside)
        (aside / "config.yaml").write_text(config_module.dump(config), encoding="utf-8")
        described = {"name": config.model.name, "dtype": config.model.dtype, "fingerprint": base}
        (aside / "base.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


# What decides which model the saved weights are, and what of it may still change: where the base lies, how it computes.
FIXED = ("method", "model.", "user_model.", "lora.")
FREE = (
    "model.name", "model.layout", "model.share_trees", "model.log_probs", "model.gradient_checkpointing",
    "model.checkpoint_every", "model.compile",
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
    """Load what `save_final` wrote, in eval mode. UserError where it is damaged or the base model has changed."""
    path = find_final(checkpoint)
    config = config_module.load(path / "config.yaml", overrides)
    differing = config_module.differing_keys(config_module.load(path / "config.yaml"), config)
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
    return Loaded(path, config, tokenizer, users, model.eval())


def reference_model(loaded: Loaded) -> PersonalizedLM:
    """pi_SFT of a loaded model: itself where its backbone is the base's (adapters off), else the base loaded again."""
    if loaded.config.lora.rank or loaded.config.model.frozen:
        return loaded.model
    backbone = load_backbone(loaded.config.model, loaded.tokenizer, loaded.config.seed)
    _check_base(loaded.path, loaded.config, weights_fingerprint(backbone))
    nobody = UniformUsers(torch.zeros(0, backbone.config.hidden_size))
    return PersonalizedLM(backbone, nobody, None, 0, loaded.model.user_slot).to(loaded.model.device)


def base_fingerprint(path: Path) -> str:
    """The fingerprint of the weights that the model in `path` was trained from."""
    return _base(path)["fingerprint"]


def weights_checksum(path: Path) -> str:
    """A hash of all the safetensors files in a folder: which model it holds."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


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
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in _user_modules(model).items()
        for name, tensor in module.state_dict().items()
    }
