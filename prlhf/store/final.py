"""final/, the model for use: written after training, loaded by everything else."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from prlhf.backbone.loading import load_backbone, load_tokenizer, load_weights
from prlhf.backbone.lora import load_lora, lora_state, save_lora
from prlhf.backbone.toys import DTYPES
from prlhf.config.keys import Config
from prlhf.config.load import differing_keys, dump, load_resolved
from prlhf.data.users import UserIndex
from prlhf.errors import TrainingError, UserError, did_you_mean
from prlhf.method.build import build_model
from prlhf.method.models import Core, PersonalizedLM, PersonalizedModel
from prlhf.method.users import UniformUsers, is_personal
from prlhf.parallel.ranks import on_main, reason
from prlhf.parallel.tensors import named_parameters, whole
from prlhf.score.reference import weights_fingerprint
from prlhf.store.checkpoints import steps
from prlhf.store.files import checksum, written_aside


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
        (aside / "config.yaml").write_text(dump(config), encoding="utf-8")
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
FREE_KEYS = (
    "model.name", "model.layout", "model.share_trees", "model.log_probs", "model.recompute",
    "model.compile", "model.compute_dtype",
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
    config = load_resolved(path / "config.yaml", overrides)
    differing = differing_keys(load_resolved(path / "config.yaml"), config)
    fixed = [line for line in differing if line.startswith(FIXED) and not line.startswith(FREE_KEYS)]
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
    model = loaded.model
    return PersonalizedLM(Core(backbone, nobody, 0, model.user_slot, model.config, model.compute), None)


def base_fingerprint(path: Path) -> str:
    """The fingerprint of the weights that the model in `path` was trained from."""
    return _base(path)["fingerprint"]


def weights_checksum(path: Path) -> str:
    """A hash of all the safetensors files in a folder: which model it holds."""
    return checksum(*sorted(path.glob("*.safetensors")))


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
