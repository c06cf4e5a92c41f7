"""What is refused before a model is loaded, in one sentence: what is no whole model of floats, or has another's tokenizer."""

import json
from pathlib import Path

import tokenizers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from prlhf.errors import UserError


def check_whole_model(source: str) -> None:
    """UserError for a folder that has no whole model: an adapter, a run, or the final/ of a run with a frozen backbone."""
    folder, adapter = Path(source), find_adapter_config_file(source)
    if adapter is not None:
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base is None:
            raise UserError(
                f"model {source!r}: found adapter_config.json, which names no base model; remove it if this is the whole model, "
                "else merge the adapter into its base (peft's merge_and_unload) and name the result"
            )
        raise UserError(
            f"model {source!r}: found an adapter of {base!r} (adapter_config.json), expected a whole model (model.name). "
            f"Merge the two once: peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained({base!r}), "
            f"{source!r}).merge_and_unload().save_pretrained(NEW_FOLDER), and transformers.AutoTokenizer.from_pretrained("
            f"{base!r}).save_pretrained(NEW_FOLDER)"
        )
    if (folder / "config.json").is_file():
        return
    if (folder / "final" / "users.json").is_file():
        raise UserError(f"model {source!r}: found a run's folder, expected a model (model.name): {folder / 'final'}?")
    if (folder / "base.json").is_file():
        base = json.loads((folder / "base.json").read_text(encoding="utf-8")).get("name")
        raise UserError(
            f"model {source!r}: found the user vectors of a run with a frozen backbone, expected a whole model (model.name), "
            f"such as the run's own, {base!r}"
        )


def read_config(source: str) -> PretrainedConfig:
    """A model's config.json. UserError where it is of quantised weights, or pads with a token that has no embedding."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    quantised = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if quantised:
        quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = quantised.get("quant_method", "a method without a name")
        raise UserError(
            f"model {source!r}: found quantised weights ({method}), which are not trained here; expected float weights: the "
            "model that they were made from or, where transformers has code for them, these turned back once: model = "
            f"transformers.AutoModelForCausalLM.from_pretrained({source!r}), model.dequantize(), "
            "model.save_pretrained(NEW_FOLDER), and the tokenizer likewise"
        )
    pad, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is not None and vocabulary is not None and pad >= vocabulary:
        raise UserError(
            f"model {source!r}: found pad_token_id {pad} in its config.json, expected less than its vocab_size, {vocabulary} "
            "(null will do: nothing is padded with it here)"
        )
    return config


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """UserError where the tokenizer gives tokens for which the model has no word embedding. Tokens that were added to it,
    and that neither ends nor begins a text, nor does the chat template write, may have none: no text has them."""
    rows, template = model.get_input_embeddings().weight.shape[0], str(tokenizer.chat_template or "")
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    used = sorted(i for i, token in beyond.items() if i not in added or i in ends or token in template)
    if used:
        raise UserError(
            f"model {name!r}: found token {beyond[used[0]]!r} with the number {used[0]} in its tokenizer, and {rows} word "
            "embeddings, from 0 on; expected one for every token: take the tokenizer that the model was trained with, or "
            "give the model as many once, with model.resize_token_embeddings(len(tokenizer)) and model.save_pretrained(...)"
        )


def reason_of(error: Exception) -> str:
    """What a library says of a file that it cannot read, in one line."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    if isinstance(error, StrictDataclassError):  # names the field in one line, and what is wrong in the next
        return f"config.json: {' '.join(lines)}"
    if type(error) is Exception:  # of tokenizers, in Rust
        return (
            f"tokenizer.json cannot be read by tokenizers {tokenizers.__version__}: {lines[0]}; a newer version may have "
            "written it: pip install --upgrade transformers"
        )
    if "conversion of the weights" in lines[0]:  # refers to a report that is not shown
        return "its files lack a part of a weight that is put together from several, such as one expert's"
    known = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)
    return lines[0] if isinstance(error, known) else f"{type(error).__name__}: {lines[0]}"
