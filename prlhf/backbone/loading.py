"""Models and tokenizers: from a folder or the hub, without values, or small ones with random weights; and the device.

Weights are read from safetensors alone, no code comes with a model, and what goes wrong is told in a sentence.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from prlhf.backbone.attention import use_tree_attention
from prlhf.backbone.toys import DTYPES, byte_tokenizer, random_backbone
from prlhf.config.keys import ModelConfig
from prlhf.errors import UserError

transformers_logging.disable_progress_bar()


def load_tokenizer(config: ModelConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` or of the model; a byte tokenizer for a random-weight model."""
    if folder is None and config.name is None:
        return byte_tokenizer()
    with _explained(folder or config.name):
        return AutoTokenizer.from_pretrained(str(folder or _expanded(config.name)), trust_remote_code=False)


def load_backbone(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The causal LM in config.dtype: from safetensors, or with weights drawn from `seed` where it has no name."""
    if config.name is None:
        return use_tree_attention(random_backbone(config, len(tokenizer), seed))
    return load_weights(config.name, config.dtype)


def load_weights(name: str | Path, dtype: str) -> PreTrainedModel:
    """A causal LM from a folder or hub name. UserError where there is none, or no safetensors in it."""
    with _explained(name):
        model = AutoModelForCausalLM.from_pretrained(
            _expanded(name), dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
        )
    make_savable(model)
    return use_tree_attention(model)


def make_savable(model: PreTrainedModel) -> None:
    """Mend a generation config that transformers reads and then refuses to save: a temperature, say, without sampling."""
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        try:
            generation.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def weights_folder(name: str | Path) -> Path:
    """The folder of a model's safetensors: as named, or the hub's, downloaded where it is not there yet."""
    path = Path(_expanded(name))
    if path.is_dir():
        return path
    with _explained(name):
        folder = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "tokenizer*"]))
        if not any(folder.glob("*.safetensors")):
            raise OSError("the hub has no model.safetensors of it")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files in `folder` that from_pretrained reads: model.safetensors, else those that its index names; of others, of
    another type say, none. Empty where there is neither."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted({Path(file).name for file in files})]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read ({error})") from None


def word_embeddings(model: PreTrainedModel, folder: Path) -> Tensor:
    """The input embeddings (V, D) of an empty model, as they lie in the one of `weight_files` that has them: what of them
    is not read takes no memory."""
    wanted = model.get_input_embeddings().weight
    name = next(name for name, p in model.named_parameters() if p is wanted)
    files = weight_files(folder)
    for file in files:
        with _explained(folder), safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118 (not a dict)
                return opened.get_tensor(name)
    if not files:
        raise UserError(f"model {str(folder)!r}: no model.safetensors and no index of its parts{_conversion(folder)}")
    raise UserError(f"model {str(folder)!r}: no weight {name!r} in its safetensors files")


def empty_backbone(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal LM of a config with parameters of config.dtype that have shapes and no values (device meta).

    Buffers, such as rotary frequencies, are real. No weights are read: a named model's config.json says it all.
    """
    if config.name is None:
        with parameters_on_meta(torch.float32):
            return use_tree_attention(random_backbone(config, len(tokenizer), 0))
    dtype = DTYPES[config.dtype]
    with parameters_on_meta(dtype), _explained(config.name):
        described = AutoConfig.from_pretrained(_expanded(config.name), trust_remote_code=False)
        # Made in float32, as from_pretrained makes it: rotary frequencies computed in a half type would be others.
        model = AutoModelForCausalLM.from_config(described, dtype=torch.float32, trust_remote_code=False)
        with contextlib.suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(_expanded(config.name))
    model.config.dtype = dtype
    make_savable(model)
    return use_tree_attention(model.eval())


@contextlib.contextmanager
def parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Within the context, a module's parameters lose their values as soon as they are registered, and are of `dtype`."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is already there is tied
            parameter = nn.Parameter(parameter.detach().to("meta", dtype), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def choose_device(name: str) -> str:
    """The device of the config's `device`: auto is cuda where there is one. UserError for a cuda that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: found 'cuda', but torch sees no GPU; expected auto or cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _conversion(name: str | Path, reason: str = "") -> str:
    """What to do with a model that has no safetensors, by its folder or by what was said of the hub's; '' where it has."""
    folder = Path(_expanded(name))
    if any(folder.glob("*.safetensors")) or not (any(folder.glob("*.bin")) or "model.safetensors" in reason):
        return ""
    return (
        "; .bin files are never unpickled here. If it has these alone and you trust them, convert them once: "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(name)!r}).save_pretrained(NEW_FOLDER, "
        "safe_serialization=True), and the tokenizer likewise"
    )


def _expanded(name: str | Path) -> str:
    path = Path(name).expanduser()
    return str(path) if path.exists() else str(name)


@contextlib.contextmanager
def _explained(name: str | Path) -> Iterator[None]:
    """Loading errors as one sentence, and transformers' chatter left out."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {str(name)!r}: expected a folder or hub name (model.name) of a causal LM with whole safetensors "
            f"and a tokenizer ({reason}){_conversion(name, reason)}"
        ) from None
    finally:
        logger.setLevel(level)
