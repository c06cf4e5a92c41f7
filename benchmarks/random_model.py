"""A model of a real shape with random weights, which costs what the real one costs, for benchmarks without its weights.

    python benchmarks/random_model.py "Llama-3-8B" --out FOLDER [--dtype bfloat16]
    python benchmarks/step.py --model FOLDER --lora 16 --dtype bfloat16

Writes a Hugging Face folder: config.json, safetensors, and a tokenizer of bytes, whose ids are the vocabulary's first.
"""

import argparse

import torch
from shapes import MODELS
from transformers import AutoModelForCausalLM

from prlhf.backbone.toys import DTYPES, byte_tokenizer
from prlhf.errors import run_command


def main() -> None:
    """Draw the weights and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(MODELS))
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the real one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = MODELS[args.shape]
    if args.layers:
        config.update({"n_layer" if config.model_type == "gptj" else "num_hidden_layers": args.layers})
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype])
    model.save_pretrained(args.out, max_shard_size="4GB")
    byte_tokenizer().save_pretrained(args.out)
    print(f"{args.out}: {args.shape}, {sum(p.numel() for p in model.parameters()):,} parameters in {args.dtype}")


if __name__ == "__main__":
    run_command(main)
