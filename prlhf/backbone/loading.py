"""Models and tokenizers: loaded from a folder or the hub, or made without values; and the device.

Weights are read from safetensors only, and no code comes with a model. Errors are told in one sentence.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from prlhf.backbone.attention import use_tree_attention
from prlhf.backbone.checks import check_vocabulary, check_whole_model, read_config, reason_of
from prlhf.backbone.toys import DTYPES, byte_tokenizer, random_backbone
from prlhf.backbone.weights import check_finite, check_keys, not_finite, stored_tensors
from prlhf.config.keys import ModelConfig
from prlhf.errors import UserError, expanded

transformers_logging.disable_progress_bar()


def choose_device(name: str) -> str:
    """The device that the key `device` names; auto is cuda where there is one. UserError for a cuda that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: found 'cuda', but torch sees no GPU; expected auto or cpu")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(config: ModelConfig, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` or of the model; a byte tokenizer for a random-weight model."""
    name = folder or config.name
    if name is None:
        return byte_tokenizer()
    with _explained(name) as source:
        if folder is None:
            check_whole_model(source)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_backbone(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The causal LM in config.dtype: from safetensors, or with weights drawn from `seed` where it has no name."""
    if config.name is None:
        return use_tree_attention(random_backbone(config, len(tokenizer), seed))
    model = load_weights(config.name, config.dtype)
    check_vocabulary(config.name, tokenizer, model)
    return model


def load_weights(name: str | Path, dtype: str) -> PreTrainedModel:
    """A causal LM from a folder or hub name. UserError where there is none, or no safetensors in it, or not all of its
    weights, or weights that are not finite."""
    with _explained(name) as source:
        check_whole_model(source)
        read_config(source)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_keys` says which
        )
    check_keys(str(name), model, info)
    check_finite(str(name), not_finite(stored_tensors(model)))
    make_savable(model)
    return use_tree_attention(model)


def empty_backbone(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal LM of a config, with parameters in config.dtype that have shapes but no values (on meta).
    Buffers, such as rotary frequencies, are real. No weights are read: a named model's config.json is enough."""
    if config.name is None:
        with parameters_on_meta(torch.float32):
            return use_tree_attention(random_backbone(config, len(tokenizer), 0))
    dtype = DTYPES[config.dtype]
    with parameters_on_meta(dtype), _explained(config.name) as source:
        check_whole_model(source)
        described = read_config(source)
        # In float32, as from_pretrained makes it: rotary frequencies computed in a half type would differ.
        model = AutoModelForCausalLM.from_config(described, dtype=torch.float32, trust_remote_code=False)
        with contextlib.suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(source)
    check_vocabulary(config.name, tokenizer, model)
    model.config.dtype = dtype
    make_savable(model)
    return use_tree_attention(model.eval())


@contextlib.contextmanager
def parameters_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Within the context, parameters lose their values as a module registers them, and get `dtype`."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:  # already registered: a tied weight, which stays the same object
            return parameter
        return nn.Parameter(parameter.detach().to("meta", dtype), parameter.requires_grad)

    with register_module_parameter_registration_hook(on_meta):
        yield


def make_savable(model: PreTrainedModel) -> None:
    """Repair a generation config that transformers reads but refuses to save (a temperature without sampling, say)."""
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        try:
            generation.validate(strict=True)
        except ValueError:
            ends = generation.eos_token_id  # more than the model config may have
            model.generation_config = GenerationConfig.from_model_config(model.config)
            if ends is not None:
                model.generation_config.eos_token_id = ends


def weights_folder(name: str | Path) -> Path:
    """The folder of a model's safetensors: the one named, or the hub's, downloaded where it is not there yet."""
    path = Path(_expanded(name))
    if path.is_dir():
        return path
    with _explained(name):
        folder = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "tokenizer*"]))
        if not any(folder.glob("*.safetensors")):
            raise OSError("the hub has no model.safetensors of it")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files in `folder` that from_pretrained reads: model.safetensors, else those in its index; empty without both.
    Other safetensors in the folder (of another type, say) are not the model's."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted({Path(file).name for file in files})]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read ({error})") from None


def weight_names(folder: Path) -> set[str]:
    """The names of all weights in a folder's `weight_files`, from the files' headers."""
    names: set[str] = set()
    for file in weight_files(folder):
        with _explained(folder), safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


def word_embeddings(model: PreTrainedModel, folder: Path) -> Tensor:
    """The input embeddings (V, D) of an empty model, from its `weight_files`; nothing else is read into memory."""
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


def _expanded(name: str | Path) -> str:
    """The name with ~ replaced, where that is a path."""
    path = expanded(name)
    return str(path) if path.exists() else str(name)


@contextlib.contextmanager
def _explained(name: str | Path) -> Iterator[str]:
    """The name to load by (~ replaced). Within the context loading errors are one sentence, without log messages."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield _expanded(name)
    except UserError:
        raise
    except Exception as error:  # for a file that they cannot read the libraries raise any kind
        reason = reason_of(error)
        raise UserError(
            f"model {str(name)!r}: expected a folder or hub name (model.name) of a causal LM with whole safetensors "
            f"and a tokenizer ({reason}){_conversion(name, reason)}"
        ) from None
    finally:
        logger.setLevel(level)


def _conversion(name: str | Path, reason: str = "") -> str:
    """How to convert a model without safetensors, known by its .bin files or by the hub's `reason`; '' for any other."""
    folder = Path(_expanded(name))
    if any(folder.glob("*.safetensors")) or not (any(folder.glob("*.bin")) or "model.safetensors" in reason):
        return ""
    return (
        "; .bin files are never unpickled here. If it has these alone and you trust them, convert them once: "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(name)!r}).save_pretrained(NEW_FOLDER, "
        "safe_serialization=True), and the tokenizer likewise"
    )
