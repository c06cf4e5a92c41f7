"""final/, the model for use: written after training, loaded by everything else.

It holds model.safetensors (or adapter_model.safetensors, or neither where the backbone is frozen), users.safetensors,
users.json, config.yaml, base.json and the tokenizer; with users who were adapted to it (`adapt`), posterior.safetensors and
told.json.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from prlhf.backbone.loading import load_backbone, load_tokenizer, load_weights
from prlhf.backbone.lora import load_lora, lora_state, remove_lora, save_lora
from prlhf.backbone.toys import DTYPES
from prlhf.config.keys import Config
from prlhf.config.load import differing_keys, dump, load_resolved
from prlhf.data.users import UserIndex
from prlhf.errors import UserError, did_you_mean, expanded
from prlhf.method.build import build_model, without_users
from prlhf.method.models import PersonalizedLM, PersonalizedModel
from prlhf.method.posterior import Posterior
from prlhf.method.users import is_personal
from prlhf.parallel.ranks import on_main
from prlhf.parallel.tensors import named_weights, whole
from prlhf.score.reference import weights_fingerprint
from prlhf.store.checkpoints import steps
from prlhf.store.files import checksum, link_or_copy, written_aside


def save_final(
    path: Path, model: PersonalizedModel, config: Config, tokenizer: Tokenizer, users: UserIndex, base: str
) -> None:
    """Write the model for use: a plain Hugging Face folder or PEFT adapter, for any number of ranks.

    base: the initial weights' fingerprint. Rank 0 holds all weights while it writes. TrainingError where that fails.
    """
    stored = named_weights(model.backbone)
    adapters = whole(lora_state(model.backbone))
    full_tuning = not config.lora.rank and not config.model.frozen
    weights = whole(stored if full_tuning else {})
    user_weights = whole(_user_modules(model).state_dict())

    def write() -> None:
        if config.lora.rank:
            save_lora(model.backbone, config.lora, config.model.name, aside, adapters)
        elif full_tuning:
            model.backbone.save_pretrained(aside, state_dict=weights)
        save_file(user_weights, aside / "users.safetensors")
        users.save(aside / "users.json")
        tokenizer.save_pretrained(aside)
        (aside / "config.yaml").write_text(dump(config), encoding="utf-8")
        described = {"name": config.model.name, "dtype": config.model.dtype, "fingerprint": base}
        (aside / "base.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    with written_aside(path) as aside:
        on_main(write)


def save_adapted(
    path: Path,
    source: Path,
    users: UserIndex,
    table: str,
    rows: Tensor,
    posterior: Posterior | None,
    told: dict[str, list[str]] | None = None,
) -> None:
    """Write the model of `source` with other users, to a new folder or in its own place.

    rows: of the user model's `table`. posterior: of the adapted users, if any. told: hashes of what they told, by name, if any.
    All other weights are as they were, bit for bit; files that do not change are linked.
    TrainingError where that fails; `source` is then as it was.
    """
    weights = {**load_file(source / "users.safetensors"), f"user_model.{table}": rows.contiguous()}

    def others(folder: str, names: list[str]) -> list[str]:
        """What is not linked; in place, what else lies in the folder (eval/) stays."""
        new = path != source
        return [n for n in names if n in OF_USERS or (new and (Path(folder) / n).is_dir())]

    with written_aside(path, shared=True) as aside:
        shutil.copytree(source, aside, copy_function=link_or_copy, ignore=others, dirs_exist_ok=True)
        save_file(weights, aside / "users.safetensors")
        if posterior is not None:
            save_file({n: t.contiguous() for n, t in posterior._asdict().items() if t is not None}, aside / POSTERIOR)
        if told:
            (aside / TOLD).write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
        users.save(aside / "users.json")


# Keys that decide which model the weights make, and those of them that may change: the base's path, how it computes.
FIXED = ("method", "model.", "user_model.", "lora.")
FREE_KEYS = (
    "model.name", "model.layout", "model.share_trees", "model.log_probs", "model.recompute",
    "model.compile", "model.compute_dtype",
)  # fmt: skip


POSTERIOR, TOLD = "posterior.safetensors", "told.json"
OF_USERS = ("users.safetensors", "users.json", POSTERIOR, TOLD)  # the files that change with new users


class Loaded(NamedTuple):
    """A model for use, with what belongs to it."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    users: UserIndex
    model: PersonalizedModel
    posterior: Posterior | None = None  # of users who were adapted to it

    def backbone_weights(self) -> str:
        """Tells the backbone from others, as `weights_fingerprint`, where it has been trained too."""
        if self.config.model.frozen:
            return base_fingerprint(self.path)
        return checksum(*(file for file in sorted(self.path.glob("*.safetensors")) if file.name not in OF_USERS))

    def number(self, name: str | None) -> int:
        """The number of the user `name`; 0 for an unknown user, and for all users where nothing personal was trained."""
        return self.users.number(name) if is_personal(self.model.user_model, self.config.loss.alpha) else 0

    def required_number(self, name: str) -> int:
        """As `number`, but UserError for a name that is neither known nor 'generic'."""
        self.users.required_number(name)
        return self.number(name)


def find_final(checkpoint: str | Path) -> Path:
    """The final/ folder that a path means: itself, or the run's. UserError where there is none."""
    path = expanded(checkpoint)
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
    """Load what `save_final` wrote, in eval mode, in the type that it computed in.

    overrides: key=value, of keys that leave it the same model. UserError where it is damaged or the base model changed.
    """
    path = find_final(checkpoint)
    config = load_resolved(path / "config.yaml", overrides)
    differing = differing_keys(load_resolved(path / "config.yaml"), config)
    fixed = [line for line in differing if line.startswith(FIXED) and not line.startswith(FREE_KEYS)]
    if fixed:
        raise UserError(f"{path}: --set would make it another model than was trained: {', '.join(fixed)}")
    users = UserIndex.load(path / "users.json")
    tokenizer = load_tokenizer(config.model, path)
    from_base = config.lora.rank or config.model.frozen
    backbone = _load_base(path, config, tokenizer) if from_base else load_weights(path, config.model.dtype)
    model = build_model(config, tokenizer, len(users), backbone)
    try:
        if config.lora.rank:
            load_lora(model.backbone, path)
        _user_modules(model).load_state_dict(load_file(path / "users.safetensors"))
        posterior = Posterior(**load_file(path / POSTERIOR)) if (path / POSTERIOR).exists() else None
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: damaged or incomplete model ({error})") from None
    _to_compute_type(model.backbone, config)
    return Loaded(path, config, tokenizer, users, model.eval(), posterior)


def _to_compute_type(backbone: nn.Module, config: Config) -> None:
    """Parameters in model.compute_dtype, where that is set, as FSDP gathers them in training; buffers as they are."""
    if config.model.compute_dtype:
        for p in backbone.parameters():
            p.data = p.data.to(DTYPES[config.model.compute_dtype])


def reference_model(loaded: Loaded) -> PersonalizedLM:
    """pi_SFT: the model itself where its backbone has the base's weights (adapters off), else the base, on the CPU."""
    keeps_base = loaded.config.lora.rank or loaded.config.model.frozen
    return loaded.model if keeps_base else base_model(loaded)


def base_model(loaded: Loaded) -> PersonalizedLM:
    """The model that training started from, which reads no user vectors. `loaded`'s own backbone is taken, without its adapters,
    where it has the base's weights: `loaded` is then of no more use. Else the base is read anew, on the CPU."""
    model, config = loaded.model, loaded.config
    if config.lora.rank or config.model.frozen:
        backbone = model.backbone
        remove_lora(backbone)
    else:
        backbone = _load_base(loaded.path, config, loaded.tokenizer)
        _to_compute_type(backbone, config)
    return without_users(model, backbone)


def base_fingerprint(path: Path) -> str:
    """The fingerprint of the weights that the model in `path` was trained from."""
    return _base(path)["fingerprint"]


def weights_checksum(path: Path) -> str:
    """A hash of all safetensors files in a folder, which tells one model from another."""
    return checksum(*sorted(path.glob("*.safetensors")))


def _base(path: Path) -> dict[str, str]:
    try:
        base = json.loads((path / "base.json").read_text(encoding="utf-8"))
        return {name: base[name] for name in ("dtype", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'base.json'}: cannot be read ({error})") from None


def _load_base(path: Path, config: Config, tokenizer: Tokenizer) -> PreTrainedModel:
    """The base model. UserError where its weights are not those that training started from."""
    backbone, base = load_backbone(config.model, tokenizer, config.seed), _base(path)
    if base["dtype"] == config.model.dtype and base["fingerprint"] != weights_fingerprint(backbone):
        raise UserError(f"{path}: the base model's weights are not those that this model was trained from")
    return backbone


def _user_modules(model: PersonalizedModel) -> nn.ModuleDict:
    """What training adds to the backbone, beside LoRA."""
    parts = {name: getattr(model, name, None) for name in ("user_model", "aggregator", "value_head")}
    return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
